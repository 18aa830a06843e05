"""Which of the candidates a request may go to now, and whether it must wait for them.

In this order: a worker that failed again and again is set aside for a while; a busy one takes no
more, by the thresholds of its model; a bound session keeps its rank; and while every rank has more
prefill ahead than the queue's threshold allows, requests are parked.
"""

from collections.abc import Callable

from msgspec import Struct

from router.busy import BusyLimits, Thresholds, prefill_cap
from router.candidates import Candidates
from router.circuit import CircuitBreaker
from router.decision import RoutedRequest, RouterOptions
from router.errors import SessionUnavailable
from router.queue import all_prefill_busy
from router.selection import Load, RouterMode
from router.state import RouterState


class Eligible(Struct, frozen=True):
    """Who may be chosen, and by which mode."""

    candidates: Candidates
    mode: RouterMode
    set_aside: int
    """Ranks that were left out because they are busy or failed too often."""


class _Limits(Struct, frozen=True):
    """What follows from a set of candidates, kept while it stays the same."""

    candidates: Candidates
    thresholds: Thresholds
    busy: BusyLimits


class Admission:
    """The filters before a decision. They keep no state of their own but the circuit breaker's."""

    def __init__(
        self,
        options: RouterOptions,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        jitter: Callable[[], float],
    ) -> None:
        self._options = options
        self._clock = clock
        self._now_ns = now_ns
        self._limits: dict[tuple[str, str], _Limits] = {}
        self.circuit = CircuitBreaker(jitter=jitter)

    def eligible(
        self, request: RoutedRequest, candidates: Candidates, load: Load, state: RouterState
    ) -> Eligible:
        """The candidates that are left for a request that names no worker, of which there is one.

        Raises AllWorkersBusy, SessionUnavailable.
        """
        mode = self._options.mode
        left = self._not_set_aside(candidates)
        left = self._not_busy(left, request, load, state)
        left_out = len(candidates.ranks) - len(left.ranks)
        bound = self._bound(left, candidates, request, state)
        if bound is not None:
            left, mode = bound, RouterMode.SESSION
        return Eligible(left, mode, left_out)

    def must_wait(self, request: RoutedRequest, eligible: Eligible, load: Load) -> bool:
        """Whether all of them have more prefill ahead than the queue's threshold.

        Not for a request that has no choice, or brings no prefill.
        """
        options = self._options
        if options.queue_threshold is None or eligible.mode is RouterMode.SESSION:
            return False
        if request.remote_prefill:
            return False
        candidates = eligible.candidates
        threshold = options.queue_threshold
        tokens = candidates.items_of(load.prefill_tokens)
        # The first idle rank settles it, so most of the time this looks at one.
        if 0 in tokens:
            return False
        caps = [prefill_cap(threshold, each.max_num_batched_tokens) for each in candidates.workers]
        return all_prefill_busy(tokens, caps)

    def check_busy(
        self, request: RoutedRequest, candidates: Candidates, load: Load, state: RouterState
    ) -> None:
        """For a request that names its worker. Raises AllWorkersBusy."""
        self._not_busy(candidates, request, load, state)

    # --- the filters ------------------------------------------------------------------------------

    def _not_set_aside(self, candidates: Candidates) -> Candidates:
        aside = self.circuit.set_aside(self._clock())
        if not aside:
            return candidates
        left = candidates.where(lambda rank: rank.worker_id not in aside)
        return left if left.ranks else candidates  # serving badly beats not serving

    def _not_busy(
        self, candidates: Candidates, request: RoutedRequest, load: Load, state: RouterState
    ) -> Candidates:
        setting = state.thresholds.get(request.model)
        if setting is None:
            return candidates
        thresholds = Thresholds.of(setting.changed)
        if not thresholds.are_set:
            return candidates
        key = request.model, request.role
        known = self._limits.get(key)
        if known is None or known.candidates is not candidates or known.thresholds != thresholds:
            totals = [worker.total_kv_blocks for worker in candidates.workers]
            batches = [worker.max_num_batched_tokens for worker in candidates.workers]
            limits = BusyLimits(thresholds, request.model, candidates.ranks, totals, batches)
            known = self._limits[key] = _Limits(candidates, thresholds, limits)
        blocks = candidates.items_of(load.blocks)
        tokens = candidates.items_of(load.prefill_tokens)
        return candidates.at(known.busy.free(blocks, tokens))

    def _bound(
        self, left: Candidates, every: Candidates, request: RoutedRequest, state: RouterState
    ) -> Candidates | None:
        """The one rank that the session is bound to; None if it may go anywhere.

        A binding ends with its worker, so a hard one to a rank that is not among the candidates is
        to a worker that lives and can't be reached, or is busy: such a request waits for it, by
        being refused for now.
        """
        options = self._options
        if options.session_ttl_secs is None or request.session_id is None:
            return None
        # While nothing is written the log's time stands still, and bindings would not end.
        now_ns = max(state.time_ns, self._now_ns())
        rank = state.session_rank(request.model, request.role, request.session_id, now_ns)
        if rank is None or request.dp_rank not in (None, rank.dp_rank):
            return None  # a rank that the request names goes before the session's
        bound = left.where(lambda each: each == rank)
        if bound.ranks:
            return bound
        if options.session_mode == "hard":
            raise SessionUnavailable(request.session_id, rank.worker_id)
        return None
