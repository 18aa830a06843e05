"""The queue's keys on worked numbers, its answers at its bounds, and who starves otherwise."""

import math
from random import Random
from typing import NamedTuple

import pytest

from router.errors import QueueFull, QueueTimeout
from router.queue import (
    PATIENCE_RATIO,
    ParkedRequest,
    QueuePolicy,
    RequestQueue,
    all_prefill_busy,
    fcfs_key,
    priority_jump,
    wspt_key,
)

WAIT_MAX_S = 60.0
TOKENS_PER_S = 10_000
SHORT_TOKENS, LONG_TOKENS, LONG_EVERY_S = 512, 32_768, 60.0


def parked(
    request_id: str,
    arrived_s: float,
    tokens: int = 100,
    priority: float = 0.0,
    strict_priority: int = 0,
) -> ParkedRequest:
    return ParkedRequest(
        request_id=request_id,
        isl=tokens,
        uncached_tokens=tokens,
        arrived_s=arrived_s,
        priority=priority,
        strict_priority=strict_priority,
    )


def released(queue: RequestQueue, now_s: float) -> list[str]:
    return [queue.pop(now_s).request_id for _ in range(len(queue))]


def queue_of(policy: QueuePolicy, *requests: ParkedRequest) -> RequestQueue:
    queue = RequestQueue(policy, length_max=10, wait_max_s=WAIT_MAX_S)
    for request in requests:
        queue.push(request)
    return queue


def test_keys() -> None:
    assert fcfs_key(parked("a", 7.0, priority=3)) == -4.0
    assert wspt_key(parked("a", 7.0, tokens=400, priority=3)) == 0.01
    assert wspt_key(parked("a", 7.0, tokens=0)) == 1.0


