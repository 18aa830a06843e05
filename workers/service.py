"""The mock worker process: engines in real time behind the request plane, registered and recorded.

    frontends ──tcp──▶ MockWorker ──▶ RankRunner (one per rank) ──▶ tokens back
                           │     │         └──▶ KvFeed ──▶ log
                           │     └── of a prefill worker: BootstrapServer ◀── decode workers
                           └── Incarnation: log record, lease, feeds

Its end, in order: the log is told, so that nobody chooses it any more; it leaves the list; what
runs may finish, and gets `shutting_down` if it takes too long; the connections are closed.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from eventstore.errors import LogUnavailable
from eventstore.log import EventLog
from eventstore.subjects import hex_id
from eventstore.tasks import end
from workers.bootstrap import WAIT_S, BootstrapServer
from workers.card import Instance
from workers.discovery import Discovery
from workers.engine import MockEngine, RequestRefused
from workers.errors import DiscoveryError
from workers.incarnation import Incarnation
from workers.kv_cache import KvEvent
from workers.kv_feed import EVENTS_MAX, KvFeed
from workers.protocol import Announce, EngineRequest, Output, Pin, Refused
from workers.rank_runner import RankRunner
from workers.sockets import format_address
from workers.tcp_server import Connection, WorkerServer

RETRY_S = 1.0
REFUSALS_MAX = 256
"""Frontends whose refusal is remembered, so that it is logged once."""

_logger = logging.getLogger(__name__)


class CannotListen(Exception):
    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(host, port, why)
        self.host = host
        self.port = port
        self.why = why

    def __str__(self) -> str:
        return f"can't listen on {format_address(self.host, self.port)}: {self.why}"


class MockWorker:
    """One worker over an open log and discovery. `run` until `stop`."""

    def __init__(
        self,
        instance: Instance,
        engines: Sequence[MockEngine],
        log: EventLog,
        discovery: Discovery,
        *,
        new_id: Callable[[], int],
        drain_s: float,
        bootstrap_port: int | None = None,
        bootstrap_wait_s: float = WAIT_S,
        kv_events_max: int = EVENTS_MAX,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """instance: what to register, its card with the role; its id and addresses are filled in.
        engines: one per rank. new_id: draws a u64 that no other worker has. bootstrap_port: where a
        prefill worker hands prompts over (0: a free one; None: nowhere). bootstrap_wait_s: how long
        one end of that waits for the other. kv_events_max: unwritten KV events of a rank; beyond,
        its whole cache is announced instead. jitter: uniform in [0, 1), for retries.
        """
        self._instance = instance
        self._log = log
        self._discovery = discovery
        self._new_id = new_id
        self._drain_s = drain_s
        self._kv_events_max = kv_events_max
        self._jitter = jitter
        self.bootstrap = None if bootstrap_port is None else BootstrapServer(bootstrap_wait_s)
        """Where a prefill worker hands prompts over."""
        self._bootstrap_port = bootstrap_port or 0
        self._runners = [
            RankRunner(
                engine,
                self._kv_events_of(index),
                lambda: self._incarnations[-1].instance.worker_id,
                role=instance.card.worker_type,
                bootstrap=self.bootstrap,
                bootstrap_wait_s=bootstrap_wait_s,
            )
            for index, engine in enumerate(engines)
        ]
        self._server = WorkerServer(self)
        self._incarnations: list[Incarnation] = []
        """Those that are not over: one, or two while the last begins."""
        self._feeds: list[KvFeed] = []
        self._refusals: dict[int, str] = {}
        """By frontend, why it does not use this worker."""
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin the orderly end; `run` returns when it is done."""
        self._stop.set()

    async def run(
        self, host: str, port: int, advertise_host: str, ready: Callable[[Instance], None]
    ) -> None:
        """Serve on `host`:`port` (0: a free one) until `stop`.

        ready: called with the instance once it is registered. Raises CannotListen, and
        LogUnavailable or DiscoveryError if it cannot register.
        """
        port = await _listen(self._server, host, port)
        self._instance = replace(self._instance, address=format_address(advertise_host, port))
        try:
            if self.bootstrap is not None:
                port = await _listen(self.bootstrap, host, self._bootstrap_port)
                at = format_address(advertise_host, port)
                self._instance = replace(self._instance, bootstrap_address=at)
            ready(await self._register())
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(runner.run()) for runner in self._runners]
                staying = tasks.create_task(self._stay_registered())
                await self._stop.wait()
                await end(staying)
                async with asyncio.TaskGroup() as ending:
                    for incarnation in self._incarnations:
                        ending.create_task(incarnation.leave())
                    ending.create_task(self._drain())
                for task in running:
                    task.cancel()
        finally:
            await self._server.close()
            if self.bootstrap is not None:
                await self.bootstrap.close()
            for runner in self._runners:
                await runner.close()
            for incarnation in self._incarnations:
                await incarnation.close()

    # --- Handler: what frontends ask for ------------------------------------------------------

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        try:
            self._runner_for(request).generate(connection, stream, request)
        except RequestRefused as refusal:
            connection.send([Output(stream, [], error=(refusal.code, refusal.message))])
            if self.bootstrap is not None and request.bootstrap is not None:
                self.bootstrap.fail(request.bootstrap.room, refusal.message)

    def on_cancel(self, connection: Connection, stream: int) -> None:
        for runner in self._runners:
            runner.cancel(connection, stream)

    def on_disconnect(self, connection: Connection, streams: frozenset[int]) -> None:
        for stream in streams:
            self.on_cancel(connection, stream)

    def on_announce(self, message: Announce) -> None:
        incarnation = self._incarnations[-1]
        if message.worker_id != incarnation.instance.worker_id or self._stop.is_set():
            return
        if message.dp_rank is None:
            incarnation.lose("the log does not know it")
        elif message.dp_rank in self._instance.ranks() and self._feeds:
            self._feeds[message.dp_rank - self._instance.dp_start].announce_after(message.epoch)

    def on_pin(self, message: Pin) -> None:
        ranks = self._instance.ranks()
        if message.dp_rank not in ranks or message.ttl_s < 1 or self._stop.is_set():
            return
        runner = self._runners[message.dp_rank - ranks.start]
        try:
            blocks = runner.pin(message.token_ids, message.ttl_s)
        except OverflowError as error:
            _logger.warning("prompt not pinned why=%s", error)
        else:
            _logger.debug("pinned blocks=%d ttl_s=%d", blocks, message.ttl_s)

    def on_refused(self, message: Refused) -> None:
        if message.worker_id != self._incarnations[-1].instance.worker_id:
            return
        if self._refusals.get(message.frontend_id) == message.why:
            return
        if len(self._refusals) >= REFUSALS_MAX:
            del self._refusals[next(iter(self._refusals))]
        self._refusals[message.frontend_id] = message.why
        frontend = hex_id(message.frontend_id)
        _logger.error("no requests from frontend %s why=%s", frontend, message.why)

    def running(self, connection: Connection) -> list[int]:
        return [number for runner in self._runners for number in runner.streams_of(connection)]

    def _runner_for(self, request: EngineRequest) -> RankRunner:
        """Raises RequestRefused."""
        if self._stop.is_set():
            raise RequestRefused("shutting_down", "the worker is shutting down")
        if request.model != self._instance.card.name:
            served = self._instance.card.name
            raise RequestRefused("invalid_request", f"{served} is served here, not {request.model}")
        ranks = self._instance.ranks()
        if request.dp_rank not in ranks:
            raise RequestRefused("invalid_request", f"there is no rank {request.dp_rank} here")
        return self._runners[request.dp_rank - ranks.start]

    # --- its life -----------------------------------------------------------------------------

    def _kv_events_of(self, index: int) -> Callable[[list[KvEvent]], None]:
        # The feeds are others after a loss; look them up each time.
        return lambda events: self._feeds[index].publish(events)

    async def _register(self) -> Instance:
        """Begin an incarnation and let its feeds take over."""
        engines = [runner.engine for runner in self._runners]
        instance = replace(self._instance, worker_id=self._new_id())
        incarnation = Incarnation(
            self._log,
            self._discovery,
            instance,
            engines,
            kv_events_max=self._kv_events_max,
            jitter=self._jitter,
        )
        self._incarnations.append(incarnation)
        first = not self._feeds
        while True:
            try:
                await incarnation.begin()
            except (LogUnavailable, DiscoveryError) as error:
                if first:
                    await incarnation.leave()  # it may be recorded or listed by half
                    raise
                _logger.warning("cannot register yet, will try again: %s", error)
                await asyncio.sleep(RETRY_S)
            else:
                self._feeds = incarnation.feeds
                for feed, runner in zip(self._feeds, self._runners, strict=True):
                    feed.follow_pins(runner.pinned)
                return incarnation.instance

    async def _stay_registered(self) -> None:
        """Take a new id whenever the last one is lost, until cancelled."""
        while True:
            old = self._incarnations[-1]
            cause = await asyncio.shield(old.lost)
            name = hex_id(old.instance.worker_id)
            _logger.warning("registration lost worker=%s why=%s", name, cause)
            await old.bury()
            instance = await self._register()
            _logger.info("registered anew worker=%s before=%s", hex_id(instance.worker_id), name)
            await old.close()
            self._incarnations.remove(old)

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s):
                for runner in self._runners:
                    await runner.idle.wait()
        except TimeoutError:
            left = sum(runner.stream_count for runner in self._runners)
            _logger.warning("requests cut off count=%d after_s=%g", left, self._drain_s)
            for runner in self._runners:
                runner.end_streams("shutting_down", "the worker is shutting down")


async def _listen(server: WorkerServer | BootstrapServer, host: str, port: int) -> int:
    """The port. Raises CannotListen."""
    try:
        return await server.start(host, port)
    except OSError as error:
        raise CannotListen(host, port, error.strerror or str(error)) from error
