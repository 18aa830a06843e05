"""Comparing router configurations in virtual time: what one run measures, by hand."""

from collections import OrderedDict
from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from eventstore.events import AnyEvent, OutputGrown, PrefillCompleted
from indexer.blocks import prompt_hashes
from router.cost import predict_ms
from router.decision import RouterOptions
from router.selection import RouterMode
from router.state import RouterState
from simulations.compare_fleet import ARRIVAL, STEP_BEGIN, STEP_END, Clock, Fleet, prompt_tokens
from simulations.compare_run import Comparison, Result, Run, counted_spread_ms
from simulations.generate import TrafficOptions, generate
from simulations.trace import TraceRequest

ROUND_ROBIN = RouterOptions(mode=RouterMode.ROUND_ROBIN)
KV = RouterOptions(mode=RouterMode.KV)
BLOCK = 64


def request(at_ms: int, isl: int, osl: int, ids: Sequence[int] | None = None) -> TraceRequest:
    """Its blocks are its own unless `ids` says which."""
    if ids is None:
        ids = [1_000_000 * (at_ms + 1) + isl + index for index in range(-(-isl // 512))]
    return TraceRequest(timestamp_ms=at_ms, input_length=isl, output_length=osl, hash_ids=list(ids))


def run(
    requests: Sequence[TraceRequest],
    fleet: Fleet,
    options: RouterOptions = ROUND_ROBIN,
    speed: float = 1.0,
) -> Run:
    return Comparison(requests, fleet, options, Random(1), speed=speed).run()


def result_of(requests: Sequence[TraceRequest], fleet: Fleet, speed: float = 1.0) -> Result:
    return run(requests, fleet, speed=speed).result


def prefill_ms(tokens: int) -> float:
    return 4.209989e-07 * tokens**2 + 0.01518344 * tokens + 16.50142


def decode_ms(blocks: int, total: int = 16_384) -> float:
    return 5.74 + 54.01 * blocks / total - 25.74 * (blocks / total) ** 2


def about(milliseconds: float) -> object:
    return pytest.approx(milliseconds, abs=0.002)


# --- times ----------------------------------------------------------------------------------------


def test_a_request_alone_takes_one_prefill_and_a_decode_step_a_token() -> None:
    found = result_of([request(5, 100, 3)], Fleet(workers=1))
    assert found.ttft_ms.mean == about(prefill_ms(100))
    assert found.itl_ms.mean == found.itl_ms.p99 == about(decode_ms(2))
    assert found.latency_ms.p50 == about(prefill_ms(100) + 2 * decode_ms(2))
    assert found.queue_wait_ms.mean == 0
    assert (found.requests, found.errors, found.imbalance) == (1, 0, 1.0)


def test_requests_of_one_moment_share_their_first_step() -> None:
    found = run([request(0, 100, 1), request(0, 200, 1)], Fleet(workers=1))
    assert found.ttft_ms == [about(prefill_ms(300)), about(prefill_ms(300))]


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    found = run([request(0, 8_192, 1), request(100, 100, 1)], Fleet(workers=1))
    second = prefill_ms(8_192) - 100 + prefill_ms(100)
    assert found.ttft_ms == [about(second), about(prefill_ms(8_192))]


def test_who_decodes_beside_a_prefill_waits_for_both() -> None:
    first, second = request(0, 64, 3), request(20, 1_000, 1)
    found = run([first, second], Fleet(workers=1)).result
    # 1 + 2 blocks when the first decodes alone; the other's 16 beside it.
    alone, beside = decode_ms(2), decode_ms(2 + 16)
    assert found.itl_ms.mean == about((alone + beside + prefill_ms(1_000)) / 2)


def test_twice_the_speed_halves_the_time_between_arrivals() -> None:
    requests = [request(0, 8_192, 1), request(200, 100, 1)]
    assert min(run(requests, Fleet(workers=1)).ttft_ms) == about(prefill_ms(100))
    found = run(requests, Fleet(workers=1), speed=2.0)
    assert min(found.ttft_ms) == about(prefill_ms(8_192) - 100 + prefill_ms(100))


def test_slow_workers_are_the_last_ones() -> None:
    fleet = Fleet(workers=2, slow_workers=1, slow_factor=3)
    found = run([request(0, 100, 1), request(5_000, 100, 1)], fleet)
    assert found.ttft_ms == [about(prefill_ms(100)), about(3 * prefill_ms(100))]


# --- the queue, and what the router is told of progress ------------------------------------------


def test_a_request_waits_in_the_queue_until_a_worker_has_room() -> None:
    """More than a batch is ahead when the second comes, and nothing once the first is served."""
    options = RouterOptions(mode=RouterMode.ROUND_ROBIN, queue_threshold=1.0)
    found = run([request(0, 8_193, 1), request(10, 100, 1)], Fleet(workers=1), options)
    first = prefill_ms(8_192) + prefill_ms(1)
    assert found.ttft_ms == [about(first), about(first - 10 + prefill_ms(100))]
    assert found.result.queue_wait_ms.mean == about((first - 10) / 2)
    assert found.result.errors == 0


def test_who_waits_too_long_or_finds_no_place_to_wait_is_an_error() -> None:
    def options(**bounds: float) -> RouterOptions:
        values = {"mode": RouterMode.ROUND_ROBIN, "queue_threshold": 1.0} | bounds
        return msgspec.convert(values, RouterOptions, strict=False)

    requests = [request(0, 8_193, 1), request(10, 100, 1), request(20, 100, 1)]
    late = run(requests, Fleet(workers=1), options(queue_wait_max_secs=0.1)).result
    assert (late.errors, late.queue_wait_ms.p99) == (2, 0)
    full = run(requests, Fleet(workers=1), options(queue_len_max=1)).result
    assert full.errors == 1


def test_a_queue_of_several_lets_them_go_in_order() -> None:
    options = RouterOptions(mode=RouterMode.KV, queue_threshold=0.0)
    found = run([request(0, 100, 1, [n]) for n in range(4)], Fleet(workers=1), options)
    assert found.ttft_ms == [about((turn + 1) * prefill_ms(100)) for turn in range(4)]


class Told(Comparison):
    """A run, and what the router's log has of it."""

    def __init__(self, requests: Sequence[TraceRequest], options: RouterOptions) -> None:
        super().__init__(requests, Fleet(workers=1), options, Random(1))
        self.events: list[AnyEvent] = []
        observe = self._log.observe

        def also_keep(events: list[AnyEvent]) -> None:
            self.events += events
            observe(events)

        self._log.observe = also_keep

    @property
    def state(self) -> RouterState:
        return self._log.state


def test_output_is_told_while_it_grows_if_it_is_tracked() -> None:
    for tracked, grown in ((True, 3), (False, 0)):
        options = RouterOptions(mode=RouterMode.KV, track_output_blocks=tracked)
        told = Told([request(0, 60, 140)], options)
        told.run()
        assert sum(isinstance(event, OutputGrown) for event in told.events) == grown


def test_the_times_of_a_worker_are_learned() -> None:
    told = Told([request(1_000 * turn, 100 * turn + 64, 2) for turn in range(30)], KV)
    told.run()
    first = next(event for event in told.events if isinstance(event, PrefillCompleted))
    assert first.ttft_ms == about(prefill_ms(64))
    learned = told.state.prefill_models[1]
    assert predict_ms(learned, 1_000) == pytest.approx(prefill_ms(1_000), rel=0.03)
    assert learned.deviation < 0.5


# --- caches and load ------------------------------------------------------------------------------


def test_a_prompt_that_was_served_is_cached_but_for_its_last_token() -> None:
    found = result_of(
        [request(0, 1_024, 1, [0, 1]), request(5_000, 1_024, 1, [0, 1])], Fleet(workers=1)
    )
    assert found.cached_share == round(1_023 / 2_048, 6)
    assert found.predicted_share == 0.5


def test_the_router_knows_of_a_cache_only_after_the_delay_of_events() -> None:
    fleet = Fleet(workers=1, event_delay_ns=20_000_000_000)
    times = (0, 5_000, 30_000)
    found = result_of([request(at, 1_024, 1, [0, 1]) for at in times], fleet)
    assert found.cached_share == round(2 * 1_023 / 3_072, 6)
    assert found.predicted_share == round(1_024 / 3_072, 6)
    assert found.duration_s == pytest.approx(30, abs=0.1)


def test_imbalance_is_the_most_computed_tokens_over_the_mean() -> None:
    found = result_of([request(0, 1_000, 1), request(0, 500, 1)], Fleet(workers=2))
    assert [worker.computed_tokens for worker in found.workers] == [1_001, 501]
    assert [worker.requests for worker in found.workers] == [1, 1]
    assert found.imbalance == round(1_001 / 751, 6)
    assert found.workers[0].busy_share == 1.0


def test_what_no_engine_can_hold_is_an_error_and_counts_in_nothing_else() -> None:
    found = result_of([request(0, 400, 1), request(1, 100, 1)], Fleet(workers=1, blocks=4))
    assert (found.requests, found.errors) == (2, 1)
    assert found.ttft_ms.mean == about(prefill_ms(100))


def test_kv_sends_a_prompt_to_its_cache_and_round_robin_does_not() -> None:
    requests = [request(at * 5_000, 2_048, 1, [0, 1, 2, 3]) for at in range(4)]
    fleet = Fleet(workers=4)
    assert run(requests, fleet, ROUND_ROBIN).result.cached_share == 0
    assert run(requests, fleet, KV).result.cached_share == round(3 * 2_047 / 8_192, 6)


def naive_cached_tokens(requests: Sequence[TraceRequest], workers: int, blocks: int) -> int:
    """Prompt tokens found in per-worker LRU caches, if each request ends before the next comes."""
    caches: list[OrderedDict[tuple[int, ...], None]] = [OrderedDict() for _ in range(workers)]
    cached_tokens = 0
    for number, each in enumerate(requests):
        cache = caches[number % workers]
        computed = each.input_length + each.output_length - 1
        prompt_blocks = each.input_length // BLOCK
        names = [
            (*each.hash_ids[: index * BLOCK // 512 + 1], index)
            if index < prompt_blocks
            else (-1, number, index)
            for index in range(computed // BLOCK)
        ]
        hits = 0
        while hits < prompt_blocks and names[hits] in cache:
            hits += 1
        cached_tokens += min(hits * BLOCK, each.input_length - 1)
        for name in names[:hits]:
            del cache[name]  # in use, so not to be evicted
        while len(cache) + -(-computed // BLOCK) > blocks:
            cache.popitem(last=False)
        for name in reversed(names):
            cache.pop(name, None)
            cache[name] = None
    return cached_tokens


@pytest.mark.parametrize("blocks", [1_024, 16_384])
def test_round_robin_reuses_what_a_naive_lru_cache_would(blocks: int) -> None:
    traffic = TrafficOptions(duration_s=400, sessions_per_s=0.4, output_tokens_median=50)
    requests = generate(traffic, Random(3))[:300]
    assert len(requests) == 300
    total = sum(each.input_length for each in requests)
    expected = naive_cached_tokens(requests, 3, blocks) / total
    assert expected > 0.05
    found = result_of(requests, Fleet(workers=3, blocks=blocks), speed=0.001)
    assert found.cached_share == round(expected, 6)


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [KV, RouterOptions(mode=RouterMode.KV, temperature=0.5)])
def test_equal_arguments_give_equal_bytes(options: RouterOptions) -> None:
    requests = generate(TrafficOptions(duration_s=20, sessions_per_s=2), Random(5))
    fleet = Fleet(workers=3, blocks=512, event_delay_ns=2_000_000)
    first, second = (msgspec.json.encode(run(requests, fleet, options)) for _ in range(2))
    assert first == second


def test_a_moment_has_an_order() -> None:
    clock, seen = Clock(), list[str]()
    for name, kind in (("begin", STEP_BEGIN), ("arrival", ARRIVAL), ("end", STEP_END)):
        clock.at(7, kind, lambda name=name: seen.append(name))  # type: ignore[misc]
    clock.at(3, ARRIVAL, lambda: seen.append("early"))
    clock.run()
    assert seen == ["early", "end", "arrival", "begin"]
    assert clock.now_ns == 7


def test_prompts_agree_up_to_their_first_different_block() -> None:
    first, second = (
        prompt_hashes(prompt_tokens(ids, 1_500), BLOCK) for ids in ([0, 1, 2], [0, 3, 2])
    )
    assert first[:8] == second[:8]
    assert not set(first[8:]) & set(second[8:])
    assert len(prompt_tokens([9], 5)) == 5


def test_a_counted_spread_is_that_of_the_sample() -> None:
    found = counted_spread_ms({1_000: 98, 2_000: 1, 5_000: 1})
    assert (found.p50, found.p90, found.p99, found.mean) == (1.0, 1.0, 2.0, 1.05)
    assert counted_spread_ms({}).mean is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"blocks": 0},
        {"block_size": 100},
        {"slow_workers": 9},
        {"slow_factor": 0},
        {"event_delay_ns": -1},
    ],
)
def test_a_fleet_says_what_is_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fleet(**wrong)


def test_progress_is_told_for_every_request() -> None:
    ended: list[int] = []
    requests = [request(0, 400, 1), request(1, 100, 2)]
    fleet = Fleet(workers=1, blocks=4)
    Comparison(requests, fleet, ROUND_ROBIN, Random(0), on_ended=lambda: ended.append(1)).run()
    assert len(ended) == 2


def test_traces_on_disk_need_not_count_their_blocks_from_zero() -> None:
    odd = [request(0, 1_000, 1, [-5, 2**70]), request(5_000, 1_000, 1, [-5, 2**70])]
    plain = [request(0, 1_000, 1, [0, 1]), request(5_000, 1_000, 1, [0, 1])]
    assert run(odd, Fleet(workers=1)) == run(plain, Fleet(workers=1))
