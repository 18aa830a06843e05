"""Where requests go: decide from the state at hand, record the decision, keep its booking.

    accept ──▶ Ticket.route ──▶ who may be chosen ──▶ decide ──▶ booked ahead, and written
                                     │    (router.admission)       (router.local_load)
                                     └─▶ parked, until a rank has room (router.queue)

A decision is made once, by one replica, and appended with its reasons.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

from eventstore.events import (
    AnyEvent,
    PrefillCompleted,
    PrefillHopEnded,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestRejected,
    RequestRouted,
    StateReset,
    WorkerRemoved,
    WorkerSetAside,
)
from eventstore.publisher import Publisher
from eventstore.subjects import hex_id
from indexer.radix import WorkerRank
from router import decision
from router.admission import Admission, Eligible
from router.candidates import Candidates, Serving
from router.circuit import SetAside
from router.decision import Picture, RoutedRequest, RouterOptions
from router.errors import LogBacklogFull, ReplicaNotReady
from router.local_load import LocalLoad
from router.parking import Parking
from router.reconciler import Reconciler
from router.replica import Replica
from router.selection import Load, RouterMode, depth_by_slot
from router.state import hop_id
from router.ticket import Ticket, Timings, Waiting

PREFILL_OVER = (
    PrefillCompleted,
    PrefillHopEnded,
    RequestMigrated,
    RequestCompleted,
    RequestFailed,
    RequestCancelled,
    RequestRejected,
)
EVENTS_PER_REQUEST = 7
"""accepted, queued, two choices, the end of a hop, prefill_completed, and one ending: what a live
request may still write. Migrations and growth ask for room first."""


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
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.options = options
        self.local = LocalLoad(lambda: replica.state, options.replica_sync)
        """For tickets: the bookings ahead of the log."""
        self.tickets: dict[str, Ticket] = {}
        """The live requests. For looking at."""
        self.parking = Parking(self, clock)
        """The requests that wait. For looking at."""
        self.set_aside = Counter[str]()
        """How often workers have been set aside, by the code of the last failure."""
        self._replica = replica
        self._publisher = publisher
        self._frontend_id = frontend_id
        self._rng = rng
        self._clock = clock
        self._now_ns = now_ns
        self._serving = Serving()
        self._admission = Admission(options, clock, now_ns, rng.random)
        self._turns = Counter[tuple[str, str]]()
        self._reconciler = Reconciler(self, replica, publisher, frontend_id)

    @property
    def router_id(self) -> str:
        """Names this router in metrics: its frontend's id, 16 hex digits."""
        return hex_id(self._frontend_id)

    @property
    def live_requests(self) -> int:
        """Accepted by this router and not ended."""
        return len(self.tickets)

    @property
    def overlay_bookings(self) -> int:
        return len(self.local)

    @property
    def buffered_events(self) -> int:
        """Own facts that the log has not acknowledged."""
        return self._publisher.buffered

    @property
    def corrections(self) -> Counter[str]:
        """What `reconcile` has written: `announced`, `released`."""
        return self._reconciler.corrections

    # --- who can be chosen ------------------------------------------------------------------------

    def serve(self, worker_id: int, model: str, role: str = "aggregated") -> None:
        """The worker can be reached: choose it from now on."""
        self._serving.add(worker_id, model, role)
        self.release()

    def withdraw(self, worker_id: int) -> None:
        """The worker can't be reached: don't choose it, without judging whether it lives."""
        self._serving.remove(worker_id)
        self.release()

    def forget_worker(self, worker_id: int) -> None:
        """The worker has left for good."""
        self._admission.circuit.forget(worker_id)

    def candidates(self, model: str, role: str = "aggregated") -> Candidates:
        """The ranks of the model that can be reached and are in the state."""
        return self._serving.of(model, role, self._replica.state)

    def has_workers(self, model: str, role: str = "aggregated") -> bool:
        return bool(self.candidates(model, role).ranks)

    def worker_failed(self, worker_id: int, cause: str) -> None:
        """A request failed at the worker for a reason of the worker's."""
        aside = self._admission.circuit.failure(worker_id, self._clock())
        if aside is not None:
            self.set_aside[cause] += 1
            if self.has_room(1):
                self._publisher.publish(
                    WorkerSetAside(self._frontend_id, worker_id, aside.failures, aside.for_s, cause)
                )

    def workers_set_aside(self) -> list[SetAside]:
        """Those that get no requests now, by id, and for how much longer."""
        return self._admission.circuit.spells(self._clock())

    def worker_succeeded(self, worker_id: int) -> None:
        """A request got its first token from the worker."""
        self._admission.circuit.success(worker_id)

    # --- what the log delivers --------------------------------------------------------------------

    def observe(self, events: list[AnyEvent]) -> None:
        """Applied events: what the fold now counts leaves the overlay."""
        for event in events:
            kind = type(event)
            if kind is RequestRouted:
                assert isinstance(event, RequestRouted)
                prefill = event.role == "prefill"
                booking_id = hop_id(event.request_id) if prefill else event.request_id
                self.local.folded(booking_id, event)
            elif kind is WorkerRemoved:
                self.local.rebuild()
            elif kind is StateReset:
                self.local.rebuild()
                self._reconciler.rebook()
            elif kind in PREFILL_OVER:
                assert isinstance(event, PREFILL_OVER)
                if kind is not PrefillHopEnded:
                    self.local.told(event.request_id)
                if kind is not PrefillCompleted:
                    self.local.told(hop_id(event.request_id))
        self.release()

    def state_restarted(self) -> None:
        """The replica's state was thrown away, and slots have a new meaning."""
        self._serving.forget()
        self.local.rebuild()
        self._reconciler.rebook()

    # --- a request --------------------------------------------------------------------------------

    def accept(self, request: RoutedRequest) -> Ticket:
        """Take a request on: from here its end will be recorded.

        Raises ReplicaNotReady, or LogBacklogFull where its facts would find no room.
        """
        if not self._replica.is_ready:
            raise ReplicaNotReady(self._replica.state.cursor, self._replica.head)
        if request.request_id in self.tickets:
            raise ValueError(f"request id {request.request_id} is in use")
        if not self.has_room(EVENTS_PER_REQUEST):
            raise LogBacklogFull(self._publisher.buffered)
        self._publisher.publish(self.accepted(request))
        ticket = self.tickets[request.request_id] = Ticket(self, request)
        return ticket

    def has_room(self, events: int) -> bool:
        """Whether so many facts more fit besides those that live requests may still write."""
        promised = EVENTS_PER_REQUEST * len(self.tickets) + events
        return self._publisher.buffered + promised <= self._publisher.events_max

    def publish(self, event: AnyEvent) -> None:
        """For tickets: write a fact of a request."""
        self._publisher.publish(event)

    def forget(self, ticket: Ticket) -> None:
        """For tickets: the request has ended."""
        request_id = ticket.request_id
        del self.tickets[request_id]
        self.local.free(request_id)
        self.local.free(hop_id(request_id))
        self.parking.remove(request_id)

    def accepted(self, request: RoutedRequest) -> RequestAccepted:
        """The fact that opens a request."""
        return RequestAccepted(
            request.request_id,
            self._frontend_id,
            request.model,
            request.endpoint,
            request.isl,
            request.max_tokens,
            request.streaming,
        )

    def reconcile(self) -> None:
        """Put right what the fold believes of this frontend's requests (`router.reconciler`). Call
        it every few seconds."""
        self._reconciler.reconcile()

    def release(self) -> None:
        """Let parked requests go on as far as there is room; end the wait of those that have waited
        too long. Called whenever load has changed; call it every so often for the latter."""
        self.parking.release()

    def must_wait(self, request: RoutedRequest, eligible: Eligible, load: Load) -> bool:
        """Whether the queue's threshold keeps the request from every rank it may go to."""
        return self._admission.must_wait(request, eligible, load)

    def load(self) -> Load:
        """Prefill tokens, active blocks and requests as decisions see them, by slot."""
        return self.local.load()

    # --- choosing ---------------------------------------------------------------------------------

    def route(
        self, ticket: Ticket, request: RoutedRequest, waiting: Waiting | None
    ) -> Timings | None:
        """For tickets: `Ticket.route`."""
        started_s = self._clock()
        eligible, load = self.eligible(request)
        if waiting is not None and self.parking.park(ticket, request, waiting, eligible, load):
            return None
        return self.decide(ticket, request, eligible, load, started_s)

    def potential(self, request: RoutedRequest) -> RequestRouted:
        """What would be decided now; nothing is booked or written.

        Raises as `Ticket.route` does, but for QueueFull.
        """
        eligible, load = self.eligible(request)
        return self._decision(request, 0, eligible, load, self._clock())[0]

    def eligible(self, request: RoutedRequest) -> tuple[Eligible, Load]:
        """Who may be chosen, and the load of all ranks.

        Raises NoWorkers, UnknownWorker, UnknownRank, WorkerRequired, AllWorkersBusy,
        SessionUnavailable.
        """
        state = self._replica.state
        candidates = self.candidates(request.model, request.role)
        load = self.load()
        candidates, is_named = decision.asked_for(candidates, request, self.options.mode)
        if is_named:
            self._admission.check_busy(request, candidates, load, state)
            return Eligible(candidates, RouterMode.DIRECT, 0), load
        return self._admission.eligible(request, candidates, load, state), load

    def decide(
        self,
        ticket: Ticket,
        request: RoutedRequest,
        eligible: Eligible,
        load: Load,
        started_s: float,
        queued_s: float = 0.0,
    ) -> Timings:
        """Choose one of the eligible ranks for a ticket, book it and record why."""
        routed, matched_s = self._decision(
            request, ticket.attempt, eligible, load, started_s, queued_s
        )
        if eligible.mode is RouterMode.ROUND_ROBIN:
            self._turns[request.model, request.role] += 1
        self._admission.circuit.sent(routed.worker_id, self._clock())
        ticket.place(routed)
        return Timings(matched_s, self._clock() - started_s - matched_s, queued_s)

    def _decision(
        self,
        request: RoutedRequest,
        attempt: int,
        eligible: Eligible,
        load: Load,
        started_s: float,
        queued_s: float = 0.0,
    ) -> tuple[RequestRouted, float]:
        """The decision, and the seconds that finding matches took."""
        state, hashes = self._replica.state, request.sequence_hashes
        slot_count = len(state.active.blocks)
        announced, overlaps = self.overlaps(hashes)
        matched_s = self._clock() - started_s
        picture = Picture(
            cursor=state.cursor,
            overlaps=overlaps,
            announced=announced,
            active_overlaps=self.local.active_overlaps(hashes, slot_count),
            load=load,
            size_of=self._size_of,
            model_of=state.prefill_model,
        )
        routed = decision.decide(
            request,
            attempt,
            eligible.candidates,
            eligible.mode,
            picture,
            self.options,
            self._rng,
            self._turns[request.model, request.role],
            queued_ms=1000 * queued_s,
            set_aside=eligible.set_aside,
        )
        return routed, matched_s

    def overlaps(self, hashes: list[int]) -> tuple[list[int], list[int]]:
        """By slot: leading blocks that workers have announced, and those that are believed there.

        A belief is what this or another frontend predicts, or what a worker has pinned.
        """
        state = self._replica.state
        slot_count = len(state.active.blocks)
        found = state.tree.match_depths(hashes) if self.options.kv_events else []
        announced = overlaps = depth_by_slot(found, slot_count)
        for more in self._believed(hashes):
            if more:
                overlaps = list(map(max, overlaps, depth_by_slot(more, slot_count)))
        return announced, overlaps

    def _believed(self, hashes: list[int]) -> Iterator[list[tuple[int, int]]]:
        """As `match_depths` has it: by pins, by predictions in the log and by those ahead of it."""
        state = self._replica.state
        # While nothing is written the log's time stands still, and beliefs would not end.
        now_ns = max(state.time_ns, self._now_ns())
        if len(state.pinned):
            yield state.pinned.match_depths(hashes, now_ns)
        # Beside KV events, other frontends' predictions count only if this one predicts too.
        if self.options.prediction is not None:
            if len(state.predicted):
                yield state.predicted.match_depths(hashes, now_ns)
            yield self.local.predicted_depths(hashes)

    def _size_of(self, rank: WorkerRank) -> int:
        """Blocks that the rank holds, by whatever tells what is cached where."""
        state = self._replica.state
        if self.options.kv_events:
            return state.tree.blocks_of(rank)
        return state.predicted.blocks_of_slot(state.tree.slot_of(rank))
