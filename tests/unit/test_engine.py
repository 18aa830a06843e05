"""What the mock engine does with a request, by example."""

import pytest

from eventstore.events import BlockRemoved, BlockStored
from indexer.blocks import prompt_hashes
from workers.engine import EngineConfig, MockEngine, RequestRefused, StepOutput, StepResult
from workers.protocol import EngineRequest, SamplingOptions, StopConditions
from workers.timing import TimingModel

TIMING = TimingModel()
EOS = 7


def engine(**sizes: object) -> MockEngine:
    defaults: dict[str, object] = {
        "block_size": 4,
        "num_gpu_blocks": 100,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "context_length": 200,
        "output_token_ids": range(100, 200),
    }
    return MockEngine(EngineConfig(**(defaults | sizes)), seed=1, worker_id=9, dp_rank=2)  # type: ignore[arg-type]


def request(
    name: str,
    tokens: list[int] | range,
    max_tokens: int | None = 3,
    *,
    min_tokens: int | None = None,
    ignore_eos: bool = True,
    hidden: list[int] | None = None,
    seed: int | None = None,
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        model="m",
        token_ids=list(tokens),
        stop_conditions=StopConditions(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids_hidden=hidden or [],
        ),
        sampling_options=SamplingOptions(seed=seed),
        eos_token_ids=[EOS, 8],
    )


def step(one: MockEngine) -> StepResult:
    result = one.step()
    assert result is not None
    one.check()
    return result


def run(one: MockEngine) -> list[StepOutput]:
    """All outputs until the engine is idle."""
    outputs: list[StepOutput] = []
    while (result := one.step()) is not None:
        one.check()
        outputs += result.outputs
    return outputs


def said(one: MockEngine, asked: EngineRequest) -> tuple[list[int], str | None]:
    """What the engine answers to a request alone: tokens and finish reason."""
    one.submit(asked)
    outputs = run(one)
    return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason


def ids(outputs: list[StepOutput]) -> list[str]:
    return [output.request_id for output in outputs]


# --- one request ----------------------------------------------------------------------------------


def test_a_request_alone_prefills_then_decodes_token_by_token() -> None:
    one = engine()
    one.submit(request("a", range(10)))
    assert (one.num_waiting, one.num_running) == (1, 0)

    first = step(one)
    assert first.duration_ms == TIMING.prefill_ms(10)  # no decode time added
    assert first.prefill_tokens == 10
    (output,) = first.outputs
    assert (output.cached_tokens, output.finish_reason, len(output.token_ids)) == (0, None, 1)
    assert first.kv_events == [BlockStored(9, 2, None, prompt_hashes(range(10), 4))]
    assert (one.num_waiting, one.num_running, one.active_blocks) == (0, 1, 3)

    second = step(one)
    assert second.duration_ms == TIMING.decode_ms(3 / 100)
    assert second.outputs[0].cached_tokens is None
    assert second.kv_events == []

    third = step(one)  # computes the 12th token, which fills the third block
    tokens = [*range(10), *output.token_ids, *second.outputs[0].token_ids]
    parent, child = prompt_hashes(tokens, 4)[1:]
    assert third.kv_events == [BlockStored(9, 2, parent, [child])]
    assert third.outputs[0].finish_reason == "length"
    assert one.step() is None
    assert (one.active_blocks, one.request_ids()) == (0, [])


def test_a_long_prompt_is_computed_in_chunks_and_announced_as_it_is() -> None:
    one = engine()
    one.submit(request("a", range(40), 1))
    steps = [step(one) for _ in range(3)]
    assert [each.prefill_tokens for each in steps] == [16, 16, 8]
    assert [len(each.outputs) for each in steps] == [0, 0, 1]
    first, second, third = (prompt_hashes(range(40), 4)[at : at + 4] for at in (0, 4, 8))
    assert [event for each in steps for event in each.kv_events] == [
        BlockStored(9, 2, None, first),
        BlockStored(9, 2, first[-1], second),
        BlockStored(9, 2, second[-1], third),
    ]


@pytest.mark.parametrize(("tokens", "cached"), [(8, 7), (9, 8), (11, 8), (12, 11)])
def test_a_cached_prefix_is_not_computed_again_but_for_the_last_token(
    tokens: int, cached: int
) -> None:
    one = engine()
    said(one, request("a", range(12), 1))
    one.submit(request("b", range(tokens), 1))
    result = step(one)
    assert result.outputs[0].cached_tokens == cached
    assert result.prefill_tokens == tokens - cached
    assert result.kv_events == []


def test_a_request_ends_by_itself_with_an_end_token() -> None:
    tokens, reason = said(engine(output_length_mean=5), request("a", [1], 100, ignore_eos=False))
    assert reason == "eos"
    assert tokens[-1] == EOS and EOS not in tokens[:-1] and len(tokens) < 100


def test_natural_lengths_have_the_mean_that_was_asked_for() -> None:
    one = engine(output_length_mean=20)
    asked = [request("a", [1], None, seed=seed, ignore_eos=False) for seed in range(200)]
    mean = sum(len(said(one, each)[0]) for each in asked) / len(asked)
    assert 16 < mean < 24  # the mean of 200 geometric lengths has a standard deviation of 1.4


