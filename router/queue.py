"""The queue of one model and role in one frontend: requests parked until a worker has room.

Who goes first, highest key first:

    fcfs   priority_jump - arrival time                         first come, first served
    wspt   (1 + priority_jump) / max(1, uncached tokens)        weighted shortest prefill

with priority_jump = max(0, priority) in seconds (the peer's router, its scheduling policy of spring
2026). A higher `strict_priority` goes before any key, and of equals the one that came first.

Keys are computed once. An fcfs key needs no more, as whoever comes later has a lower one. Under
wspt a long prompt would wait for as long as short ones keep coming. Hence the *patience*: of those
of the highest tier that have waited for so long, the oldest goes before every key. After it,
`IN_TURN_RATIO` times its tokens are released in turn before the next goes out of turn: where more
comes than the workers can do, everyone loses patience, and without this the order would be that of
fcfs. Between tiers there is no patience: that the higher goes first is what they are for.

Measured over three hours of one worker at 10,000 prompt tokens a second, with short prompts of 512
on average and one of 32,768 each minute, all of them together at 95 or 110 % of what it can do. No
wait was allowed beyond 60 s, so the patience is 15 s (`tests/unit/test_queue.py`):

                                     at 95 %                at 110 %
                               short, mean  long, most  short, mean  turned away, of 220,000 + 179
    fcfs                          1.6 s        7 s         57 s         19,041 short     12 long
    wspt without patience         0.5 s      > 60 s         0.5 s        1,916 short    163 long
    always the impatient first    0.5 s       15 s         57 s         19,041 short     12 long
    wspt as it is                 0.5 s       26 s          4 s          5,277 short     30 long

The queue knows no clock; times are seconds of the caller's own monotonic one.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from operator import gt
from typing import NamedTuple

from msgspec import Struct
from sortedcontainers import SortedKeyList, SortedList

from router.errors import QueueFull

PATIENCE_RATIO = 0.25
"""Patience under wspt, as a share of the longest wait that the queue allows."""
IN_TURN_RATIO = 3
"""Tokens that go in turn for each that went out of turn: the impatient get a quarter at most."""


class QueuePolicy(StrEnum):
    FCFS = "fcfs"
    WSPT = "wspt"


class ParkedRequest(Struct, frozen=True, kw_only=True):
    """A request that waits.

    isl, uncached_tokens: of its prompt, the latter on the best worker when it came. priority: in
    seconds, counted as `priority_jump` says. strict_priority: its tier, from 0. token: whatever the
    caller needs to go on with it; the queue does not look at it.
    """

    request_id: str
    isl: int
    uncached_tokens: int
    arrived_s: float
    priority: float = 0.0
    strict_priority: int = 0
    token: object = None


def priority_jump(priority: float) -> float:
    """Seconds by which a request counts as having come earlier; 0 for what is no finite number."""
    return max(0.0, priority) if math.isfinite(priority) else 0.0


def fcfs_key(parked: ParkedRequest) -> float:
    return priority_jump(parked.priority) - parked.arrived_s


def wspt_key(parked: ParkedRequest) -> float:
    return (1 + priority_jump(parked.priority)) / max(1, parked.uncached_tokens)


KEYS = {QueuePolicy.FCFS: fcfs_key, QueuePolicy.WSPT: wspt_key}


def all_prefill_busy(prefill_tokens: Sequence[int], caps: Sequence[float]) -> bool:
    """Whether a request must wait: every candidate's active prefill tokens are above its cap.

    prefill_tokens, caps: parallel, one item a rank; caps as `router.busy.prefill_cap` says. At its
    cap a rank has room, so an idle one always has. False for no candidates: there is nothing to
    wait for. Up to 30 ns a rank.
    """
    if len(prefill_tokens) != len(caps):
        raise ValueError(f"{len(prefill_tokens)} ranks, but {len(caps)} caps")
    return bool(prefill_tokens) and all(map(gt, prefill_tokens, caps))


class _Entry(NamedTuple):
    """A place in the queue, ordered as its requests go: what is less goes first."""

    tier: int
    """Minus the strict priority."""
    key: float
    """Minus the policy's key."""
    arrived_s: float
    number: int
    parked: ParkedRequest


