"""One namespace of a frontend: its parts, its tasks, the order of starting and stopping.

    discovery ──▶ served models ◀── model files          log ──▶ replica ──▶ router
        └──────▶ worker clients ──connected──▶ router     log ◀── publisher ◀──┘

Nothing here decides anything.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry

from eventstore.control import record_reset
from eventstore.publisher import Publisher
from eventstore.subjects import hex_id, request_producer
from eventstore.tasks import end
from frontend.backing import Backing
from frontend.caretaker import Caretaker
from frontend.metrics import FrontendMetrics
from frontend.model_options import ModelOptions
from frontend.presence import Presence
from frontend.removals import FrontendGone, Removals, WorkerGone
from frontend.served import ServedModel, ServedModels
from frontend.service import Service, Shared
from frontend.settings import FrontendSettings
from frontend.thresholds import LogThresholds
from router.loading import SnapshotLoader
from router.metrics import RouterMetrics
from router.reading import ReadingMark
from router.replica import Replica
from router.router import Router
from router.snapshot_steps import due_of
from router.snapshot_trigger import SnapshotTrigger
from workers.card import FrontendInstance, Instance
from workers.clients import WorkerClients
from workers.discovery import Ending

EPOCH = 1
"""A frontend's id is drawn afresh at every start, so its producer has one epoch."""
FLUSH_S = 2.0
"""How long a shutdown waits for the log to take the last facts."""

_log = logging.getLogger(__name__)


def new_id() -> int:
    """A u64 that no other process draws."""
    return int.from_bytes(os.urandom(8), "big")


class Space:
    """The parts over an open log; `service` is what handlers see of them."""

    def __init__(
        self,
        backing: Backing,
        settings: FrontendSettings,
        shared: Shared,
        frontend_id: int,
        *,
        metrics: FrontendMetrics,
        registry: CollectorRegistry,
        model_options: ModelOptions,
        elsewhere: Callable[[], Iterable[ServedModel]],
        is_late: bool,
    ) -> None:
        """metrics: in `registry`, where those of the router go too. elsewhere: what the frontend
        serves in its other namespaces. is_late: as in `Service`."""
        log, snapshots, marks = backing.log, backing.snapshots, backing.marks
        self._backing = backing
        self._settings = settings
        self._frontend_id = frontend_id
        self._metrics = metrics
        self.publisher = Publisher(log, backing.namespace, request_producer(frontend_id), EPOCH)
        self.replica = Replica(
            log,
            time.time_ns,
            observe=lambda events: self.router.observe(events),
            restarted=lambda: self.router.state_restarted(),
            snapshots=None if snapshots is None else SnapshotLoader(log, snapshots.store),
            event_threads=settings.router_event_threads,
            reading=None if marks is None else ReadingMark(marks, hex_id(frontend_id)),
        )
        self.snapshots = (
            None if snapshots is None else SnapshotTrigger(log, snapshots, due_of(settings))
        )
        self.router = Router(
            replica=self.replica,
            publisher=self.publisher,
            options=settings.router_options,
            frontend_id=frontend_id,
            rng=random.Random(frontend_id),
        )
        self._models = ServedModels(
            backing.download,
            shared.now_s,
            serve=self._serve,
            withdraw=lambda instance: self.router.withdraw(instance.worker_id),
            tell=self._tell,
            options=model_options,
            elsewhere=elsewhere,
        )
        self._thresholds = LogThresholds(
            log,
            backing.namespace,
            self.replica,
            served=lambda: [model.card.name for model in self._models.models()],
            new_id=new_id,
        )
        self._clients = WorkerClients(
            on_connected=self._models.connected, on_disconnected=self._models.disconnected
        )
        self._removals = Removals(log, backing.namespace)
        self.service = Service(
            **{name: getattr(shared, name) for name in Shared.__struct_fields__},
            namespace=backing.namespace,
            is_late=is_late,
            models=self._models,
            clients=self._clients,
            router=self.router,
            replica=self.replica,
            metrics=metrics,
            router_metrics=RouterMetrics(
                registry, self.replica, self.router, self.publisher, self.snapshots
            ),
            registry=registry,
            thresholds=self._thresholds,
            snapshots=self.snapshots,
        )

    async def run(self, address: str, stop: asyncio.Event, started: Callable[[], None]) -> None:
        """Follow the namespace until `stop`, which is set when no request runs any more; then write
        the last facts.

        address: URL of the HTTP server. started: called once there is a picture of the workers.
        Raises DiscoveryError, LogUnavailable.
        """
        backing, settings = self._backing, self._settings
        presence = Presence(backing.frontends, backing.log, backing.namespace, self._frontend_id)
        source = hex_id(self._frontend_id)
        try:
            if settings.router_reset_states and not self.service.is_late:
                # Before the replica asks for the head, so that it is ready only behind it.
                reason = "--router-reset-states"
                await record_reset(backing.log, backing.namespace, reason, self._frontend_id)
            async with asyncio.TaskGroup() as tasks, self.publisher:
                running = [
                    tasks.create_task(self.replica.run(), name="replica"),
                    tasks.create_task(self._models.run(), name="models"),
                    tasks.create_task(self._removals.run(), name="removals"),
                    tasks.create_task(presence.run(address), name="presence"),
                    tasks.create_task(
                        self._thresholds.apply_options(settings.thresholds, source),
                        name="thresholds",
                    ),
                ]
                if self.snapshots is not None:
                    running.append(tasks.create_task(self.snapshots.run(), name="snapshots"))
                workers = await backing.discovery.watch(self._put, self._remove)
                others = await backing.frontends.watch(lambda instance: None, self._frontend_left)
                caretaker = Caretaker(
                    router=self.router,
                    replica=self.replica,
                    clients=self._clients,
                    workers=lambda: workers.instances,
                    frontends=lambda: others.instances,
                    record=self._removals.record,
                )
                running.append(tasks.create_task(caretaker.run(), name="caretaker"))
                started()
                await stop.wait()
                left = await self.publisher.close(FLUSH_S)
                if left:
                    _log.error("%d facts could not be written to the log", left)
                for task in reversed(running):
                    await end(task)
        finally:
            await backing.discovery.close()
            await backing.frontends.close()
            await self._clients.close()

    # --- what happens to workers and frontends ----------------------------------------------------

    def _put(self, instance: Instance) -> None:
        self._models.put(instance)
        self._clients.put(instance)

    def _remove(self, instance: Instance, ending: Ending) -> None:
        self._models.remove(instance.worker_id)
        self._clients.remove(instance, ending)
        self.router.forget_worker(instance.worker_id)
        if ending is Ending.EXPIRED:
            self._removals.record(WorkerGone(instance.worker_id, instance.registered_seq))

    def _frontend_left(self, instance: FrontendInstance, ending: Ending) -> None:
        if ending is Ending.EXPIRED and instance.frontend_id != self._frontend_id:
            gone = FrontendGone(instance.frontend_id, instance.lease, instance.removed_seq)
            self._removals.record(gone)

    def _serve(self, instance: Instance) -> None:
        card = instance.card
        self.router.serve(instance.worker_id, card.name, card.worker_type)
        self._metrics.set_card(card, self._settings.migration_limit)

    def _tell(self, worker_id: int, why: str) -> None:
        client = self._clients.get(worker_id)
        if client is not None:
            client.refuse(self._frontend_id, why)
