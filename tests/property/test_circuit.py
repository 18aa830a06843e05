"""The circuit breaker under any order of sending, failing, working and waiting."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.circuit import JITTER_RATIO, CircuitBreaker

WORKERS = [1, 2, 3]
FAILURES_MAX = 3
WINDOW_S = 30.0
FIRST_S, MAX_S = 1.0, 8.0

workers = st.sampled_from(WORKERS)


class BreakerMachine(RuleBasedStateMachine):
    """What follows from the history of each worker alone, kept in plain lists."""

    @initialize(jitter=st.floats(0, 1, exclude_max=True))
    def start(self, jitter: float) -> None:
        self.breaker = CircuitBreaker(
            jitter=lambda: jitter,
            failures_max=FAILURES_MAX,
            window_s=WINDOW_S,
            backoff_first_s=FIRST_S,
            backoff_max_s=MAX_S,
        )
        self.now_s = 0.0
        self.failed: dict[int, list[float]] = {worker: [] for worker in WORKERS}
        """When it failed since it last worked."""
        self.spells: dict[int, list[tuple[float, float]]] = {worker: [] for worker in WORKERS}
        """(from, to) of each time it was set aside since it last worked."""
        self.trials: dict[int, list[float]] = {worker: [] for worker in WORKERS}
        """When trials were sent since it was last set aside."""

    def aside(self) -> frozenset[int]:
        return self.breaker.set_aside(self.now_s)

    @rule(seconds=st.sampled_from([0.0, 0.4, 1.0, 3.0, 9.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(worker=workers)
    def send(self, worker: int) -> None:
        """Between two trials lies a back-off, and the first follows the time aside."""
        trial = self.breaker.sent(worker, self.now_s)
        spells, trials = self.spells[worker], self.trials[worker]
        if not spells:
            assert not trial
        if trial:
            assert self.now_s >= spells[-1][1]
            backoff_s = min(FIRST_S * 2 ** (len(spells) - 1), MAX_S)
            assert not trials or self.now_s >= trials[-1] + backoff_s
            trials.append(self.now_s)
            assert worker in self.aside()

    @rule(worker=workers)
    def fail(self, worker: int) -> None:
        """Set aside after enough failures in a row, then twice as long with every further one."""
        was_aside, on_trial = worker in self.aside(), bool(self.trials[worker])
        spells = self.spells[worker]
        news = self.breaker.failure(worker, self.now_s)
        if spells and was_aside and not on_trial:
            assert news is None, "late failures say nothing new"
            return
        failed = self.failed[worker]
        if not spells and failed and self.now_s - failed[-1] > WINDOW_S:
            failed.clear()
        failed.append(self.now_s)
        assert (news is not None) == (bool(spells) or len(failed) >= FAILURES_MAX)
        if news is not None:
            longest_s = min(FIRST_S * 2 ** len(spells), MAX_S)
            assert longest_s * (1 - JITTER_RATIO) <= news.for_s <= longest_s
            assert (news.worker_id, news.failures) == (worker, len(failed))
            spells.append((self.now_s, self.now_s + news.for_s))
            self.trials[worker].clear()

    @rule(worker=workers, leaves=st.booleans())
    def work(self, worker: int, leaves: bool) -> None:
        """A success closes the circuit; so does leaving, should the id come back."""
        if leaves:
            self.breaker.forget(worker)
        else:
            self.breaker.success(worker)
        self.failed[worker], self.spells[worker], self.trials[worker] = [], [], []
        assert worker not in self.aside()

    @invariant()
    def never_for_ever(self) -> None:
        """Whatever happened, after the longest back-off everyone gets a request; and only a worker
        that has failed often enough is ever aside."""
        if not hasattr(self, "breaker"):
            return
        assert self.breaker.set_aside(self.now_s + MAX_S) == frozenset()
        assert all(self.spells[worker] for worker in self.aside())

    @invariant()
    def what_is_shown_is_what_holds(self) -> None:
        if not hasattr(self, "breaker"):
            return
        shown = self.breaker.spells(self.now_s)
        assert [each.worker_id for each in shown] == sorted(self.aside())
        assert all(0 < each.for_s <= MAX_S for each in shown)


TestBreaker = BreakerMachine.TestCase


@given(st.integers(1, 6), st.integers(1, 20))
def test_half_open_lets_one_request_through(failures_max: int, requests: int) -> None:
    """Of many requests that come at once after the back-off, the first is a trial, and the others
    find the worker set aside."""
    breaker = CircuitBreaker(jitter=lambda: 0.5, failures_max=failures_max)
    news = [breaker.failure(7, 0.0) for _ in range(failures_max)][-1]
    assert news is not None
    went = 0
    for _ in range(requests):
        if 7 not in breaker.set_aside(news.for_s):
            went += breaker.sent(7, news.for_s)
    assert went == 1
