"""One frontend process: its HTTP server, its namespaces, and the order of their ends.

`frontend.space` has the parts of a namespace. Nothing here decides anything.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry

from eventstore.subjects import hex_id
from eventstore.tasks import end
from frontend.app import make_app
from frontend.backing import Backings
from frontend.connections import GuardedSite
from frontend.errors import ShuttingDown
from frontend.metrics import FrontendMetrics
from frontend.model_options import ModelOptions
from frontend.service import Frontend, Limits
from frontend.settings import FrontendSettings
from frontend.space import Space, new_id
from frontend.spaces import Spaces
from frontend.tls import Certificate

CANCEL_S = 1.0
"""How long handlers have to write the ends of their answers."""
TICK_S = 0.1
"""How late a request may be given up, at most."""

_log = logging.getLogger(__name__)


async def keep_time(frontend: Frontend) -> None:
    """End what has taken or waited too long, until cancelled."""
    while True:
        await asyncio.sleep(TICK_S)
        for service in list(frontend.services.values()):
            service.router.release()
        if frontend.deadlines.are_set:
            now_s = frontend.clock()
            for generation in list(frontend.live):
                generation.check_deadlines(now_s)


class PortInUse(Exception):
    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(host, port, why)
        self.port = port
        self.why = why

    def __str__(self) -> str:
        return f"can't listen on port {self.port}: {self.why}"


class FrontendProcess:
    """One frontend over the namespaces that its settings name."""

    def __init__(
        self,
        settings: FrontendSettings,
        backings: Backings,
        stop: asyncio.Event,
        limits: Limits | None = None,
    ) -> None:
        """stop: set it to begin the orderly end; `run` returns when that is done.
        limits: None takes them from the settings.

        Raises BadModelPath, BadCertificate. Reads the files of --model-path and of --tls-*.
        """
        self._settings = settings
        self._certificate: Certificate | None = None
        if settings.tls_cert_path is not None and settings.tls_key_path is not None:
            self._certificate = Certificate(settings.tls_cert_path, settings.tls_key_path)
        self._stop = stop
        self.frontend_id = new_id()
        _log.info("frontend %s mode=%s", hex_id(self.frontend_id), settings.router_mode)
        registry = CollectorRegistry()
        for collector in backings.collectors:
            registry.register(collector)
        self._frontend = Frontend(
            prefix=settings.namespace_prefix,
            metrics=FrontendMetrics(registry, settings.metrics_prefix),
            registry=registry,
            services={},
            unusable={},
            limits=limits or Limits(body_bytes_max=settings.http_body_limit_bytes),
            clock=time.perf_counter,
            now_s=time.time,
            draining=asyncio.Event(),
            live=set(),
            overload_status=settings.http_overload_status_code,
            migration_limit=settings.migration_limit,
            cache_control=settings.enable_cache_control,
            deadlines=settings.deadlines,
            disaggregation=settings.disaggregation,
        )
        model_options = ModelOptions.read(
            settings.model_name, settings.model_path, settings.kv_cache_block_size
        )
        self._spaces = Spaces(backings, settings, self._frontend, self.frontend_id, model_options)

    @property
    def spaces(self) -> dict[str, Space]:
        """The namespaces that are followed now. For looking at."""
        return self._spaces.by_namespace

    async def run(self, listening: Callable[[str], None]) -> None:
        """Serve until `stop` is set. listening: called with the address once requests are taken.

        Raises PortInUse, DiscoveryError, LogUnavailable.
        """
        runner = web.AppRunner(
            make_app(self._frontend, self._settings.paths),
            handler_cancellation=True,
            shutdown_timeout=CANCEL_S,
        )
        await runner.setup()
        try:
            address = await self._listen(runner)
            async with asyncio.TaskGroup() as tasks:
                following = self._spaces.run(address, lambda: listening(address))
                tasks.create_task(following, name="namespaces")
                watching = [tasks.create_task(keep_time(self._frontend), name="deadlines")]
                if self._certificate is not None:
                    renewing = self._certificate.follow()
                    watching.append(tasks.create_task(renewing, name="certificate"))
                await self._stop.wait()
                self._frontend.draining.set()
                await self._drain(runner)
                for each in watching:
                    await end(each)
                self._spaces.stop()
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> str:
        host, port = self._settings.http_host, self._settings.http_port
        context = None if self._certificate is None else self._certificate.context
        site = GuardedSite(runner, host, port, self._frontend.limits, context)
        try:
            await site.start()
        except OSError as error:
            raise PortInUse(host, port, error.strerror or str(error)) from error
        return site.name

    async def _drain(self, runner: web.AppRunner) -> None:
        """Let running requests finish, then end those that did not."""
        patience_s, live = self._settings.http_graceful_shutdown_timeout_secs, self._frontend.live
        if live:
            _log.info("%d requests are running; waiting up to %g s", len(live), patience_s)
            await asyncio.wait([each.done for each in live], timeout=patience_s)
        # Those that wait for a worker first: the others' ends would let them on.
        for generation in sorted(live, key=lambda each: each.worker is not None):
            generation.fail(ShuttingDown())
        await runner.cleanup()
