"""The processes of a simulated deployment, made of the real parts."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent
from eventstore.publisher import Publisher
from eventstore.subjects import hex_id, request_producer
from frontend.caretaker import Caretaker
from frontend.errors import ShuttingDown
from frontend.presence import Presence
from frontend.removals import FrontendGone, Removals, WorkerGone
from frontend.space import EPOCH
from router.decision import RoutedRequest, RouterOptions
from router.errors import RouterError
from router.loading import SnapshotLoader
from router.reading import ReadingMark
from router.replica import Replica
from router.router import Router
from router.selection import RouterMode
from router.snapshot_steps import Due, Outcome, SnapshotTaker
from router.snapshot_trigger import Snapshots, SnapshotTrigger
from router.ticket import Ticket
from simulations.hosts import Host, Process
from simulations.swarm import Mix
from workers.card import FrontendInstance, Instance, ModelCard
from workers.clients import WorkerClients
from workers.discovery import Ending
from workers.engine import EngineConfig, MockEngine
from workers.errors import WorkerError, WorkerLost
from workers.protocol import EngineRequest, Output
from workers.service import MockWorker
from workers.tcp_client import StreamHandle

NAMESPACE = "simulated"
MODEL = "model"
DRAIN_S = 3.0
FLUSH_S = 2.0
"""How long an orderly end waits for running requests, and then for the log."""
EOS = 7
SNAPSHOTS_KEPT = 2


def snapshot_taker(host: Host) -> SnapshotTaker:
    return SnapshotTaker(
        host.log,
        NAMESPACE,
        host.snapshots,
        host.claims,
        kept=SNAPSHOTS_KEPT,
        version="simulated",
        marks=host.marks,
    )


class Observer(Protocol):
    """Who watches frontends from outside."""

    def applied(self, frontend: "SimulatedFrontend", events: list[AnyEvent]) -> None:
        """Its replica has moved past a record."""

    def restarted(self, frontend: "SimulatedFrontend") -> None:
        """Its replica has taken another state."""

    def routed(self, frontend: "SimulatedFrontend", ticket: Ticket) -> None:
        """Its router has decided."""


class SimulatedWorker(Process):
    """The mock worker with its real engines, feeds and request plane."""

    def __init__(self, host: Host, mix: Mix, new_id: Callable[[], int]) -> None:
        super().__init__(host)
        config = EngineConfig(
            block_size=mix.block_size,
            num_gpu_blocks=mix.num_gpu_blocks,
            max_num_seqs=mix.max_num_seqs,
            max_num_batched_tokens=256,
            context_length=mix.num_gpu_blocks * mix.block_size,
            speedup=mix.speedup,
        )
        card = ModelCard(
            name=MODEL,
            block_size=config.block_size,
            context_length=config.context_length,
            files={},
            eos_token_ids=[EOS],
            total_kv_blocks=config.num_gpu_blocks,
        )
        instance = Instance(
            worker_id=0,
            namespace=NAMESPACE,
            component="backend",
            endpoint="generate",
            address="",
            card=card,
            dp_size=mix.ranks,
        )
        self.engines = [MockEngine(config, worker_id=0, dp_rank=rank) for rank in range(mix.ranks)]
        self.worker_id = 0
        """The present one; 0 before the first."""

        def draw_id() -> int:
            self.worker_id = new_id()
            return self.worker_id

        self._worker = MockWorker(
            instance,
            self.engines,
            host.log,
            host.workers,
            new_id=draw_id,
            drain_s=DRAIN_S,
            kv_events_max=mix.kv_events_max,
            jitter=host.rng_for("feeds").random,
        )

    def stop(self) -> None:
        self._worker.stop()

    async def run(self) -> None:
        try:
            await self._worker.run(self.host.name, 0, self.host.name, lambda instance: None)
        finally:
            await self.host.workers.close()


class SimulatedFrontend(Process):
    """A frontend without HTTP: what `frontend.process` connects, and `call` for a handler."""

    def __init__(self, host: Host, mix: Mix, frontend_id: int, observer: Observer) -> None:
        super().__init__(host)
        self.frontend_id = frontend_id
        self.unwritten = 0
        """Facts that its orderly end could not write."""
        self.calls: dict[str, Call] = {}
        """Those that are running."""
        self.idle = asyncio.Event()
        """Set while there are none."""
        self.idle.set()
        self.publisher = Publisher(
            host.log,
            NAMESPACE,
            request_producer(frontend_id),
            EPOCH,
            jitter=host.rng_for("publisher").random,
        )
        self.replica = Replica(
            host.log,
            host.now_ns,
            observe=self._applied,
            restarted=self._restarted,
            jitter=host.rng_for("replica").random,
            snapshots=SnapshotLoader(host.log, host.snapshots),
            reading=ReadingMark(host.marks, hex_id(frontend_id)),
        )
        due = Due(mix.snapshot_messages)
        self._snapshots = SnapshotTrigger(
            host.log,
            Snapshots(host.snapshots, host.claims, lambda: self._take_snapshot(due)),
            due,
            jitter=host.rng_for("snapshots").random,
        )
        self.router = Router(
            replica=self.replica,
            publisher=self.publisher,
            options=RouterOptions(
                mode=RouterMode(mix.mode),
                temperature=mix.temperature,
                replica_sync=mix.replica_sync,
            ),
            frontend_id=frontend_id,
            rng=host.rng_for("router"),
            clock=asyncio.get_running_loop().time,
        )
        self.clients = WorkerClients(
            host.rng_for("clients"),
            on_connected=lambda worker_id: self.router.serve(worker_id, MODEL),
            on_disconnected=self.router.withdraw,
        )
        self._removals = Removals(host.log, NAMESPACE)
        self._presence = Presence(host.frontends, host.log, NAMESPACE, frontend_id)
        self._observer = observer

    async def run(self) -> None:
        host = self.host
        try:
            async with asyncio.TaskGroup() as tasks, self.publisher:
                running = [
                    tasks.create_task(self.replica.run(), name="replica"),
                    tasks.create_task(self._removals.run(), name="removals"),
                    tasks.create_task(self._presence.run(host.name), name="presence"),
                ]
                workers = await host.workers.watch(self.clients.put, self._worker_left)
                others = await host.frontends.watch(lambda instance: None, self._frontend_left)
                caretaker = Caretaker(
                    router=self.router,
                    replica=self.replica,
                    clients=self.clients,
                    workers=lambda: workers.instances,
                    frontends=lambda: others.instances,
                    record=self._removals.record,
                )
                running.append(tasks.create_task(caretaker.run(), name="caretaker"))
                running.append(tasks.create_task(self._snapshots.run(), name="snapshots"))
                await self._stopping.wait()
                await self._drain()
                for task in reversed(running):
                    task.cancel()
                    await asyncio.wait([task])
        finally:
            await host.workers.close()
            await host.frontends.close()
            await self.clients.close()

    def call(self, request: EngineRequest, sequence_hashes: list[int], block_size: int) -> None:
        """Serve a client's request.

        Raises what `frontend.generation` answers with an error: ShuttingDown, RouterError,
        WorkerError, EventStoreError.
        """
        if self._stopping.is_set():
            raise ShuttingDown()
        call = Call(self, request)
        call.start(sequence_hashes, block_size)

    def abort(self, request_id: str) -> None:
        """The client goes away, if the request still runs."""
        call = self.calls.get(request_id)
        if call is not None and not self.host.is_dead:
            call.cancel()

    def note_routed(self, ticket: Ticket) -> None:
        self._observer.routed(self, ticket)

    def _applied(self, events: list[AnyEvent]) -> None:
        self.router.observe(events)
        self._observer.applied(self, events)

    def _restarted(self) -> None:
        self.router.state_restarted()
        self._observer.restarted(self)

    def _worker_left(self, instance: Instance, ending: Ending) -> None:
        self.router.withdraw(instance.worker_id)
        self.clients.remove(instance, ending)
        if ending is Ending.EXPIRED:
            self._removals.record(WorkerGone(instance.worker_id, instance.registered_seq))

    def _frontend_left(self, instance: FrontendInstance, ending: Ending) -> None:
        if ending is Ending.EXPIRED and instance.frontend_id != self.frontend_id:
            gone = FrontendGone(instance.frontend_id, instance.lease, instance.removed_seq)
            self._removals.record(gone)

    async def _take_snapshot(self, due: Due) -> Outcome:
        # A process of its own in truth. Here it lives and dies with the frontend.
        return await snapshot_taker(self.host).run(self.host.name, due=due)

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self.idle.wait()
        for call in list(self.calls.values()):
            call.fail("shutting_down")
        self.unwritten = await self.publisher.close(FLUSH_S)


class Call:
    """One request through a frontend, as `frontend.generation` takes it, without any text."""

    def __init__(self, frontend: SimulatedFrontend, request: EngineRequest) -> None:
        self._frontend = frontend
        self._request = request
        self._osl = 0
        self._stream: StreamHandle | None = None
        self._ticket: Ticket | None = None

    def start(self, sequence_hashes: list[int], block_size: int) -> None:
        """Accept, route and send. Raises RouterError or WorkerError; the end is then recorded."""
        frontend, request = self._frontend, self._request
        ticket = frontend.router.accept(
            RoutedRequest(
                request_id=request.request_id,
                model=request.model,
                endpoint="completions",
                isl=len(request.token_ids),
                block_size=block_size,
                sequence_hashes=sequence_hashes,
                max_tokens=request.stop_conditions.max_tokens,
            )
        )
        try:
            ticket.route()
            frontend.note_routed(ticket)
            assert ticket.rank is not None
            client = frontend.clients.get(ticket.rank.worker_id)
            if client is None:
                raise WorkerLost(ticket.rank.worker_id, "it just left")
            request.dp_rank = ticket.rank.dp_rank
            self._stream = client.generate(request, self._sink, self._lost)
        except (RouterError, WorkerError) as error:
            ticket.rejected(type(error).__name__, 503)
            raise
        self._ticket = ticket
        frontend.calls[request.request_id] = self
        frontend.idle.clear()

    def cancel(self) -> None:
        self._end(lambda ticket: ticket.cancelled(self._osl, "client disconnected"))

    def fail(self, code: str) -> None:
        self._end(lambda ticket: ticket.failed(self._osl, code))

    def _sink(self, output: Output) -> None:
        ticket = self._ticket
        assert ticket is not None
        if output.error is not None:
            self.fail(output.error[0])
            return
        if output.token_ids and not self._osl:
            ticket.prefill_completed(output.cached_tokens)
        self._osl += len(output.token_ids)
        reason = output.finish_reason
        if reason is not None:
            self._end(lambda ticket: ticket.completed(self._osl, reason, output.cached_tokens))

    def _lost(self, error: WorkerLost) -> None:
        self.fail("worker_lost")

    def _end(self, record: Callable[[Ticket], None]) -> None:
        assert self._ticket is not None and self._stream is not None
        if self._frontend.calls.pop(self._request.request_id, None) is not None:
            self._stream.cancel()
            # A frontend that cannot start ends without ending its requests: its lease will.
            with contextlib.suppress(LogUnavailable):
                record(self._ticket)
            if not self._frontend.calls:
                self._frontend.idle.set()
