"""Where a generation runs: a worker is chosen, gets the request, is left for another if need be.

    route ──▶ send ──▶ outputs                              one worker does it all
    route a prefill worker ──▶ its result ──▶ route a decode worker ──▶ send ──▶ outputs
    route a prefill worker and a decode worker, which meet at the former's bootstrap address

A request that loses its worker may move on, as often as --migration-limit says: what has been
produced becomes part of the prompt, and the client sees one stream. It does not where it can't be
continued as it would have gone on: its output is guided by a grammar that has advanced, or the
client named the worker.
"""

import asyncio
import logging
import random
from collections.abc import Callable

from msgspec.structs import replace

from eventstore.events import RequestRouted
from frontend.errors import (
    DeadlineExceeded,
    EngineError,
    EngineOverloaded,
    EngineRefused,
    EngineShutDown,
    code_of,
    engine_error,
    status_of,
)
from frontend.legs import Job, decode_leg, first_leg, routed_request
from frontend.service import Service
from indexer.blocks import prompt_hashes
from indexer.radix import WorkerRank
from router.decision import RoutedRequest
from router.errors import RouterError
from router.ticket import Ticket, Timings, Waiting
from workers.card import AGGREGATED, DECODE, PREFILL
from workers.errors import CannotConnect, WorkerBacklogged, WorkerError, WorkerLost
from workers.protocol import Bootstrap, EngineRequest, Output, StopConditions
from workers.tcp_client import StreamHandle

_log = logging.getLogger(__name__)

MOVED_ON_AFTER = (
    WorkerLost,
    CannotConnect,
    WorkerBacklogged,
    EngineOverloaded,
    EngineShutDown,
    DeadlineExceeded,
)
"""Errors that another worker may not have. A request that an engine refuses, all refuse."""
EVENTS_PER_MIGRATION = 3


