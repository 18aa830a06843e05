"""What the mock engine does with a prompt that another worker has computed, by example."""

import pytest

from eventstore.events import BlockRemoved, BlockStored
from indexer.blocks import prompt_hashes
from tests.unit.test_engine import TIMING, engine, ids, request, run, said, step
from workers.engine import StepOutput

MS_PER_TOKEN = 8.0
SLOW_LINK = {"kv_bytes_per_token": 1_000_000, "kv_transfer_gbps": 1}


def test_a_computed_prompt_is_transferred_then_announced_then_decoded() -> None:
    one = engine(**SLOW_LINK)
    one.submit(request("a", range(10)), is_remote=True)
    assert one.step(1000) is None
    assert (one.num_waiting, one.num_fetching, one.num_running) == (0, 1, 0)
    assert (one.active_blocks, one.next_due_ms) == (3, 1000 + 10 * MS_PER_TOKEN)
    assert one.step(1079) is None

    result = one.step(1080)
    one.check()
    assert result is not None
    assert (result.duration_ms, result.prefill_tokens) == (TIMING.decode_ms(3 / 100), 0)
    assert result.kv_events == [BlockStored(9, 2, None, prompt_hashes(range(10), 4))]
    (output,) = result.outputs
    assert (output.cached_tokens, output.finish_reason) == (0, None)
    outputs = result.outputs + run(one)
    answer = [token for output in outputs for token in output.token_ids]
    assert (answer, "length") == said(engine(), request("a", range(10)))
    assert (one.active_blocks, one.next_due_ms) == (0, None)


@pytest.mark.parametrize(("tokens", "cached", "moved"), [(8, 7, 0), (9, 8, 1), (16, 8, 8)])
def test_only_what_is_not_cached_is_transferred(tokens: int, cached: int, moved: int) -> None:
    one = engine(**SLOW_LINK)
    said(one, request("a", range(8), 1))
    one.submit(request("b", range(tokens)), is_remote=True)
    assert one.step(1000) is None
    assert one.next_due_ms == 1000 + moved * MS_PER_TOKEN
    result = one.step(one.next_due_ms)
    assert result is not None
    assert result.outputs[0].cached_tokens == cached


def test_others_go_on_while_a_prompt_is_transferred() -> None:
    one = engine(**SLOW_LINK)
    one.submit(request("a", [1], 30))
    step(one)
    one.submit(request("b", range(10), 2), is_remote=True)
    seen: list[str] = []
    while "b" not in seen:
        result = step(one)
        seen += ids(result.outputs)
    # 80 ms at about 6 ms a step.
    assert 10 <= seen.count("a") <= 15
    assert ids(step(one).outputs) == ["a", "b"]


def test_transfers_count_as_running_and_hold_their_blocks() -> None:
    one = engine(max_num_seqs=2, num_gpu_blocks=5, **SLOW_LINK)
    one.submit(request("a", range(12), 2), is_remote=True)  # 3 blocks
    one.submit(request("b", range(50, 62), 1))  # 3 more
    assert one.step(0) is None
    assert (one.num_fetching, one.num_waiting) == (1, 1)
    assert one.cancel("a")
    one.check()
    assert ids(step(one).outputs) == ["b"]
    for name in "cde":
        one.submit(request(name, [ord(name)], 2), is_remote=True)
    assert one.step() is None
    assert (one.num_fetching, one.num_waiting) == (2, 1)


def test_what_a_transfer_evicts_is_told_before_it_ends() -> None:
    one = engine(num_gpu_blocks=3, **SLOW_LINK)
    said(one, request("a", range(8), 1))
    one.submit(request("b", range(50, 62), 1), is_remote=True)
    result = step(one)
    assert (result.duration_ms, result.outputs) == (0, [])
    assert result.kv_events == [BlockRemoved(9, 2, list(reversed(prompt_hashes(range(8), 4))))]
    assert one.step() is None


def test_a_transferred_request_that_is_preempted_is_computed_here() -> None:
    one = engine(num_gpu_blocks=5, **SLOW_LINK)
    one.submit(request("a", range(8), 5))
    step(one)
    one.submit(request("b", range(50, 58), 5), is_remote=True)
    step(one)
    assert one.num_fetching == 1
    outputs: list[StepOutput] = []
    computed = preempted = 0
    while one.request_ids():
        result = one.step(one.next_due_ms)
        assert result is not None
        one.check()
        outputs += result.outputs
        computed += result.prefill_tokens
        preempted += result.preempted
    answer = [token for each in outputs if each.request_id == "b" for token in each.token_ids]
    assert answer == said(engine(), request("b", range(50, 58), 5))[0]
    assert preempted and computed


@pytest.mark.parametrize(("name", "value"), [("kv_bytes_per_token", -1), ("kv_transfer_gbps", 0)])
def test_a_link_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        engine(**{name: value})
