"""Where a generation runs: workers are chosen, get the request, are left for others if need be.

    route ──▶ send ──▶ outputs                              one worker does it all
    route a prefill worker ──▶ its result ──▶ route a decode worker ──▶ send ──▶ outputs
    route a prefill worker and a decode worker, which meet at the former's bootstrap address

Where a worker fails the request, a new attempt begins at the beginning: with a decode worker that
does it all, if a prefill worker failed and --decode-fallback is set; else with other workers, as
often as --migration-limit allows (`frontend.migration`).
"""

import asyncio
import logging
from collections.abc import Callable

from msgspec.structs import replace

from eventstore.events import RequestRouted
from frontend.errors import EnginePrefillFailed, code_of, engine_error, status_of
from frontend.hop import PrefillHop, a_room_at
from frontend.legs import Job, decode_leg, first_leg, hash_prompt, routed_request
from frontend.migration import SAME_EVERYWHERE, Migration
from frontend.service import Service
from indexer.radix import WorkerRank
from router.decision import RoutedRequest
from router.errors import NoWorkers, RouterError
from router.ticket import Ticket, Timings, Waiting
from workers.card import AGGREGATED, DECODE, PREFILL
from workers.errors import CannotConnect, WorkerError, WorkerLost
from workers.protocol import EngineRequest, Output, StopConditions
from workers.tcp_client import StreamHandle

_log = logging.getLogger(__name__)

EVENTS_PER_MIGRATION = 3
"""What an attempt may write beyond what every live request has room for."""
PREFILL_ONLY = StopConditions(max_tokens=1, ignore_eos=True)


