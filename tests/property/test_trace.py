"""Laws of traces: what is written is read, and ids are prefix structure and nothing else."""

from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.blocks import prompt_hashes
from simulations.generate import TrafficOptions, generate
from simulations.trace import (
    TRACE_BLOCK_TOKENS,
    TraceRequest,
    encode_request,
    expand,
    read_trace,
)

VOCABULARY = range(1_000)
ENGINE_BLOCK = 64


@st.composite
def trace_requests(draw: st.DrawFn) -> TraceRequest:
    input_length = draw(st.integers(1, 5 * TRACE_BLOCK_TOKENS))
    blocks = -(-input_length // TRACE_BLOCK_TOKENS)
    return TraceRequest(
        timestamp_ms=draw(st.integers(0, 2**40)),
        input_length=input_length,
        output_length=draw(st.integers(1, 2**31)),
        hash_ids=draw(st.lists(st.integers(0, 3), min_size=blocks, max_size=blocks)),
    )


traffic = st.builds(
    TrafficOptions,
    duration_s=st.floats(1, 60),
    sessions_per_s=st.floats(0.1, 2),
    turns_mean=st.floats(1, 6),
    pause_s_median=st.floats(0.1, 10),
    system_prompts=st.integers(1, 4),
    system_tokens_median=st.floats(1, 3_000),
    user_tokens_median=st.floats(1, 2_000),
    input_tokens_max=st.integers(1, 20_000),
)


@given(st.lists(trace_requests()))
def test_read_gives_what_was_written(requests: list[TraceRequest]) -> None:
    """read(encode(r)) == r, as text and as bytes."""
    requests.sort(key=lambda request: request.timestamp_ms)
    lines = [encode_request(request) for request in requests]
    assert list(read_trace(lines)) == requests
    assert list(read_trace(line.decode() for line in lines)) == requests


@given(trace_requests(), trace_requests())
def test_prompts_share_exactly_the_blocks_that_their_ids_share(
    one: TraceRequest, other: TraceRequest
) -> None:
    """The chains of KV block hashes agree as far as the ids do, cut off at the shorter prompt."""
    chains = []
    for request in (one, other):
        tokens = expand(request.hash_ids, request.input_length, VOCABULARY)
        assert len(tokens) == request.input_length
        chains.append(prompt_hashes(tokens, ENGINE_BLOCK))
    shared_ids = common_prefix(one.hash_ids, other.hash_ids) * TRACE_BLOCK_TOKENS
    shared_tokens = min(shared_ids, one.input_length, other.input_length)
    assert common_prefix(*chains) == shared_tokens // ENGINE_BLOCK


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_blocks_differ_within_their_first_tokens(one: int, other: int) -> None:
    """Eight draws out of 1,000 agree once in 10**24."""
    heads = [expand([hash_id], 8, VOCABULARY) for hash_id in (one, other)]
    assert (heads[0] == heads[1]) == (one == other)


@given(traffic, st.integers(0, 2**32))
@settings(max_examples=50)
def test_generated_ids_are_prefix_structure(options: TrafficOptions, seed: int) -> None:
    """An id always has the same predecessor; partial blocks' ids are used once; all are dense."""
    requests = generate(options, Random(seed))
    assert list(read_trace(map(encode_request, requests))) == requests
    predecessors: dict[int, int | None] = {}
    partial: set[int] = set()
    for request in requests:
        assert request.input_length <= options.input_tokens_max
        assert request.timestamp_ms < options.duration_s * 1000
        for before, hash_id in pairwise([None, *request.hash_ids]):
            assert hash_id is not None and hash_id not in partial
            assert predecessors.setdefault(hash_id, before) == before
            assert hash_id < len(predecessors), "ids count in the order of appearance"
        if request.input_length % TRACE_BLOCK_TOKENS:
            partial.add(request.hash_ids[-1])
    assert sorted(predecessors) == list(range(len(predecessors)))


@given(traffic, st.integers(0, 2**32))
@settings(max_examples=20)
def test_a_seed_gives_one_trace(options: TrafficOptions, seed: int) -> None:
    assert generate(options, Random(seed)) == generate(options, Random(seed))


def common_prefix(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