def test_min_tokens_postpones_the_natural_end() -> None:
    one = engine(output_length_mean=1)
    assert said(one, request("a", [1], 50, ignore_eos=False)) == ([EOS], "eos")
    tokens, reason = said(one, request("b", [1], 50, ignore_eos=False, min_tokens=9))
    assert (len(tokens), tokens[-1], reason) == (10, EOS, "eos")


def test_ignore_eos_runs_to_max_tokens_or_else_to_the_end_of_the_context() -> None:
    one = engine(output_length_mean=1)
    tokens, reason = said(one, request("a", [1], 50))
    assert (len(tokens), reason) == (50, "length")
    tokens, reason = said(one, request("b", range(20), None))
    assert (len(tokens), reason) == (180, "length")


def test_a_request_without_end_tokens_has_no_natural_end() -> None:
    asked = EngineRequest(
        request_id="a", model="m", token_ids=[1], stop_conditions=StopConditions(max_tokens=30)
    )
    assert len(said(engine(output_length_mean=1), asked)[0]) == 30


def test_a_hidden_stop_token_ends_the_output() -> None:
    tokens, _ = said(engine(), request("a", [1], 20))
    stop = tokens[10]
    end = tokens.index(stop)
    assert said(engine(), request("a", [1], 20, hidden=[stop])) == (tokens[: end + 1], "stop")
    after, _ = said(engine(), request("a", [1], 20, hidden=[stop], min_tokens=end + 1))
    assert after[: end + 2] == tokens[: end + 2]


def test_an_output_ends_where_the_cache_does() -> None:
    """Without max_tokens, a context larger than the cache is no promise."""
    one = engine(num_gpu_blocks=3)
    tokens, reason = said(one, request("a", [1], None))
    # The last token is not computed, so it takes no room.
    assert (len(tokens), reason) == (3 * 4 - 1 + 1, "length")


def test_what_is_said_is_the_same_in_every_process() -> None:
    tokens, _ = said(engine(), request("a", range(6), 6))
    # Six tokens as drawn; whoever changes the drawing changes them here, knowingly.
    assert tokens == [185, 118, 140, 154, 145, 100]


def test_another_seed_says_something_else() -> None:
    tokens, _ = said(engine(), request("a", [1], 20))
    assert said(engine(), request("a", [1], 20, seed=3))[0] != tokens
    assert said(engine(), request("other", [1], 20))[0] == tokens


# --- many requests --------------------------------------------------------------------------------


def test_decoding_goes_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    one = engine()
    one.submit(request("a", range(8), 9))
    step(one)
    one.submit(request("b", range(100, 112), 9))
    one.submit(request("c", range(200, 212), 9))
    result = step(one)
    assert ids(result.outputs) == ["a", "b"]  # c got 3 of its 12 tokens
    assert result.prefill_tokens == 15
    # All three hold 3 blocks: a's 9th token has begun one.
    assert result.duration_ms == TIMING.prefill_ms(15) + TIMING.decode_ms(9 / 100)
    result = step(one)
    assert ids(result.outputs) == ["a", "b", "c"]
    assert result.prefill_tokens == 9


def test_no_more_than_max_num_seqs_run() -> None:
    one = engine(max_num_seqs=2)
    for name in "abc":
        one.submit(request(name, [ord(name)], 2))
    assert ids(step(one).outputs) == ["a", "b"]
    assert (one.num_running, one.num_waiting) == (2, 1)
    assert ids(step(one).outputs) == ["a", "b"]
    assert ids(step(one).outputs) == ["c"]