@pytest.mark.parametrize("priority", [-1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_priority_changes_nothing(priority: float) -> None:
    assert priority_jump(priority) == 0


def test_fcfs_counts_a_priority_as_seconds_earlier() -> None:
    queue = queue_of(
        QueuePolicy.FCFS, parked("a", 0.0), parked("b", 2.0), parked("c", 3.0, priority=1.5)
    )
    assert released(queue, 4.0) == ["a", "c", "b"]


def test_wspt_takes_the_least_work_first_and_the_first_of_equals() -> None:
    queue = queue_of(
        QueuePolicy.WSPT,
        parked("long", 0.0, 32_768),
        parked("short", 1.0, 100),
        parked("as short", 2.0, 100),
        parked("heavy", 3.0, 300, priority=5),
    )
    assert released(queue, 4.0) == ["heavy", "short", "as short", "long"]


@pytest.mark.parametrize("policy", QueuePolicy)
def test_a_higher_tier_goes_before_any_key(policy: QueuePolicy) -> None:
    queue = queue_of(
        policy,
        parked("a", 0.0, 1, priority=1e9),
        parked("b", 1.0),
        parked("c", 50.0, 9999, strict_priority=5),
    )
    assert released(queue, 50.0)[0] == "c"


def test_impatience_is_paid_back_in_turn() -> None:
    """At 15 of 60 seconds the long prompts want to go first; after one of 300 tokens, 900 go in
    turn before the next."""
    queue = queue_of(
        QueuePolicy.WSPT,
        parked("long 1", 0.0, 300),
        parked("long 2", 0.0, 300),
        *(parked(f"short {number}", 15.0, 290) for number in range(5)),
    )
    assert queue.peek(WAIT_MAX_S * PATIENCE_RATIO - 0.1).request_id == "short 0"
    order = released(queue, WAIT_MAX_S * PATIENCE_RATIO)
    assert order == ["long 1", *(f"short {number}" for number in range(4)), "long 2", "short 4"]


def test_an_empty_queue_owes_nothing() -> None:
    queue = queue_of(QueuePolicy.WSPT, parked("long", 0.0, 300), parked("short", 15.0, 1))
    assert released(queue, 15.0) == ["long", "short"]
    queue.push(parked("long", 20.0, 300))
    queue.push(parked("short", 35.0, 1))
    assert released(queue, 35.0) == ["long", "short"]


def test_a_newcomer_of_equal_key_does_not_overtake() -> None:
    queue = queue_of(QueuePolicy.WSPT, parked("a", 0.0, 100))
    assert queue.must_wait(parked("b", 1.0, 100), 1.0)
    assert queue.must_wait(parked("b", 1.0, 101), 1.0)
    assert not queue.must_wait(parked("b", 1.0, 99), 1.0)
    assert not queue.must_wait(parked("b", 1.0, 101, strict_priority=1), 1.0)
    assert queue.must_wait(parked("b", 15.0, 1), 15.0), "someone has lost patience"
    assert queue.remove("a")
    assert not queue.must_wait(parked("b", 1.0, 100), 1.0)


def test_a_full_queue_says_so_and_an_old_request_is_handed_out() -> None:
    queue = RequestQueue(QueuePolicy.FCFS, length_max=1, wait_max_s=WAIT_MAX_S)
    queue.push(parked("a", 1.0))
    with pytest.raises(QueueFull, match="1 request waits for a worker already, and no more may"):
        queue.push(parked("b", 2.0))
    assert queue.deadline_s == 61.0
    assert queue.expired(60.9) == []
    assert [late.request_id for late in queue.expired(61.0)] == ["a"]
    assert queue.deadline_s is None
    assert str(QueueTimeout(60.04)) == "no worker had room for the request in 60.0 s"


def test_an_empty_queue_has_no_next() -> None:
    queue = queue_of(QueuePolicy.FCFS)
    for ask in (queue.peek, queue.pop):
        with pytest.raises(IndexError):
            ask(0.0)


@pytest.mark.parametrize(("length_max", "wait_max_s"), [(0, 1.0), (1, 0.0), (1, math.nan)])
def test_a_queue_without_room_is_refused(length_max: int, wait_max_s: float) -> None:
    with pytest.raises(ValueError):
        RequestQueue(QueuePolicy.FCFS, length_max=length_max, wait_max_s=wait_max_s)


def test_nobody_is_parked_while_a_rank_has_room() -> None:
    assert all_prefill_busy([11, 21], [10.0, 20.0])
    assert not all_prefill_busy([11, 20], [10.0, 20.0])
    assert all_prefill_busy([1, 1], [0.0, 0.0]), "threshold 0: any prefill is too much"
    assert not all_prefill_busy([99, 0], [0.0, 0.0]), "but an idle rank takes one"
    assert not all_prefill_busy([], [])
    with pytest.raises(ValueError):
        all_prefill_busy([1], [])


class Waits(NamedTuple):
    """Seconds, and how many waited for too long and were turned away."""

    short_mean_s: float
    long_max_s: float
    short_expired: int
    long_expired: int


def waits(policy: QueuePolicy, utilisation: float, hours: float, patience_s: float | None) -> Waits:
    """One worker that takes one prompt at a time, in virtual time, under steady arrivals."""
    rng = Random(1)
    end_s = hours * 3600
    shorts_per_s = (utilisation * TOKENS_PER_S - LONG_TOKENS / LONG_EVERY_S) / SHORT_TOKENS
    arrivals = [(LONG_EVERY_S * n, LONG_TOKENS) for n in range(1, int(end_s / LONG_EVERY_S))]
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(shorts_per_s)) < end_s:
        arrivals.append((now_s, round(rng.expovariate(1 / SHORT_TOKENS))))
    arrivals.sort(reverse=True)

    queue = RequestQueue(policy, length_max=100_000, wait_max_s=WAIT_MAX_S, patience_s=patience_s)
    short_s, long_s, expired = [0.0], [0.0], [0, 0]
    now_s = 0.0
    while arrivals or len(queue):
        if not len(queue):
            now_s = max(now_s, arrivals[-1][0])
        while arrivals and arrivals[-1][0] <= now_s:
            arrived_s, tokens = arrivals.pop()
            queue.push(parked(f"r{len(arrivals)}", arrived_s, tokens))
        for late in queue.expired(now_s):
            expired[late.isl == LONG_TOKENS] += 1
        if len(queue):
            next_one = queue.pop(now_s)
            waited_s = now_s - next_one.arrived_s
            (long_s if next_one.isl == LONG_TOKENS else short_s).append(waited_s)
            now_s += next_one.isl / TOKENS_PER_S
    return Waits(sum(short_s) / len(short_s), max(long_s), *expired)


def test_patience_bounds_starvation_and_keeps_short_prompts_fast() -> None:
    """The experiment of the module's docstring, shorter. At 95 %, the longest wait of a long prompt
    is little more than the patience. Beyond what the worker can do, long prompts are still served,
    and short ones do not fall back to what they wait under fcfs."""
    patience_s = WAIT_MAX_S * PATIENCE_RATIO
    starving = waits(QueuePolicy.WSPT, 0.95, 1.0, math.inf)
    bounded = waits(QueuePolicy.WSPT, 0.95, 1.0, None)
    assert starving.long_max_s > 3 * patience_s > 2 * bounded.long_max_s
    assert bounded.short_mean_s < 1.2 * starving.short_mean_s

    overloaded = {
        name: waits(policy, 1.1, 0.25, patience_s)
        for name, policy, patience_s in [
            ("fcfs", QueuePolicy.FCFS, None),
            ("starving", QueuePolicy.WSPT, math.inf),
            ("bounded", QueuePolicy.WSPT, None),
        ]
    }
    assert overloaded["bounded"].long_expired < overloaded["starving"].long_expired / 2
    assert overloaded["bounded"].short_mean_s < overloaded["fcfs"].short_mean_s / 4