class Dispatch:
    """Of one generation. `sink` gets the worker's outputs, `fail` what can't be helped."""

    __slots__ = (
        "_avoid", "_fail", "_grown", "_grows", "_hop_routed", "_hop_stream", "_keeps",
        "_migrations", "_params", "_produced", "_request", "_service", "_sink", "_stream",
        "attempt_s", "hop_cached_tokens", "hop_worker", "job", "queue_depth", "sent_s", "ticket",
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
        self.sent_s: float | None = None
        """When a worker was first sent something for the request."""
        self.attempt_s: float | None = None
        """When the worker was sent the request that has it now; None while none has it."""
        self.hop_worker: WorkerRank | None = None
        """The prefill worker of a disaggregated request, also when it is done."""
        self.hop_cached_tokens: int | None = None
        self.queue_depth: int | None = None
        """Requests that waited before this one; None if it did not wait."""
        self._service = service
        self._sink = sink
        self._fail = fail
        self._stream: StreamHandle | None = None
        self._hop_stream: StreamHandle | None = None
        self._request: RoutedRequest | None = None
        """What is being routed: the request itself, or its hop."""
        self._params: dict[str, object] | None = None
        self._hop_routed: RequestRouted | None = None
        self._keeps = service.migration_limit > 0
        self._produced: list[int] = []
        """Tokens so far, if the request may move on."""
        self._grows = service.router.options.track_output_blocks
        self._grown = 0
        """Tokens since the last choice."""
        self._avoid: set[int] = set()
        self._migrations = 0

    @property
    def migrations(self) -> int:
        return self._migrations

    def start(self) -> None:
        """Accept the request and begin. Raises RouterError if it is not accepted; what comes after
        goes to `fail`."""
        service, job = self._service, self.job
        started_s = service.clock()
        hashes = prompt_hashes(job.token_ids, job.served.card.block_size)
        service.router_metrics.hashed(service.clock() - started_s)
        self.ticket = service.router.accept(routed_request(job, hashes))
        self._begin()

    def first_token(self, now_s: float, cached_tokens: int | None) -> None:
        """The worker that the request was sent to last has begun to answer."""
        ticket = self.ticket
        assert ticket is not None and ticket.rank is not None and self.attempt_s is not None
        ticket.prefill_completed(cached_tokens, 1000 * (now_s - self.attempt_s))
        self._service.router.worker_succeeded(ticket.rank.worker_id)

    def produced(self, token_ids: list[int]) -> None:
        """Tokens that go to the client. Called for every output."""
        if self._keeps:
            self._produced += token_ids
        if self._grows:
            self._grown += len(token_ids)
            assert self.ticket is not None
            self.ticket.produced(self._grown)

    @property
    def routed_for_prefill(self) -> RequestRouted | None:
        """The decision about who computes the prompt: the hop's, if there was one."""
        if self._hop_routed is not None:
            return self._hop_routed
        return None if self.ticket is None else self.ticket.routed

    def let_go(self) -> None:
        """The generation has ended: drop what points back at it."""
        self._stream = self._hop_stream = None
        self._sink, self._fail = _drop, _ignore

    def close(self) -> None:
        """Stop the work, wherever it is. Nothing more is delivered."""
        for stream in (self._stream, self._hop_stream):
            if stream is not None:
                stream.cancel()
        self._stream = self._hop_stream = None

    def pin(self) -> None:
        """Ask the worker that served the request to keep its prompt, if the client wants that."""
        ttl_s, ticket = self.job.hints.cache_ttl_s, self.ticket
        if ttl_s is None or not self._service.cache_control or ticket is None:
            return
        rank = self.hop_worker or ticket.rank
        client = None if rank is None else self._service.clients.get(rank.worker_id)
        if client is None or rank is None:
            return
        client.pin(rank.dp_rank, self.job.token_ids, ttl_s)

    # --- choosing ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Choose the first worker of this attempt."""
        assert self.ticket is not None
        self._params = None
        try:
            self._route(first_leg(self._service, self.job, self._whole()))
        except (RouterError, WorkerError) as error:
            self._failed(error)

    def _whole(self) -> RoutedRequest:
        """The request, as far as it is not done, away from the workers that have failed it."""
        assert self.ticket is not None
        request = self.ticket.request
        return replace(request, avoid=frozenset(self._avoid)) if self._avoid else request

    def _route(self, request: RoutedRequest) -> None:
        assert self.ticket is not None
        self._request = request
        waiting = Waiting(self._placed, self._failed)
        timings = self.ticket.route(waiting, request)
        if timings is None:
            self.queue_depth = self._service.router.parking.depth_of(request)
        else:
            self._placed(timings)

    def _placed(self, timings: Timings) -> None:
        """A rank is chosen and booked: send the request there."""
        request, ticket = self._request, self.ticket
        assert request is not None and ticket is not None
        try:
            if request.role == PREFILL:
                self._send_hop(timings)
            else:
                assert ticket.routed is not None
                self._service.router_metrics.routed(timings, ticket.routed)
                self._send(WorkerRank(ticket.routed.worker_id, ticket.routed.dp_rank))
        except WorkerError as error:
            self.worker_failed(error)
        except RouterError as error:
            self._failed(error)

    # --- sending ----------------------------------------------------------------------------------

    def _send(self, rank: WorkerRank, bootstrap: Bootstrap | None = None) -> None:
        job, produced = self.job, self._produced
        stop = job.stop
        if produced:
            stop = replace(
                stop,
                max_tokens=stop.max_tokens and stop.max_tokens - len(produced),
                min_tokens=stop.min_tokens and max(0, stop.min_tokens - len(produced)),
            )
        request = self._engine_request(rank, stop)
        request.disaggregated_params = self._params
        request.bootstrap = bootstrap
        self._stream = self._open(rank, request, self._sink, self.worker_failed)

    def _engine_request(self, rank: WorkerRank, stop: StopConditions) -> EngineRequest:
        job = self.job
        return EngineRequest(
            request_id=job.request_id,
            model=job.served.card.name,
            token_ids=job.token_ids + self._produced if self._produced else job.token_ids,
            dp_rank=rank.dp_rank,
            stop_conditions=stop,
            sampling_options=job.sampling,
            eos_token_ids=job.served.card.eos_token_ids,
            priority=job.hints.engine_priority,
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
        self.attempt_s = self._service.clock()
        if self.sent_s is None:
            self.sent_s = self.attempt_s
        return client.generate(request, sink, lost)

    def _send_hop(self, timings: Timings) -> None:
        """The prefill worker gets the request for one token. Where it can be met, the decode worker
        is chosen at once, and asks there for the prompt; otherwise it is chosen with the result."""
        service, ticket = self._service, self.ticket
        assert ticket is not None and ticket.hop is not None
        rank = WorkerRank(ticket.hop.worker_id, ticket.hop.dp_rank)
        self.hop_worker, self._hop_routed = rank, ticket.hop
        service.router_metrics.routed(timings, ticket.hop)
        bootstrap = self._bootstrap_at(rank.worker_id)
        request = self._engine_request(rank, StopConditions(max_tokens=1, ignore_eos=True))
        request.bootstrap = bootstrap
        self._hop_stream = self._open(rank, request, self._hop_output, self._hop_lost)
        if bootstrap is not None:
            self._route_decode()
            self._send_decode(bootstrap)

    def _bootstrap_at(self, worker_id: int) -> Bootstrap | None:
        address = self._service.models.bootstrap_address(worker_id)
        if address is None:
            return None
        host, _, port = address.rpartition(":")
        return Bootstrap(host.strip("[]"), int(port), random.getrandbits(64))

    def _route_decode(self) -> None:
        ticket = self.ticket
        assert ticket is not None
        self._request = decode_leg(self.job, self._whole())
        timings = ticket.route(None, self._request)
        assert timings is not None and ticket.routed is not None
        self._service.router_metrics.routed(timings, ticket.routed)

    def _send_decode(self, bootstrap: Bootstrap | None = None) -> None:
        ticket = self.ticket
        assert ticket is not None and ticket.rank is not None
        self._send(ticket.rank, bootstrap)

    # --- what a prefill worker says ---------------------------------------------------------------

    def _hop_output(self, output: Output) -> None:
        if output.error is not None:
            self._hop_failed(engine_error(*output.error))
            return
        ticket = self.ticket
        assert ticket is not None and self.attempt_s is not None
        if output.cached_tokens is not None:
            self.hop_cached_tokens = output.cached_tokens
        if output.finish_reason is None:
            return
        self._hop_stream = None
        took_ms = 1000 * (self._service.clock() - self.attempt_s)
        ticket.hop_ended(self.hop_cached_tokens, took_ms, "done")
        if ticket.routed is not None:
            return  # the decode worker has asked for the prompt itself
        self._params = output.disaggregated_params or {}
        try:
            self._route_decode()
            self._send_decode()
        except WorkerError as error:
            self.worker_failed(error)
        except RouterError as error:
            self._failed(error)

    def _hop_lost(self, error: WorkerLost) -> None:
        self._hop_failed(error)

    def _hop_failed(self, error: Exception) -> None:
        """Without the prompt the decode worker has nothing to do."""
        self._hop_stream = None
        assert self.ticket is not None
        self.ticket.hop_ended(None, None, code_of(error))
        self._worker_failed(error, self.hop_worker)

    # --- when it goes wrong -----------------------------------------------------------------------

    def output_failed(self, code: str, detail: str) -> None:
        """The worker said so, instead of an output."""
        self.worker_failed(engine_error(code, detail))

    def worker_failed(self, error: Exception) -> None:
        """The request can't go on where it is: it moves on, or ends."""
        self._worker_failed(error, None if self.ticket is None else self.ticket.rank)

    def _worker_failed(self, error: Exception, rank: WorkerRank | None) -> None:
        ticket, service = self.ticket, self._service
        assert ticket is not None
        if ticket.has_ended:
            return
        if rank is not None and not isinstance(error, EngineRefused):
            service.router.worker_failed(rank.worker_id, code_of(error))
        if rank is None or not self._may_move_on(error):
            self._failed(error)
            return
        _log.warning("moving on: %s", error, extra={"request_id": self.job.request_id})
        self.close()
        self._migrations += 1
        self.attempt_s, self._grown = None, 0
        self.hop_worker = self._hop_routed = None
        self._avoid.add(rank.worker_id)
        service.metrics.migrated(self.job.served.card.name, bool(self._produced))
        ticket.hop_ended(None, None, code_of(error))
        if ticket.routed is not None:
            ticket.migrated(len(self._produced), code_of(error), self._rest())
        # Not at once: this may be called by what is still taking the worker's connection apart.
        asyncio.get_running_loop().call_soon(self._go_on, error)

    def _may_move_on(self, error: Exception) -> bool:
        service, job = self._service, self.job
        is_named = job.hints.worker_id is not None or job.hints.prefill_worker_id is not None
        prefill_failed = type(error) is EngineError and self.hop_worker is not None
        return (
            self._migrations < service.migration_limit
            and (isinstance(error, MOVED_ON_AFTER) or prefill_failed)
            and not (isinstance(error, DeadlineExceeded) and error.kind == "total")
            and not is_named
            and job.sampling.guided_decoding is None
            and service.router.has_room(EVENTS_PER_MIGRATION)
        )

    def _rest(self) -> RoutedRequest:
        """The request with what has been produced behind its prompt."""
        assert self.ticket is not None
        request, produced = self.ticket.request, self._produced
        if not produced:
            return request
        tokens = self.job.token_ids + produced
        expected = self.job.hints.expected_osl
        return replace(
            request,
            isl=len(tokens),
            sequence_hashes=prompt_hashes(tokens, request.block_size),
            max_tokens=self.job.stop.max_tokens and self.job.stop.max_tokens - len(produced),
            expected_osl=expected and max(1, expected - len(produced)),
        )

    def _go_on(self, error: Exception) -> None:
        assert self.ticket is not None
        if self.ticket.has_ended:
            return
        limit = self.job.stop.max_tokens
        if limit is not None and len(self._produced) >= limit:
            # All was there, but for the word that it is all.
            self._sink(Output(0, [], "length"))
            return
        model = self.ticket.request.model
        if not self._has_another(model):
            self._failed(error)
            return
        self._begin()

    def _has_another(self, model: str) -> bool:
        roles = (AGGREGATED, DECODE)
        return any(
            rank.worker_id not in self._avoid
            for role in roles
            for rank in self._service.router.candidates(model, role).ranks
        )

    def _failed(self, error: Exception) -> None:
        self.close()
        self._fail(error)

    def refusal(self, error: Exception) -> None:
        """Record that the request found no worker."""
        assert self.ticket is not None
        status = status_of(error, self._service.overload_status)
        self.ticket.rejected(code_of(error), status, str(error))


def _drop(output: Output) -> None:
    """What the sink of an ended generation does."""


def _ignore(error: Exception) -> None:
    """What an ended generation makes of an error."""
