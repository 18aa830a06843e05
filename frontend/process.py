"""One frontend process: connect the parts, serve until told to stop, take them apart in order.

    discovery ──▶ served models ◀── model files          log ──▶ replica ──▶ router
        └──────▶ worker clients ──connected──▶ router     log ◀── publisher ◀──┘

Nothing here decides anything; it owns the tasks and the order of starting and stopping.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry

from eventstore.control import record_reset
from eventstore.log import EventLog
from eventstore.publisher import Publisher
from eventstore.subjects import hex_id, request_producer
from eventstore.tasks import end
from frontend.app import make_app
from frontend.caretaker import Caretaker
from frontend.errors import ShuttingDown
from frontend.metrics import FrontendMetrics
from frontend.presence import Presence
from frontend.removals import FrontendGone, Removals, WorkerGone
from frontend.served import Download, ServedModels
from frontend.service import Limits, Service
from frontend.settings import FrontendSettings
from frontend.thresholds import LogThresholds
from router.loading import SnapshotLoader
from router.metrics import RouterMetrics
from router.replica import Replica
from router.router import Router
from router.snapshot_steps import due_of
from router.snapshot_trigger import Snapshots, SnapshotTrigger
from workers.card import FrontendInstance, Instance
from workers.clients import WorkerClients
from workers.discovery import Discovery, Ending, Leases

EPOCH = 1
"""A frontend's id is drawn afresh at every start, so its producer has one epoch."""
FLUSH_S = 2.0
"""How long a shutdown waits for the log to take the last facts."""
CANCEL_S = 1.0
"""How long handlers have to write the ends of their answers."""
LINGER_S = 1.0
"""How long the rest of a refused body is read, so that the client sees why."""
TICK_S = 0.1
"""How late a request may be given up, at most."""
BACKLOG = 1024
KEEPALIVE_S = 75
"""How long an idle connection is kept: longer than the 60 s of common load balancers."""

_log = logging.getLogger(__name__)


def new_id() -> int:
    """A u64 that no other process draws."""
    return int.from_bytes(os.urandom(8), "big")


async def keep_time(service: Service) -> None:
    """End what has taken or waited too long, until cancelled."""
    while True:
        await asyncio.sleep(TICK_S)
        service.router.release()
        if service.deadlines.are_set:
            now_s = service.clock()
            for generation in list(service.live):
                generation.check_deadlines(now_s)


class PortInUse(Exception):
    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(host, port, why)
        self.port = port
        self.why = why

    def __str__(self) -> str:
        return f"can't listen on port {self.port}: {self.why}"


