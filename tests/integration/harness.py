"""A whole frontend in this process, over real sockets, with a worker that does what a test says."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import workers
from eventstore import codec, events
from eventstore.memory import MemoryLog
from frontend.process import FrontendProcess
from frontend.service import Limits
from frontend.settings import FrontendSettings
from frontend.space import Space
from frontend.tokenizer import Tokenizer, read_files
from router.snapshot_trigger import Snapshots
from tests.integration.mem_backings import MemBackings
from tests.waiting import eventually
from workers.card import FrontendInstance, Instance, ModelCard
from workers.discovery import MemDiscovery, MemLeases
from workers.protocol import Announce, EngineRequest, Output, Pin, Refused
from workers.registry import record_registered
from workers.tcp_server import Connection, WorkerServer

MODEL_DIR = Path(workers.__file__).parent / "model"
FILES = read_files(MODEL_DIR)
TOKENIZER = Tokenizer.from_files(FILES)
MODEL = "tiny"
NAMESPACE = "test"


async def download(files: Mapping[str, str]) -> Mapping[str, bytes]:
    return FILES


def card(**changes: object) -> ModelCard:
    fields: dict[str, object] = {
        "name": MODEL,
        "block_size": 16,
        "context_length": 4096,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()},
        "eos_token_ids": list(TOKENIZER.eos_token_ids),
        "total_kv_blocks": 1000,
    }
    return ModelCard(**{**fields, **changes})  # type: ignore[arg-type]


class Stream:
    """One request as the worker got it."""

    def __init__(self, connection: Connection, number: int, request: EngineRequest) -> None:
        self.connection = connection
        self.number = number
        self.request = request
        self.cancelled = False
        self.forgotten = False
        """Set: the worker does not know of it any more."""

    def send(
        self,
        text: str = "",
        *,
        ids: list[int] | None = None,
        finish: str | None = None,
        cached: int | None = None,
        error: tuple[str, str] | None = None,
        params: dict[str, Any] | None = None,
    ) -> None:
        ids = TOKENIZER.encode(text, add_special_tokens=False) if ids is None else ids
        self.connection.send([Output(self.number, ids, finish, cached, error, params)])


class ScriptedWorker:
    """A worker whose engine is the test. `echo`: answers every request at once with that text."""

    def __init__(self, worker_id: int, echo: str | None = None) -> None:
        self.worker_id = worker_id
        self.echo = echo
        self.error: tuple[str, str] | None = None
        """What it answers every request with at once, before `echo`."""
        self.streams: list[Stream] = []
        self.announces: list[Announce] = []
        self.pins: list[Pin] = []
        self.refusals: list[Refused] = []
        self.server = WorkerServer(self)
        self.instance: Instance | None = None

    async def start(
        self,
        log: MemoryLog,
        discovery: MemDiscovery,
        namespace: str,
        model: ModelCard,
        bootstrap_address: str | None = None,
        dp_size: int = 1,
    ) -> None:
        port = await self.server.start("127.0.0.1", 0)
        instance = Instance(
            worker_id=self.worker_id,
            namespace=namespace,
            component="backend",
            endpoint="generate",
            address=f"127.0.0.1:{port}",
            card=model,
            bootstrap_address=bootstrap_address,
            dp_size=dp_size,
        )
        await record_registered(log, instance)
        await discovery.register(instance, lambda cause: None)
        self.instance = instance

    def on_generate(self, connection: Connection, stream: int, request: EngineRequest) -> None:
        made = Stream(connection, stream, request)
        self.streams.append(made)
        if self.error is not None:
            made.send(error=self.error)
        elif self.echo is not None:
            made.send(self.echo, finish="stop", cached=0)

    def on_cancel(self, connection: Connection, stream: int) -> None:
        self._cancelled(connection, {stream})

    def on_disconnect(self, connection: Connection, streams: frozenset[int]) -> None:
        self._cancelled(connection, set(streams))

    def on_announce(self, message: Announce) -> None:
        self.announces.append(message)

    def on_pin(self, message: Pin) -> None:
        self.pins.append(message)

    def on_refused(self, message: Refused) -> None:
        self.refusals.append(message)

    def running(self, connection: Connection) -> list[int]:
        return [
            stream.number
            for stream in self.streams
            if stream.connection is connection and not stream.forgotten
        ]

    def _cancelled(self, connection: Connection, numbers: set[int]) -> None:
        for stream in self.streams:
            if stream.connection is connection and stream.number in numbers:
                stream.cancelled = True

    async def next(self, index: int = 0) -> Stream:
        """The stream of that index, once it is here."""
        await eventually(lambda: len(self.streams) > index)
        return self.streams[index]


class Harness:
    def __init__(
        self,
        backings: MemBackings,
        frontend: FrontendProcess,
        stop: asyncio.Event,
    ) -> None:
        self.backings = backings
        self.stop = stop
        self.url = ""
        self.workers: list[ScriptedWorker] = []
        self._frontend = frontend

    @property
    def spaces(self) -> dict[str, Space]:
        """What the frontend follows, by namespace."""
        return self._frontend.spaces

    @property
    def process(self) -> Space:
        """All that the frontend has of the namespace `test`."""
        return self.spaces[NAMESPACE]

    @property
    def log(self) -> MemoryLog:
        return self.backings.namespaces[NAMESPACE].log

    @property
    def discovery(self) -> MemDiscovery:
        return self.backings.namespaces[NAMESPACE].discovery

    @property
    def frontends(self) -> MemLeases[FrontendInstance]:
        return self.backings.namespaces[NAMESPACE].frontends

    async def add_worker(
        self,
        worker_id: int,
        echo: str | None = None,
        model: ModelCard | None = None,
        bootstrap_address: str | None = None,
        *,
        dp_size: int = 1,
        namespace: str = NAMESPACE,
    ) -> ScriptedWorker:
        worker = ScriptedWorker(worker_id, echo)
        self.workers.append(worker)
        chosen, at = model or card(), self.backings.namespaces[namespace]
        await worker.start(at.log, at.discovery, namespace, chosen, bootstrap_address, dp_size)
        return worker

    async def until_served(self, model: str = MODEL, **workers: int) -> None:
        """workers: how many by role; one aggregated one, if nothing is said."""
        router = self.process.router

        def are_there() -> bool:
            return all(
                len(router.candidates(model, role).ranks) == count
                for role, count in workers.items()
            )

        await eventually(are_there if workers else lambda: router.has_workers(model))

    async def settle(self) -> None:
        """Until every fact has been written and folded."""
        replica = self.process.replica
        await self.process.publisher.flush(5)
        head = (await self.log.extent()).last_seq
        await eventually(lambda: replica.state.cursor >= head)
        replica.state.check()

    async def recorded(self) -> list[events.AnyEvent]:
        found: list[events.AnyEvent] = []
        async for record in self.log.read(1):
            batch = codec.decode(record.data).batch
            assert batch is not None
            found += batch.events
        return found

    async def assert_nothing_left(self) -> None:
        """No booking, no live request, no open stream, wherever the requests ended."""
        await eventually(lambda: self.process.router.live_requests == 0)
        await self.settle()
        state = self.process.replica.state
        assert not state.requests and not any(state.active.blocks)
        assert not any(state.active.prefill_tokens)
        assert self.process.router.overlay_bookings == 0
        assert state.anomalies.out_of_order == 0


@asynccontextmanager
async def frontend(
    limits: Limits | None = None,
    *,
    beside: Harness | None = None,
    snapshots: Snapshots | None = None,
    backings: MemBackings | None = None,
    **settings: object,
) -> AsyncIterator[Harness]:
    """A frontend on a free port, with no worker yet; stopped in order at the end.

    beside: a frontend of the same deployment, which outlives this one. backings: the namespaces
    there are, of which it serves what the settings say; None: one, which it serves.
    """
    chosen: dict[str, object] = {
        "http_host": "127.0.0.1",
        "http_port": 0,
        "router_mode": "kv",
        "router_replica_sync": True,
        "http_graceful_shutdown_timeout_secs": 0.2,
        "namespace": NAMESPACE,
        **settings,
    }
    chosen_backings = backings
    if beside is not None:
        chosen_backings = beside.backings
    elif chosen_backings is None:
        chosen_backings = MemBackings(download, snapshots)
        chosen_backings.add(NAMESPACE)
    stop = asyncio.Event()
    settings_table = FrontendSettings(**chosen)  # type: ignore[arg-type]
    process = FrontendProcess(settings_table, chosen_backings, stop, limits)
    harness = Harness(chosen_backings, process, stop)

    def listening(url: str) -> None:
        harness.url = url

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(process.run(listening))
        await eventually(lambda: harness.url != "" or running.done())
        await eventually(
            lambda: (
                all(space.replica.is_ready for space in process.spaces.values()) or running.done()
            )
        )
        try:
            yield harness
        finally:
            stop.set()
            await asyncio.wait([running])
            for worker in harness.workers:
                await worker.server.close()
            for namespace in chosen_backings.namespaces.values() if beside is None else ():
                await namespace.log.close()
