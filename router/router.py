"""Where requests go: decide from the state at hand, record the decision, keep its booking.

A decision is made once, by one replica, and appended with its reasons. Until the log delivers it
back it sits in the overlay, a second set of bookings that is added to the folded load; so a burst
of requests does not all see the same idle worker. With replica sync off, only this frontend's own
requests count, and the overlay then keeps them until they end.
"""

import time
from collections import Counter
from collections.abc import Callable
from random import Random

from msgspec import Struct

from eventstore.events import (
    AnyEvent,
    PrefillCompleted,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
    RequestRouted,
    StateReset,
    WorkerRemoved,
)
from eventstore.publisher import Publisher
from eventstore.subjects import hex_id
from indexer.radix import WorkerRank
from router.active import ActiveSequences
from router.decision import (
    Candidates,
    Picture,
    RoutedRequest,
    RouterOptions,
    decide,
    eligible,
)
from router.errors import LogBacklogFull, ReplicaNotReady
from router.replica import Replica
from router.selection import Load, depth_by_slot

EVENTS_PER_REQUEST = 4
"""accepted, routed, prefill_completed, and one ending: what a live request may still write."""


class Timings(Struct, frozen=True):
    """How long the parts of a decision took, in seconds."""

    find_matches_s: float
    scheduling_s: float


