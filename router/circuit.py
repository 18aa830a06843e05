"""Setting aside workers that fail again and again, for a while and never for good.

One frontend's own experience with each worker:

    closed     requests go there; `failures_max` failures in a row open it
    open       set aside for the back-off: 1 s, doubled with every further failure up to 60 s
    half-open  the back-off is over: the next request is let through as a trial, one at a time

A success closes the circuit from any state, and the worker is as good as new. A trial of which
nothing is heard, as when its client goes away, is followed by another one a back-off later.

Liveness is not judged here: a worker whose lease ends leaves by the log.
"""

from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct

CIRCUITS_MAX = 4096
"""Failing workers remembered. Beyond, the one whose last failure is the longest ago is forgotten:
without a bound, requests that end after their worker was forgotten would leave one each."""
JITTER_RATIO = 0.25
"""A back-off is shortened by up to this share, so that frontends do not all try at once."""


class SetAside(Struct, frozen=True):
    """A worker gets no requests for `for_s` seconds, after `failures` failures in a row."""

    worker_id: int
    failures: int
    for_s: float


class _Circuit(Struct):
    """One failing worker. What follows `failed_s` is of open circuits only."""

    failures: int
    """In a row."""
    failed_s: float
    """When the last of them was."""
    backoff_s: float = 0.0
    until_s: float = 0.0
    """Set aside until then; half-open from then on."""
    on_trial: bool = False


class CircuitBreaker:
    """Which workers to leave alone. Times are seconds of the caller's monotonic clock.

    A failure more than `window_s` after the one before it begins a new count. jitter: draws from
    0 … 1, 1 excluded. A worker without failures costs nothing.
    """

    def __init__(
        self,
        *,
        jitter: Callable[[], float],
        failures_max: int = 5,
        window_s: float = 60.0,
        backoff_first_s: float = 1.0,
        backoff_max_s: float = 60.0,
    ) -> None:
        if failures_max < 1 or not 0 < backoff_first_s <= backoff_max_s:
            raise ValueError(f"{failures_max} failures, {backoff_first_s} to {backoff_max_s} s")
        self._jitter = jitter
        self._failures_max = failures_max
        self._window_s = window_s
        self._backoff_first_s = backoff_first_s
        self._backoff_max_s = backoff_max_s
        self._circuits: OrderedDict[int, _Circuit] = OrderedDict()
        """The one whose last failure is the longest ago, first."""
        self._open: dict[int, _Circuit] = {}
        """Of these, the ones that are not closed."""

    def set_aside(self, now_s: float) -> frozenset[int]:
        """Ids of the workers that should get no request now. O(open circuits)."""
        if not self._open:
            return frozenset()
        return frozenset(key for key, circuit in self._open.items() if now_s < circuit.until_s)

    def spells(self, now_s: float) -> list[SetAside]:
        """Who is set aside now, by id, and for how much longer."""
        return [
            SetAside(worker_id, circuit.failures, circuit.until_s - now_s)
            for worker_id, circuit in sorted(self._open.items())
            if now_s < circuit.until_s
        ]

    def sent(self, worker_id: int, now_s: float) -> bool:
        """A request goes to the worker. Whether that is a trial: then no other may go there until
        its end is known, or until another back-off of the same length is over."""
        circuit = self._open.get(worker_id)
        if circuit is None or now_s < circuit.until_s:
            return False
        circuit.on_trial = True
        circuit.until_s = now_s + circuit.backoff_s
        return True

    def success(self, worker_id: int) -> None:
        """The worker does what it was asked, as its first token shows: forget its failures.

        What a client broke off before that says nothing of the worker, and is not reported.
        """
        self.forget(worker_id)

    def failure(self, worker_id: int, now_s: float) -> SetAside | None:
        """The worker failed a request. Says so if it is set aside for that, the first time or, as
        its trial failed, again."""
        circuit = self._circuits.get(worker_id)
        if circuit is None:
            circuit = self._circuits[worker_id] = _Circuit(0, now_s)
            if len(self._circuits) > CIRCUITS_MAX:
                self.forget(next(iter(self._circuits)))
        is_open = worker_id in self._open
        if is_open and not circuit.on_trial and now_s < circuit.until_s:
            return None  # of a request from before: no news, however many of them there are
        if not is_open and now_s - circuit.failed_s > self._window_s:
            circuit.failures = 0
        circuit.failures += 1
        circuit.failed_s = now_s
        self._circuits.move_to_end(worker_id)
        if not is_open and circuit.failures < self._failures_max:
            return None
        return self._set_aside(worker_id, circuit, now_s)

    def forget(self, worker_id: int) -> None:
        """The worker left, or all is well with it."""
        self._circuits.pop(worker_id, None)
        self._open.pop(worker_id, None)

    def _set_aside(self, worker_id: int, circuit: _Circuit, now_s: float) -> SetAside:
        longer = min(2 * circuit.backoff_s, self._backoff_max_s)
        circuit.backoff_s = longer or self._backoff_first_s
        for_s = circuit.backoff_s * (1 - JITTER_RATIO * self._jitter())
        circuit.until_s = now_s + for_s
        circuit.on_trial = False
        self._open[worker_id] = circuit
        return SetAside(worker_id, circuit.failures, for_s)