class Dispatch:
    """Of one generation. `sink` gets the worker's outputs, `fail` what can't be helped."""

    __slots__ = (
        "_cause", "_fail", "_grown", "_grows", "_hashing_s", "_keeps", "_leg", "_migration",
        "_prefills_locally", "_produced", "_service", "_sink", "_stream", "hop", "is_prefilling",
        "job", "queue_depth", "sent_s", "since_s", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        service: Service,
        job: Job,
        sink: Callable[[Output], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self.job = job
        self.ticket: Ticket | None = None
        self.hop: PrefillHop | None = None
        """The prefill worker's part in this attempt, also when it is done."""
        self.is_prefilling = True
        """Whether this attempt has no output yet."""
        self.since_s = job.started_s
        """Since when it has none: from its beginning, and then from its being sent."""
        self.sent_s: float | None = None
        """When a worker was first sent something for the request."""
        self.queue_depth: int | None = None
        """Requests that waited before this one; None if it did not wait."""
        self._service = service
        self._sink = sink
        self._fail = fail
        self._stream: StreamHandle | None = None
        self._leg: RoutedRequest | None = None
        """What is being routed: the request itself, or one of its legs."""
        self._hashing_s = 0.0
        """What hashing the prompt took, until a choice has been made with it."""
        self._prefills_locally = False
        self._cause: Exception | None = None
        """What ended the attempt before this one."""
        self._migration = Migration(job, service.migration_limit)
        self._produced, self._keeps = self._migration.produced, self._migration.is_on
        self._grows = service.router.options.track_output_blocks
        self._grown = 0
        """Tokens since the last choice."""

    @property
    def prefill_rank(self) -> WorkerRank | None:
        """Who computes the prompt, or did."""
        if self.hop is not None:
            return self.hop.rank
        return None if self.ticket is None else self.ticket.rank

    @property
    def routed_for_prefill(self) -> RequestRouted | None:
        """The decision about that."""
        if self.hop is not None:
            return self.hop.routed
        return None if self.ticket is None else self.ticket.routed

    def start(self) -> None:
        """Accept the request and begin. Raises RouterError if it is not accepted; what comes after
        goes to `fail`."""
        service, job = self._service, self.job
        hashes, self._hashing_s = hash_prompt(service, job)
        self.ticket = service.router.accept(routed_request(job, hashes))
        self._begin()

    def first_token(self, now_s: float, cached_tokens: int | None) -> None:
        """The worker that the request was sent to last has begun to answer."""
        ticket = self.ticket
        assert ticket is not None and ticket.rank is not None
        self.is_prefilling = False
        ticket.prefill_completed(cached_tokens, 1000 * (now_s - self.since_s))
        self._service.router.worker_succeeded(ticket.rank.worker_id)

    def produced(self, token_ids: list[int]) -> None:
        """Tokens that go to the client. Called for every output."""
        if self._keeps:
            self._produced += token_ids
        if self._grows:
            self._grown += len(token_ids)
            assert self.ticket is not None
            self.ticket.produced(self._grown)

    def let_go(self) -> None:
        """The generation has ended: drop what points back at it."""
        self._stream = None
        if self.hop is not None:
            self.hop.stream = None
        self._sink, self._fail = _drop, _ignore

    def close(self) -> None:
        """Stop the work, wherever it is. Nothing more is delivered."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        if self.hop is not None:
            self.hop.close()

    def pin(self) -> None:
        """Ask the worker that computed the prompt to keep it, if the client wants that."""
        ttl_s, rank = self.job.hints.cache_ttl_s, self.prefill_rank
        if ttl_s is None or rank is None or not self._service.cache_control:
            return
        client = self._service.clients.get(rank.worker_id)
        if client is not None:
            client.pin(rank.dp_rank, self.job.token_ids, ttl_s)

    def refusal(self, error: Exception) -> None:
        """Record that the request found no worker."""
        assert self.ticket is not None
        status = status_of(error, self._service.overload_status)
        self.ticket.rejected(code_of(error), status, str(error))

    # --- choosing ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Choose the first worker of this attempt."""
        service, ticket = self._service, self.ticket
        assert ticket is not None
        if ticket.has_ended:
            return
        request = self._whole()
        leg = first_leg(service, self.job, request, bypass=self._prefills_locally)
        self._leg = leg
        try:
            if leg.role == PREFILL:
                # No prompt is computed that nobody could go on with.
                service.router.eligible(decode_leg(self.job, request))
            timings = ticket.route(Waiting(self._placed, self._not_placed), leg)
        except RouterError as error:
            self._not_placed(error)
            return
        if timings is None:
            self.queue_depth = service.router.parking.depth_of(leg)
        else:
            self._placed(timings)

    def _begin_decode(self) -> None:
        """Choose who gets the prompt that the hop computes."""
        ticket = self.ticket
        assert ticket is not None
        self._leg = decode_leg(self.job, self._whole())
        try:
            timings = ticket.route(None, self._leg)
        except RouterError as error:
            self._not_placed(error)
            return
        assert timings is not None
        self._placed(timings)

    def _whole(self) -> RoutedRequest:
        """The request, as far as it is not done, away from the workers that have failed it."""
        assert self.ticket is not None
        request, avoid = self.ticket.request, self._migration.avoid
        return replace(request, avoid=avoid) if avoid else request

    def _placed(self, timings: Timings) -> None:
        """A rank is chosen and booked: send the request there."""
        ticket, leg, metrics = self.ticket, self._leg, self._service.router_metrics
        assert ticket is not None and leg is not None
        routed = ticket.hop if leg.role == PREFILL else ticket.routed
        assert routed is not None
        metrics.routed(timings, routed, self._hashing_s)
        self._hashing_s = 0.0
        if leg.role == PREFILL:
            self._send_hop(routed)
        else:
            self._send()

    def _not_placed(self, error: RouterError) -> None:
        """Where nobody takes over from a worker, what happened to that one is the error."""
        leg = self._leg
        assert leg is not None
        if isinstance(error, NoWorkers) and leg.role == PREFILL and self._may_fall_back:
            self._prefills_locally = True  # the last prefill worker left while the request waited
            self._begin()
            return
        self._fail(self._cause or error)

    # --- sending ----------------------------------------------------------------------------------

    def _send(self) -> None:
        ticket, hop = self.ticket, self.hop
        assert ticket is not None and ticket.rank is not None
        request = self._engine_request(ticket.rank, self._migration.stop_conditions())
        if hop is not None:
            request.bootstrap, request.disaggregated_params = hop.bootstrap, hop.params
        try:
            self._stream = self._open(ticket.rank, request, self._sink, self.worker_failed)
        except WorkerError as error:
            self.worker_failed(error)

    def _send_hop(self, routed: RequestRouted) -> None:
        """The prefill worker gets the request for one token. Where it can be met, the decode worker
        is chosen at once, and asks there for the prompt; otherwise it is chosen with the result."""
        address = self._service.models.bootstrap_address(routed.worker_id)
        bootstrap = None if address is None else a_room_at(address)
        hop = self.hop = PrefillHop(routed, bootstrap, self._service.clock())
        request = self._engine_request(hop.rank, PREFILL_ONLY)
        request.bootstrap = bootstrap
        try:
            hop.stream = self._open(hop.rank, request, self._hop_output, self._hop_failed)
        except WorkerError as error:
            self._hop_failed(error)
            return
        if bootstrap is not None:
            self._begin_decode()

    def _engine_request(self, rank: WorkerRank, stop: StopConditions) -> EngineRequest:
        job = self.job
        return EngineRequest(
            request_id=job.request_id,
            model=job.served.name_at_workers,
            token_ids=self._migration.token_ids(),
            dp_rank=rank.dp_rank,
            stop_conditions=stop,
            sampling_options=job.sampling,
            eos_token_ids=job.served.card.eos_token_ids,
            priority=job.hints.engine_priority,
            multi_modal_data=job.media,
        )

    def _open(
        self,
        rank: WorkerRank,
        request: EngineRequest,
        sink: Callable[[Output], None],
        lost: Callable[[WorkerLost], None],
    ) -> StreamHandle:
        client = self._service.clients.get(rank.worker_id)
        if client is None:
            raise CannotConnect(rank.worker_id, "", "it just left")
        self.since_s = self._service.clock()
        if self.sent_s is None:
            self.sent_s = self.since_s
        return client.generate(request, sink, lost)

    # --- what a prefill worker says ---------------------------------------------------------------

    def _hop_output(self, output: Output) -> None:
        if output.error is not None:
            self._hop_failed(engine_error(*output.error))
            return
        ticket, hop = self.ticket, self.hop
        assert ticket is not None and hop is not None
        if output.cached_tokens is not None:
            hop.cached_tokens = output.cached_tokens
        if output.finish_reason is None:
            return
        hop.stream = None
        took_s = self._service.clock() - hop.sent_s
        ticket.hop_ended(hop.cached_tokens, 1000 * took_s, "done")
        self._service.router.worker_succeeded(hop.rank.worker_id)
        if hop.bootstrap is None and not ticket.has_ended:
            hop.params = output.disaggregated_params or {}
            self._begin_decode()

    # --- when it goes wrong -----------------------------------------------------------------------

    def output_failed(self, code: str, detail: str) -> None:
        """The worker said so, instead of an output."""
        self.worker_failed(engine_error(code, detail))

    def late(self, error: Exception) -> None:
        """There is no output for too long. What waits for a worker fails; it had its chance."""
        if self.hop is not None and self.hop.is_running:
            self._hop_failed(error)
        elif self._stream is not None:
            self.worker_failed(error)
        else:
            self._fail(error)

    def worker_failed(self, error: Exception) -> None:
        """The request can't go on where it is: it moves on, or ends."""
        ticket = self.ticket
        assert ticket is not None and ticket.rank is not None
        if isinstance(error, EnginePrefillFailed) and self.hop is not None:
            self._hop_failed(error)
        elif not ticket.has_ended:
            self._blame(ticket.rank, error)
            self._move_on(error, ticket.rank)

    def _hop_failed(self, error: Exception) -> None:
        """Without the prompt the decode worker has nothing to do, unless it got it just before."""
        ticket, hop = self.ticket, self.hop
        assert ticket is not None and hop is not None
        if ticket.has_ended:
            return
        self._blame(hop.rank, error)
        if not self.is_prefilling:
            hop.close()
            ticket.hop_ended(None, None, code_of(error))
        elif self._may_fall_back and not isinstance(error, SAME_EVERYWHERE):
            self._prefills_locally = True
            self._start_over(error)
        else:
            self._move_on(error, hop.rank, in_hop=True)

    @property
    def _may_fall_back(self) -> bool:
        return self._service.disaggregation.decode_fallback and not self._prefills_locally

    def _blame(self, rank: WorkerRank, error: Exception) -> None:
        if not isinstance(error, SAME_EVERYWHERE):
            self._service.router.worker_failed(rank.worker_id, code_of(error))

    def _move_on(self, error: Exception, rank: WorkerRank, *, in_hop: bool = False) -> None:
        """Leave the worker for another one, if that is possible."""
        service, migration = self._service, self._migration
        if migration.is_complete:
            self.close()
            self._sink(Output(0, [], "length"))
        elif (
            migration.allows(error, in_prefill_hop=in_hop)
            and service.router.has_room(EVENTS_PER_MIGRATION)
            and self._has_another(rank, (PREFILL,) if in_hop else (AGGREGATED, DECODE))
        ):
            migration.leave(rank.worker_id)
            service.metrics.migrated(self.job.served.card.name, bool(self._produced))
            self._start_over(error)
        else:
            self._fail(error)

    def _has_another(self, failed: WorkerRank, roles: tuple[str, ...]) -> bool:
        """Whether a worker of these roles is left besides those that have failed the request."""
        model, avoid = self.job.served.card.name, self._migration.avoid | {failed.worker_id}
        return any(
            rank.worker_id not in avoid
            for role in roles
            for rank in self._service.router.candidates(model, role).ranks
        )

    def _start_over(self, error: Exception) -> None:
        """End this attempt, and begin the next with what there is so far."""
        ticket, code = self.ticket, code_of(error)
        assert ticket is not None
        _log.warning("starting over: %s", error, extra={"request_id": self.job.request_id})
        self.close()
        ticket.hop_ended(None, None, code)
        if ticket.routed is not None:
            rest = self._migration.rest(ticket.request)
            ticket.migrated(len(self._produced), code, rest)
        self._cause, self.hop = error, None
        self.is_prefilling, self.since_s, self._grown = True, self._service.clock(), 0
        # Not at once: this may be called by what is still taking the worker's connection apart.
        asyncio.get_running_loop().call_soon(self._begin)


def _drop(output: Output) -> None:
    """What the sink of an ended generation does."""


def _ignore(error: Exception) -> None:
    """What an ended generation makes of an error."""