class FrontendProcess:
    """The parts of one frontend over an open log."""

    def __init__(
        self,
        settings: FrontendSettings,
        namespace: str,
        log: EventLog,
        stop: asyncio.Event,
        limits: Limits | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        """stop: set it to begin the orderly end; `run` returns when that is done.
        limits: None takes them from the settings. snapshots: None looks for none and takes none."""
        self._limits = limits or Limits(body_bytes_max=settings.http_body_limit_bytes)
        self._settings = settings
        self._namespace = namespace
        self._log = log
        self._stop = stop
        self.frontend_id = new_id()
        _log.info("frontend %s mode=%s", hex_id(self.frontend_id), settings.router_mode)
        self.publisher = Publisher(log, namespace, request_producer(self.frontend_id), EPOCH)
        self.replica = Replica(
            log,
            time.time_ns,
            observe=lambda events: self.router.observe(events),
            restarted=lambda: self.router.state_restarted(),
            snapshots=None if snapshots is None else SnapshotLoader(log, snapshots.store),
        )
        self.snapshots = (
            None if snapshots is None else SnapshotTrigger(log, snapshots, due_of(settings))
        )
        self.router = Router(
            replica=self.replica,
            publisher=self.publisher,
            options=settings.router_options,
            frontend_id=self.frontend_id,
            rng=random.Random(self.frontend_id),
        )

    async def run(
        self,
        discovery: Discovery,
        frontends: Leases[FrontendInstance],
        download: Download,
        listening: Callable[[str], None],
    ) -> None:
        """Serve until `stop` is set. discovery, frontends: the lists of workers and frontends.
        listening: called with the address once requests are taken.

        Raises PortInUse, DiscoveryError, LogUnavailable.
        """
        registry = CollectorRegistry()
        metrics = FrontendMetrics(registry, self._settings.metrics_prefix)
        models = ServedModels(
            download,
            time.time,
            serve=lambda instance: self._serve(instance, metrics),
            withdraw=lambda instance: self.router.withdraw(instance.worker_id),
        )
        thresholds = LogThresholds(
            self._log,
            self._namespace,
            self.replica,
            served=lambda: [model.card.name for model in models.models()],
            new_id=new_id,
        )
        clients = WorkerClients(on_connected=models.connected, on_disconnected=models.disconnected)
        service = Service(
            models=models,
            clients=clients,
            router=self.router,
            replica=self.replica,
            metrics=metrics,
            router_metrics=RouterMetrics(
                registry, self.replica, self.router, self.publisher, self.snapshots
            ),
            registry=registry,
            limits=self._limits,
            clock=time.perf_counter,
            now_s=time.time,
            draining=asyncio.Event(),
            live=set(),
            snapshots=self.snapshots,
            thresholds=thresholds,
            overload_status=self._settings.http_overload_status_code,
            migration_limit=self._settings.migration_limit,
            cache_control=self._settings.enable_cache_control,
            deadlines=self._settings.deadlines,
            disaggregation=self._settings.disaggregation,
        )
        removals = Removals(self._log, self._namespace)
        presence = Presence(frontends, self._log, self._namespace, self.frontend_id)

        def put(instance: Instance) -> None:
            models.put(instance)
            clients.put(instance)

        def remove(instance: Instance, ending: Ending) -> None:
            models.remove(instance.worker_id)
            clients.remove(instance, ending)
            self.router.forget_worker(instance.worker_id)
            if ending is Ending.EXPIRED:
                removals.record(WorkerGone(instance.worker_id, instance.registered_seq))

        def frontend_left(instance: FrontendInstance, ending: Ending) -> None:
            if ending is Ending.EXPIRED and instance.frontend_id != self.frontend_id:
                gone = FrontendGone(instance.frontend_id, instance.lease, instance.removed_seq)
                removals.record(gone)

        runner = web.AppRunner(
            make_app(service),
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=LINGER_S,
            shutdown_timeout=CANCEL_S,
        )
        await runner.setup()
        try:
            if self._settings.router_reset_states:
                # Before the replica asks for the head, so that it is ready only behind it.
                reason = "--router-reset-states"
                await record_reset(self._log, self._namespace, reason, self.frontend_id)
            address = await self._listen(runner)
            async with asyncio.TaskGroup() as tasks, self.publisher:
                running = [
                    tasks.create_task(self.replica.run(), name="replica"),
                    tasks.create_task(models.run(), name="models"),
                    tasks.create_task(removals.run(), name="removals"),
                    tasks.create_task(presence.run(address), name="presence"),
                    tasks.create_task(
                        thresholds.apply_options(
                            self._settings.thresholds, hex_id(self.frontend_id)
                        ),
                        name="thresholds",
                    ),
                    tasks.create_task(keep_time(service), name="deadlines"),
                ]
                if self.snapshots is not None:
                    running.append(tasks.create_task(self.snapshots.run(), name="snapshots"))
                workers = await discovery.watch(put, remove)
                others = await frontends.watch(lambda instance: None, frontend_left)
                caretaker = Caretaker(
                    router=self.router,
                    replica=self.replica,
                    clients=clients,
                    workers=lambda: workers.instances,
                    frontends=lambda: others.instances,
                    record=removals.record,
                )
                running.append(tasks.create_task(caretaker.run(), name="caretaker"))
                listening(address)
                await self._stop.wait()
                service.draining.set()
                await self._drain(runner, service)
                for task in reversed(running):
                    await end(task)
        finally:
            await runner.cleanup()
            await discovery.close()
            await frontends.close()
            await clients.close()

    def _serve(self, instance: Instance, metrics: FrontendMetrics) -> None:
        card = instance.card
        self.router.serve(instance.worker_id, card.name, card.worker_type)
        metrics.set_card(card, self._settings.migration_limit)

    async def _listen(self, runner: web.AppRunner) -> str:
        host, port = self._settings.http_host, self._settings.http_port
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            raise PortInUse(host, port, error.strerror or str(error)) from error
        bound = runner.addresses[0]
        return f"http://{bound[0]}:{bound[1]}"

    async def _drain(self, runner: web.AppRunner, service: Service) -> None:
        """Let running requests finish, then end those that did not, then write the last facts."""
        patience_s = self._settings.http_graceful_shutdown_timeout_secs
        if service.live:
            _log.info("%d requests are running; waiting up to %g s", len(service.live), patience_s)
            await asyncio.wait([each.done for each in service.live], timeout=patience_s)
        for generation in list(service.live):
            generation.fail(ShuttingDown())
        await runner.cleanup()
        left = await self.publisher.close(FLUSH_S)
        if left:
            _log.error("%d facts could not be written to the log", left)
