"""The namespaces of one frontend: the one that it is told, or all that begin in some way.

With a prefix the log is asked every second which namespaces there are. A new one is taken up, and
one that can't be is tried again. One that was taken up is kept, whatever becomes of its log: a log
that is deleted may come back, as it would for a frontend of one namespace.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry

from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.tasks import end
from frontend.backing import Backing, Backings
from frontend.metrics import FrontendMetrics
from frontend.model_options import ModelOptions
from frontend.served import ServedModel
from frontend.service import Frontend
from frontend.settings import FrontendSettings
from frontend.space import Space
from workers.errors import WorkerError

LOOK_S = 1.0
NAMESPACES_MAX = 64
"""Each costs a replica of its log. Further ones are left out, and named in /health."""

_log = logging.getLogger(__name__)


class Spaces:
    """Fills `frontend.services`, and `frontend.unusable`."""

    def __init__(
        self,
        backings: Backings,
        settings: FrontendSettings,
        frontend: Frontend,
        frontend_id: int,
        model_options: ModelOptions,
    ) -> None:
        self.by_namespace: dict[str, Space] = {}
        self._backings = backings
        self._settings = settings
        self._frontend = frontend
        self._frontend_id = frontend_id
        self._model_options = model_options
        self._stop = asyncio.Event()
        self._late = False

    def stop(self) -> None:
        """No request runs any more: `run` writes the last facts and returns."""
        self._stop.set()

    async def run(self, address: str, started: Callable[[], None]) -> None:
        """Follow the namespaces until `stop`.

        address: URL of the HTTP server. started: called once there is a picture of the workers of
        each namespace that there is. Raises LogUnavailable, and what else keeps a start from
        succeeding: without a prefix, whatever keeps from the one namespace.
        """
        prefix = self._settings.namespace_prefix
        if prefix is None:
            await self._follow(self._settings.log_namespace, address, started, create=True)
            return
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._look_for_ever(prefix, address, tasks, started))
            await self._stop.wait()
            await end(looking)

    async def _look_for_ever(
        self, prefix: str, address: str, tasks: asyncio.TaskGroup, started: Callable[[], None]
    ) -> None:
        clock = asyncio.get_running_loop().time
        first_until_s = clock() + self._settings.nats_wait_secs
        is_told = False
        while True:
            try:
                found = await self._backings.find(prefix)
            except LogUnavailable as error:
                if not self._late and clock() >= first_until_s:
                    raise
                if not is_told:
                    _log.warning("cannot tell which namespaces there are: %s", error)
                is_told = True
            else:
                is_told = False
                await self._take_up(found, address, tasks)
                if not self._late:
                    self._late = self._frontend.has_looked = True
                    started()
            await asyncio.sleep(LOOK_S)

    async def _take_up(
        self, found: Collection[str], address: str, tasks: asyncio.TaskGroup
    ) -> None:
        """Follow those that are not followed yet; returns once it is known of each how it went."""
        unusable = self._frontend.unusable
        waiting: list[asyncio.Future[None]] = []
        for namespace in found:
            if namespace in self.by_namespace:
                continue
            if len(self.by_namespace) + len(waiting) >= NAMESPACES_MAX:
                self._leave_out(namespace, f"there are {NAMESPACES_MAX} already")
                continue
            known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(known)
            tasks.create_task(self._try(namespace, address, known), name=f"space {namespace}")
        for namespace in unusable.keys() - set(found):
            del unusable[namespace]
        if waiting:
            await asyncio.wait(waiting)

    async def _try(self, namespace: str, address: str, known: "asyncio.Future[None]") -> None:
        """Follow the namespace if it can be; `known` is set once that is clear."""

        def started() -> None:
            self._frontend.unusable.pop(namespace, None)
            _log.info("namespace added namespace=%s", namespace)
            known.set_result(None)

        try:
            await self._follow(namespace, address, started, create=False)
        except* (EventStoreError, WorkerError) as group:
            self._leave_out(namespace, str(_first(group)))
        finally:
            if not known.done():
                known.set_result(None)

    def _leave_out(self, namespace: str, why: str) -> None:
        if self._frontend.unusable.get(namespace) != why:
            _log.error("namespace left out namespace=%s why=%s", namespace, why)
        self._frontend.unusable[namespace] = why

    async def _follow(
        self, namespace: str, address: str, started: Callable[[], None], *, create: bool
    ) -> None:
        """One namespace, from the opening of its log to the end."""
        backing = await self._backings.open(namespace, create=create)
        try:
            space = self._space(backing)
            self.by_namespace[namespace] = space
            self._frontend.services[namespace] = space.service
            if self._frontend.prefix is None:
                self._frontend.has_looked = True
            await space.run(address, self._stop, started)
        except BaseException:
            self.by_namespace.pop(namespace, None)
            self._frontend.services.pop(namespace, None)
            raise
        finally:
            await backing.close()

    def _space(self, backing: Backing) -> Space:
        frontend, settings, registry = self._frontend, self._settings, self._frontend.registry
        metrics = frontend.metrics
        if frontend.prefix is not None:
            # The names are the same in all of them: each has a registry of its own.
            registry = CollectorRegistry()
            metrics = FrontendMetrics(registry, settings.metrics_prefix)
        return Space(
            backing,
            settings,
            frontend,
            self._frontend_id,
            metrics=metrics,
            registry=registry,
            model_options=self._model_options,
            elsewhere=lambda: self._elsewhere(backing.namespace),
            is_late=self._late,
        )

    def _elsewhere(self, namespace: str) -> Iterable[ServedModel]:
        for other, service in self._frontend.services.items():
            if other != namespace:
                yield from service.models.models()


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