def test_priority_goes_before_arrival() -> None:
    one = engine(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", 5)):
        one.submit(request(name, [1], 1), priority=priority)
    assert ids(run(one)) == ["b", "c", "a"]


def test_a_request_waits_until_its_blocks_fit_and_nobody_passes_it() -> None:
    one = engine(num_gpu_blocks=5)
    one.submit(request("a", range(12), 4))  # 3 blocks, then 4
    step(one)
    one.submit(request("b", range(50, 62), 1))  # 3 blocks
    one.submit(request("c", [1], 1))
    for _ in range(3):
        assert ids(step(one).outputs) == ["a"]
        assert one.num_waiting == 2
    assert ids(step(one).outputs) == ["b", "c"]


def test_cached_blocks_in_use_cost_an_entering_request_nothing() -> None:
    one = engine(num_gpu_blocks=5)
    one.submit(request("a", range(12), 4))
    step(one)
    one.submit(request("b", range(13), 1))  # 4 blocks, 3 of them in use by a
    result = step(one)
    assert ids(result.outputs) == ["a", "b"]
    assert result.outputs[1].cached_tokens == 12


def test_the_youngest_is_preempted_and_computed_again_without_a_trace_in_its_output() -> None:
    one = engine(num_gpu_blocks=5)
    one.submit(request("a", range(8), 5))
    one.submit(request("b", range(50, 58), 5))
    assert ids(step(one).outputs) == ["a", "b"]
    # Both need a third block, and there is one.
    result = step(one)
    assert (ids(result.outputs), result.preempted, one.num_waiting) == (["a"], 1, 1)
    outputs = result.outputs + run(one)
    assert ids(outputs) == ["a"] * 4 + ["b"] * 4
    assert [output.cached_tokens for output in outputs] == [None] * 8
    answer = [token for output in outputs[4:] for token in output.token_ids]
    assert answer == said(engine(), request("b", range(50, 58), 5))[0][1:]


def test_who_needs_a_block_and_is_the_youngest_preempts_itself() -> None:
    one = engine(num_gpu_blocks=4)
    one.submit(request("a", range(6), 3))
    one.submit(request("b", range(50, 58), 3))
    assert ids(step(one).outputs) == ["a", "b"]
    result = step(one)  # b's 9th token needs a third block, a's 7th does not
    assert (ids(result.outputs), result.preempted) == (["a"], 1)
    assert ids(run(one)) == ["a", "b", "b"]


def test_a_request_in_prefill_is_preempted_for_one_that_decodes() -> None:
    one = engine(num_gpu_blocks=4, max_num_batched_tokens=8)
    one.submit(request("a", range(7), 4))
    step(one)
    one.submit(request("b", range(50, 58), 2))
    assert ids(step(one).outputs) == ["a"]  # with its 8th token and 7 of b's
    result = step(one)
    assert (ids(result.outputs), result.preempted) == (["a"], 1)
    outputs = run(one)
    assert ids(outputs) == ["a", "b", "b"]
    assert outputs[1].cached_tokens == 0  # at its first admission, not at its second


def test_equal_prompts_computed_in_one_step_are_announced_once() -> None:
    one = engine()
    one.submit(request("a", range(8), 2))
    one.submit(request("b", range(8), 2))
    result = step(one)
    assert [output.cached_tokens for output in result.outputs] == [0, 0]
    assert result.kv_events == [BlockStored(9, 2, None, prompt_hashes(range(8), 4))]
    assert one.active_blocks == 2


def test_evicted_blocks_are_announced_before_what_takes_their_place() -> None:
    one = engine(num_gpu_blocks=3)
    said(one, request("a", range(8), 1))
    one.submit(request("b", range(50, 58), 1))
    first, second = prompt_hashes(range(8), 4)
    assert step(one).kv_events == [
        BlockRemoved(9, 2, [second]),
        BlockStored(9, 2, None, prompt_hashes(range(50, 58), 4)),
    ]
    assert first in [run.sequence_hashes[0] for run in one.cache_contents()]


def test_without_prefix_caching_nothing_is_reused_or_announced() -> None:
    one = engine(enable_prefix_caching=False)
    for name in "ab":
        one.submit(request(name, range(8), 1))
        result = step(one)
        assert (result.outputs[0].cached_tokens, result.kv_events) == (0, [])


# --- cancel and refuse ----------------------------------------------------------------------------


def test_cancel_frees_a_request_wherever_it_is() -> None:
    one = engine(max_num_seqs=2)
    one.submit(request("decoding", range(8), 9))
    one.submit(request("prefilling", range(50, 90), 9))
    one.submit(request("waiting", range(8), 9))
    step(one)
    assert one.request_ids() == ["decoding", "prefilling", "waiting"]
    for name in ("prefilling", "waiting", "decoding"):
        assert one.cancel(name)
        one.check()
        assert not one.cancel(name)
    assert (one.step(), one.active_blocks, one.request_ids()) == (None, 0, [])


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (request("x", []), "empty"),
        (request("x", [1], 0), "max_tokens"),
        (request("x", range(190), 11), "context"),
        (request("x", range(200), None), "context"),
        (request("x", [-1]), "u32"),
        (request("x", [2**32]), "u32"),
        (request("here", [1]), "already"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(asked: EngineRequest, why: str) -> None:
    one = engine()
    one.submit(request("here", [1]))
    with pytest.raises(RequestRefused, match=why) as refused:
        one.submit(asked)
    assert refused.value.code == "invalid_request"
    assert one.request_ids() == ["here"]


def test_a_request_larger_than_the_cache_is_refused_and_one_that_just_fits_is_served() -> None:
    one = engine(num_gpu_blocks=4)
    with pytest.raises(RequestRefused, match="cache") as refused:
        one.submit(request("a", range(10), 8))
    assert refused.value.code == "invalid_request"
    assert len(said(one, request("a", range(10), 7))[0]) == 7


def test_the_waiting_line_has_an_end() -> None:
    one = engine(max_num_waiting=2)
    one.submit(request("a", [1]))
    one.submit(request("b", [1]))
    with pytest.raises(RequestRefused) as refused:
        one.submit(request("c", [1]))
    assert refused.value.code == "overloaded"
    step(one)
    one.submit(request("c", [1]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 0},
        {"num_gpu_blocks": 0},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 7},
        {"max_num_waiting": 0},
        {"context_length": 0},
        {"speedup": 0},
        {"output_token_ids": []},
        {"output_token_ids": [2**32]},
        {"output_length_mean": 0.5},
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        engine(**sizes)
