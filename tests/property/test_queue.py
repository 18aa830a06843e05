"""The queue against a plain list that is sorted whenever someone asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.errors import QueueFull
from router.queue import (
    IN_TURN_RATIO,
    ParkedRequest,
    QueuePolicy,
    RequestQueue,
    all_prefill_busy,
    fcfs_key,
    wspt_key,
)

LENGTH_MAX = 6
WAIT_MAX_S = 40.0
PATIENCE_S = 10.0

lengths = st.sampled_from([0, 1, 100, 101, 32_768])
priorities = st.sampled_from([0.0, -3.0, 0.5, 3.0, 1e300, float("nan"), float("inf")])
tiers = st.sampled_from([0, 0, 0, 1, 5])


class QueueMachine(RuleBasedStateMachine):
    """Requests come, give up, expire and are released while time goes on."""

    @initialize(policy=st.sampled_from(QueuePolicy))
    def start(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.queue = RequestQueue(
            policy, length_max=LENGTH_MAX, wait_max_s=WAIT_MAX_S, patience_s=PATIENCE_S
        )
        self.now_s = 0.0
        self.inside: list[ParkedRequest] = []
        """In the order in which they came."""
        self.owed_tokens = 0
        self.pushed = self.popped = self.removed = self.expired = 0

    def is_impatient(self, parked: ParkedRequest) -> bool:
        waited_s = self.now_s - parked.arrived_s
        return self.policy is QueuePolicy.WSPT and waited_s >= PATIENCE_S

    def in_turn(self) -> ParkedRequest:
        """By tier and key, of equals the one that came first."""
        key = fcfs_key if self.policy is QueuePolicy.FCFS else wspt_key
        return max(self.inside, key=lambda parked: (parked.strict_priority, key(parked)))

    def impatient(self) -> list[ParkedRequest]:
        tier = max(parked.strict_priority for parked in self.inside)
        return [p for p in self.inside if p.strict_priority == tier and self.is_impatient(p)]

    def head(self) -> ParkedRequest:
        impatient = self.impatient()
        return impatient[0] if impatient and not self.owed_tokens else self.in_turn()

    def pop(self) -> None:
        expected, in_turn = self.head(), self.in_turn()
        assert self.queue.peek(self.now_s) is expected
        assert self.queue.pop(self.now_s) is expected
        self.inside.remove(expected)
        self.popped += 1
        tokens = max(1, expected.uncached_tokens)
        if expected is in_turn:
            self.owed_tokens -= min(tokens, self.owed_tokens)
        else:
            self.owed_tokens = IN_TURN_RATIO * tokens
        self.forget_debt()

    def forget_debt(self) -> None:
        if not self.inside:
            self.owed_tokens = 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 12.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(cached=lengths, uncached=lengths, priority=priorities, tier=tiers)
    def come(self, cached: int, uncached: int, priority: float, tier: int) -> None:
        """Who need not wait goes first when parked, and overtakes nobody who lost patience."""
        newcomer = ParkedRequest(
            request_id=f"r{self.pushed}",
            isl=cached + uncached,
            uncached_tokens=uncached,
            arrived_s=self.now_s,
            priority=priority,
            strict_priority=tier,
        )
        must_wait = self.queue.must_wait(newcomer, self.now_s)
        waiting = self.impatient() if self.inside else []
        if len(self.inside) == LENGTH_MAX:
            with pytest.raises(QueueFull):
                self.queue.push(newcomer)
            return
        self.queue.push(newcomer)
        self.pushed += 1
        self.inside.append(newcomer)
        outranked = waiting and waiting[0].strict_priority >= tier
        assert must_wait == (bool(outranked) or self.in_turn() is not newcomer)
        with pytest.raises(ValueError):
            self.queue.push(newcomer)

    @precondition(lambda self: self.inside)
    @rule()
    def release(self) -> None:
        """By key, or out of turn when someone's patience ended and nothing is owed."""
        self.pop()

    @rule(number=st.integers(0, 20))
    def give_up(self, number: int) -> None:
        request_id = f"r{number}"
        rest = [parked for parked in self.inside if parked.request_id != request_id]
        assert self.queue.remove(request_id) == (len(rest) < len(self.inside))
        self.removed += len(self.inside) - len(rest)
        self.inside = rest
        self.forget_debt()

    @rule()
    def expire(self) -> None:
        """Exactly those go that have waited for long enough."""
        late = [parked for parked in self.inside if self.now_s - parked.arrived_s >= WAIT_MAX_S]
        assert self.queue.expired(self.now_s) == late
        self.inside = [parked for parked in self.inside if parked not in late]
        self.expired += len(late)
        self.forget_debt()

    @invariant()
    def agrees(self) -> None:
        """What was pushed has gone one way or is still there, and the sums are of what is there."""
        queue, inside = self.queue, self.inside
        queue.check()
        assert self.pushed == self.popped + self.removed + self.expired + len(queue)
        assert len(queue) == len(inside) and all(p.request_id in queue for p in inside)
        assert queue.isl_tokens == sum(p.isl for p in inside)
        assert queue.cached_tokens == sum(p.isl - p.uncached_tokens for p in inside)
        oldest = min((p.arrived_s for p in inside), default=None)
        assert queue.deadline_s == (None if oldest is None else oldest + WAIT_MAX_S)

    def teardown(self) -> None:
        """It can be emptied, in the order that the list says."""
        while getattr(self, "inside", None):
            self.pop()
        assert not hasattr(self, "queue") or len(self.queue) == 0


TestQueue = QueueMachine.TestCase


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 2), st.sampled_from([1, 10, 20]))))
def test_park_when_all_are_above_their_caps(ranks: list[tuple[int, float, int]]) -> None:
    """Equal is free, an idle rank is always free, and no candidates are nothing to wait for."""
    tokens = [tokens for tokens, _, _ in ranks]
    caps = [threshold * batched for _, threshold, batched in ranks]
    park = all_prefill_busy(tokens, caps)
    assert park == (ranks != [] and not any(t <= cap for t, cap in zip(tokens, caps, strict=True)))
    assert not (park and 0 in tokens)


@given(
    st.integers(1, 1000),
    st.lists(st.integers(0, 99), min_size=1, max_size=8),
    st.lists(st.integers(0, 99), min_size=200, max_size=200),
)
def test_waiting_is_bounded_under_wspt(longest: int, others: list[int], shorts: list[int]) -> None:
    """Whatever shorter prompts keep coming, of the tokens released after a long prompt has lost
    its patience at most `IN_TURN_RATIO` go in turn for each of those that came before it."""
    queue = RequestQueue(QueuePolicy.WSPT, length_max=500, wait_max_s=1e9, patience_s=PATIENCE_S)
    for number, uncached_tokens in enumerate([*others, 100 + longest]):
        queue.push(
            ParkedRequest(
                request_id=f"old{number}",
                isl=uncached_tokens,
                uncached_tokens=uncached_tokens,
                arrived_s=float(number),
            )
        )
    last, now_s = f"old{len(others)}", len(others) + PATIENCE_S
    ahead = 0
    for number, uncached_tokens in enumerate(shorts):
        queue.push(
            ParkedRequest(
                request_id=f"new{number}",
                isl=uncached_tokens,
                uncached_tokens=uncached_tokens,
                arrived_s=now_s,
            )
        )
        parked = queue.pop(now_s)
        if parked.request_id == last:
            break
        ahead += max(1, parked.uncached_tokens)
        # Each of the others, what is owed for it, and the one that paid the last of that.
        assert ahead <= sum((1 + IN_TURN_RATIO) * max(1, tokens) + 99 for tokens in others)