class Router:
    """Decisions of one frontend. Its methods are synchronous and do no I/O."""

    def __init__(
        self,
        *,
        replica: Replica,
        publisher: Publisher,
        options: RouterOptions,
        frontend_id: int,
        rng: Random,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options = options
        self._replica = replica
        self._publisher = publisher
        self._frontend_id = frontend_id
        self._rng = rng
        self._clock = clock
        self._overlay = ActiveSequences()
        self._serving: dict[int, str] = {}
        self._candidates: dict[str, Candidates] = {}
        self._candidates_version = -1
        self._turn = 0
        self._tickets: dict[str, Ticket] = {}
        self._missing: set[str] = set()
        self._ghosts: set[str] = set()
        self._published_then = 0
        self.corrections = Counter[str]()
        """What `reconcile` has written: `announced`, `released`."""

    @property
    def router_id(self) -> str:
        """Names this router in metrics: its frontend's id, 16 hex digits."""
        return hex_id(self._frontend_id)

    @property
    def live_requests(self) -> int:
        """Accepted by this router and not ended."""
        return len(self._tickets)

    @property
    def overlay_bookings(self) -> int:
        return len(self._overlay)

    @property
    def buffered_events(self) -> int:
        """Own facts that the log has not acknowledged."""
        return self._publisher.buffered

    # --- who can be chosen ------------------------------------------------------------------------

    def serve(self, worker_id: int, model: str) -> None:
        """The worker can be reached: choose it from now on."""
        self._serving[worker_id] = model
        self._candidates.clear()

    def withdraw(self, worker_id: int) -> None:
        """The worker can't be reached: don't choose it, without judging whether it lives."""
        self._serving.pop(worker_id, None)
        self._candidates.clear()

    def has_workers(self, model: str) -> bool:
        return bool(self._candidates_of(model).ranks)

    def _candidates_of(self, model: str) -> Candidates:
        state = self._replica.state
        if state.workers_version != self._candidates_version:
            self._candidates.clear()
            self._candidates_version = state.workers_version
        known = self._candidates.get(model)
        if known is None:
            ranks = [
                rank
                for worker_id, served in self._serving.items()
                if served == model
                for rank in state.ranks_of(worker_id)
            ]
            ranks.sort(key=state.tree.slot_of)
            known = Candidates(ranks, [state.tree.slot_of(rank) for rank in ranks])
            self._candidates[model] = known
        return known

    # --- what the log delivers --------------------------------------------------------------------

    def observe(self, events: list[AnyEvent]) -> None:
        """Applied events: what the fold now counts leaves the overlay."""
        for event in events:
            kind = type(event)
            if kind is RequestRouted:
                if self.options.replica_sync:
                    self._overlay.free(event.request_id)  # type: ignore[union-attr]
            elif kind is WorkerRemoved or kind is StateReset:
                self._rebuild_overlay()

    def state_restarted(self) -> None:
        """The replica's state was thrown away, and slots have a new meaning."""
        self._candidates.clear()
        self._candidates_version = -1
        self._rebuild_overlay()

    def _rebuild_overlay(self) -> None:
        """Book again by rank what is still somewhere: slots have moved to other ranks."""
        state = self._replica.state
        before, self._overlay = self._overlay, ActiveSequences()
        for request_id in before.request_ids():
            booking, rank = before.get(request_id), self._tickets[request_id].rank
            if booking is None or rank is None:
                continue
            if self.options.replica_sync and request_id in state.active:
                continue  # the fold counts it by now
            if rank in state.ranks_of(rank.worker_id):
                slot = state.tree.slot_of(rank)
                self._overlay.book(
                    request_id, slot, booking.prefill_tokens, booking.sequence_hashes
                )

    # --- when the log and this frontend disagree --------------------------------------------------

    def reconcile(self) -> None:
        """Compare the fold's picture of this frontend's requests with the requests themselves, and
        write what puts it right.

        They disagree after a reset, after the log lost its tail, or when this frontend was taken
        for dead and was not. What an earlier call found and this one still finds, though all that
        had been published then has come back since, is corrected: a live request that the fold does
        not know is announced again, and one that the fold believes in and that has ended here is
        released. Call it every few seconds.
        """
        if not self._replica.is_ready:
            return
        folded = self._replica.state.requests
        own = {key for key, live in folded.items() if live.frontend_id == self._frontend_id}
        missing, ghosts = self._tickets.keys() - own, own - self._tickets.keys()
        publisher = self._publisher
        if publisher.published - publisher.buffered < self._published_then:
            return  # not all of it is written yet
        if self._replica.state.cursor < publisher.last_seq:
            return  # nor read
        for request_id in sorted(missing & self._missing):
            self._announce(self._tickets[request_id])
        for request_id in sorted(ghosts & self._ghosts):
            publisher.publish(RequestFailed(request_id, 0, "lost"))
            self.corrections["released"] += 1
        self._missing, self._ghosts = missing, ghosts
        self._published_then = publisher.published

    def _announce(self, ticket: "Ticket") -> None:
        """Write again what has been written of a live request."""
        request_id = ticket.request.request_id
        self._publisher.publish(self._accepted(ticket.request))
        if ticket.routed is not None:
            self._publisher.publish(ticket.routed)
            if not ticket.is_prefilling:
                self._publisher.publish(PrefillCompleted(request_id, ticket.cached_tokens))
            if request_id not in self._overlay and ticket.rank is not None:
                self._rebook(ticket)
        self.corrections["announced"] += 1

    def _rebook(self, ticket: "Ticket") -> None:
        routed = ticket.routed
        assert routed is not None
        rank = WorkerRank(routed.worker_id, routed.dp_rank)
        if rank in self._replica.state.ranks_of(rank.worker_id):
            self._book(ticket.request, routed)
            if not ticket.is_prefilling:
                self._overlay.prefill_completed(ticket.request.request_id)

    # --- a request --------------------------------------------------------------------------------

    def accept(self, request: RoutedRequest) -> "Ticket":
        """Take a request on: from here its end will be recorded.

        Raises ReplicaNotReady, or LogBacklogFull where its facts would find no room.
        """
        if not self._replica.is_ready:
            raise ReplicaNotReady(self._replica.state.cursor, self._replica.head)
        if request.request_id in self._tickets:
            raise ValueError(f"request id {request.request_id} is in use")
        promised = EVENTS_PER_REQUEST * (len(self._tickets) + 1)
        if self._publisher.buffered + promised > self._publisher.events_max:
            raise LogBacklogFull(self._publisher.buffered)
        self._publisher.publish(self._accepted(request))
        ticket = self._tickets[request.request_id] = Ticket(self, request)
        return ticket

    def _accepted(self, request: RoutedRequest) -> RequestAccepted:
        return RequestAccepted(
            request.request_id,
            self._frontend_id,
            request.model,
            request.endpoint,
            request.isl,
            request.max_tokens,
            request.streaming,
        )

    def load(self) -> Load:
        """Prefill tokens and active blocks as decisions see them, by slot."""
        overlay = self._overlay
        if not self.options.replica_sync:
            overlay.add_slot(len(self._replica.state.active.blocks) - 1)
            return Load(overlay.prefill_tokens, overlay.blocks)
        folded = self._replica.state.active
        if not len(overlay):
            return Load(folded.prefill_tokens, folded.blocks)
        prefill_tokens, blocks = folded.prefill_tokens.copy(), folded.blocks.copy()
        for slot in overlay.busy_slots():
            prefill_tokens[slot] += overlay.prefill_tokens[slot]
            blocks[slot] += overlay.blocks[slot]
        return Load(prefill_tokens, blocks)

    def _active_overlaps(self, sequence_hashes: list[int], slot_count: int) -> list[int]:
        """By slot: leading blocks of the prompt that are active there already."""
        own = self._overlay.match_depths(sequence_hashes)
        folded = (
            self._replica.state.active.match_depths(sequence_hashes)
            if self.options.replica_sync
            else []
        )
        if own and folded:
            both = depth_by_slot(own, slot_count), depth_by_slot(folded, slot_count)
            return list(map(max, *both))
        return depth_by_slot(own or folded, slot_count)

    def _choose(self, request: RoutedRequest, attempt: int) -> tuple[RequestRouted, Timings]:
        """Raises NoWorkers, UnknownWorker, WorkerRequired."""
        started = self._clock()
        state, hashes = self._replica.state, request.sequence_hashes
        candidates, mode = eligible(self._candidates_of(request.model), request, self.options.mode)
        slot_count = len(state.active.blocks)
        overlaps = depth_by_slot(state.tree.match_depths(hashes), slot_count)
        matched = self._clock()
        picture = Picture(
            cursor=state.cursor,
            overlaps=overlaps,
            active_overlaps=self._active_overlaps(hashes, slot_count),
            load=self.load(),
            size_of=state.tree.blocks_of,
        )
        routed = decide(
            request, attempt, candidates, mode, picture, self.options, self._rng, self._turn
        )
        self._turn += 1
        return routed, Timings(matched - started, self._clock() - matched)

    def _book(self, request: RoutedRequest, routed: RequestRouted) -> None:
        slot = self._replica.state.tree.slot_of(WorkerRank(routed.worker_id, routed.dp_rank))
        prefill_tokens = max(0, request.isl - routed.overlap_blocks * request.block_size)
        self._overlay.book(request.request_id, slot, prefill_tokens, request.sequence_hashes)


class Ticket:
    """One accepted request: routed at most once at a time, ended exactly once.

    Each method writes its fact. The owner calls one of the four endings; later calls do nothing, so
    a drop guard may always call `cancelled`.
    """

    def __init__(self, router: Router, request: RoutedRequest) -> None:
        self.request = request
        self.routed: RequestRouted | None = None
        self._router = router
        self.is_prefilling = False
        self.cached_tokens: int | None = None
        self._ended = False

    @property
    def rank(self) -> WorkerRank | None:
        """Where the request is booked now."""
        if self.routed is None:
            return None
        return WorkerRank(self.routed.worker_id, self.routed.dp_rank)

    def route(self) -> Timings:
        """Choose a rank, book it, record why. Raises NoWorkers, UnknownWorker, WorkerRequired."""
        router = self._router
        attempt = 0 if self.routed is None else self.routed.attempt + 1
        self.routed, timings = router._choose(self.request, attempt)
        router._book(self.request, self.routed)
        self.is_prefilling = True
        router._publisher.publish(self.routed)
        return timings

    def prefill_completed(self, cached_tokens: int | None) -> None:
        """The first token is here. Later calls do nothing."""
        if not self.is_prefilling or self._ended:
            return
        self.is_prefilling = False
        self.cached_tokens = cached_tokens
        self._router._overlay.prefill_completed(self.request.request_id)
        self._router._publisher.publish(PrefillCompleted(self.request.request_id, cached_tokens))

    def completed(self, osl: int, finish_reason: str, cached_tokens: int | None) -> None:
        self._end(RequestCompleted(self.request.request_id, osl, finish_reason, cached_tokens))

    def failed(self, osl: int, code: str) -> None:
        self._end(RequestFailed(self.request.request_id, osl, code))

    def cancelled(self, osl: int, cause: str) -> None:
        self._end(RequestCancelled(self.request.request_id, osl, cause))

    def rejected(self, code: str, status: int) -> None:
        self._end(RequestRejected(self.request.request_id, code, status))

    def _end(self, event: AnyEvent) -> None:
        if self._ended:
            return
        self._ended = True
        del self._router._tickets[self.request.request_id]
        self._router._overlay.free(self.request.request_id)
        self._router._publisher.publish(event)