class RequestQueue:
    """Parked requests, in the order of their release. Every change is O(log n).

    Bounds: `length_max` requests, and `wait_max_s` for each of them, after which `expired` hands it
    out. patience_s: under wspt only, as above; None: PATIENCE_RATIO of `wait_max_s`.
    """

    def __init__(
        self,
        policy: QueuePolicy,
        *,
        length_max: int,
        wait_max_s: float,
        patience_s: float | None = None,
    ) -> None:
        if length_max < 1 or not wait_max_s > 0:
            raise ValueError(f"no room in a queue of {length_max} requests for {wait_max_s} s")
        self.length_max = length_max
        self.wait_max_s = wait_max_s
        self.isl_tokens = 0
        """Sum of the prompts that wait."""
        self.cached_tokens = 0
        """What the best workers had of them when they came."""
        if policy is QueuePolicy.FCFS:
            patience_s = math.inf
        elif patience_s is None:
            patience_s = wait_max_s * PATIENCE_RATIO
        self._patience_s = patience_s
        self._owed_tokens = 0
        """To be released in turn before the next request is released out of turn."""
        self._key = KEYS[policy]
        self._pushed = 0
        self._entries: dict[str, _Entry] = {}
        self._by_key: SortedList[_Entry] = SortedList()
        self._by_tier: SortedKeyList[_Entry] = SortedKeyList(
            key=lambda entry: (entry.tier, entry.arrived_s, entry.number)
        )
        self._by_arrival: SortedKeyList[_Entry] = SortedKeyList(
            key=lambda entry: (entry.arrived_s, entry.number)
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def deadline_s(self) -> float | None:
        """When the next request expires; None for an empty queue."""
        return self._by_arrival[0].arrived_s + self.wait_max_s if self._entries else None

    def must_wait(self, newcomer: ParkedRequest, now_s: float) -> bool:
        """Whether going straight through would overtake someone.

        It would not if the queue is empty, or if nobody has lost patience and the newcomer's key is
        better than any. Changes nothing.
        """
        if not self._entries:
            return False
        first, oldest, tier = self._by_key[0], self._by_tier[0], -newcomer.strict_priority
        if tier != first.tier:
            return bool(tier > first.tier)
        return self._is_impatient(oldest, now_s) or bool(-self._key(newcomer) >= first.key)

    def push(self, parked: ParkedRequest) -> None:
        """Park a request. Raises QueueFull; ValueError if it is parked already."""
        if parked.request_id in self._entries:
            raise ValueError(f"request {parked.request_id} is already parked")
        if len(self._entries) >= self.length_max:
            raise QueueFull(self.length_max)
        self._pushed += 1
        key = -self._key(parked)
        entry = _Entry(-parked.strict_priority, key, parked.arrived_s, self._pushed, parked)
        self._entries[parked.request_id] = entry
        for order in (self._by_key, self._by_tier, self._by_arrival):
            order.add(entry)
        self.isl_tokens += parked.isl
        self.cached_tokens += parked.isl - parked.uncached_tokens

    def peek(self, now_s: float) -> ParkedRequest:
        """The request that goes next. IndexError if none waits. O(1)."""
        return self._head(now_s).parked

    def pop(self, now_s: float) -> ParkedRequest:
        """Take out the request that goes next. IndexError if none waits."""
        head = self._head(now_s)
        tokens = max(1, head.parked.uncached_tokens)
        if head is self._by_key[0]:
            self._owed_tokens = max(0, self._owed_tokens - tokens)
        else:
            self._owed_tokens = IN_TURN_RATIO * tokens
        return self._take(head)

    def remove(self, request_id: str) -> bool:
        """Take out a request that gave up. False if it is not parked."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        self._take(entry)
        return True

    def expired(self, now_s: float) -> list[ParkedRequest]:
        """Take out those that have waited for `wait_max_s`, the oldest first."""
        late = []
        while (deadline_s := self.deadline_s) is not None and deadline_s <= now_s:
            late.append(self._take(self._by_arrival[0]))
        return late

    def check(self) -> None:
        """Assert that the orders and the sums agree with the requests."""
        inside = sorted(self._entries.values())
        assert len(inside) <= self.length_max
        assert list(self._by_key) == inside
        assert sorted(self._by_tier) == inside and sorted(self._by_arrival) == inside
        assert self.isl_tokens == sum(entry.parked.isl for entry in inside)
        uncached = sum(entry.parked.uncached_tokens for entry in inside)
        assert self.cached_tokens == self.isl_tokens - uncached

    def _head(self, now_s: float) -> _Entry:
        first: _Entry = self._by_key[0]
        # Of the same tier, as both orders begin with the highest.
        oldest: _Entry = self._by_tier[0]
        return oldest if not self._owed_tokens and self._is_impatient(oldest, now_s) else first

    def _is_impatient(self, entry: _Entry, now_s: float) -> bool:
        return now_s >= entry.arrived_s + self._patience_s

    def _take(self, entry: _Entry) -> ParkedRequest:
        parked = entry.parked
        del self._entries[parked.request_id]
        for order in (self._by_key, self._by_tier, self._by_arrival):
            order.remove(entry)
        self.isl_tokens -= parked.isl
        self.cached_tokens -= parked.isl - parked.uncached_tokens
        if not self._entries:
            self._owed_tokens = 0
        return parked
