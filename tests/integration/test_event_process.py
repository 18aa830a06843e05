"""`--router-event-threads`: a process of its own receives the events, and nothing else changes."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from eventstore import codec
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent, BlockRemoved, BlockStored, KvRebased, WorkerRegistered
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog, Following, Record
from eventstore.relayed import WAITING_BYTES_MAX, RelayedFollowing
from eventstore.server import EmbeddedServer
from eventstore.subjects import kv_producer, subject, worker_producer
from eventstore.tasks import end
from router.replica import Replica
from tests.integration.processes import deployment
from tests.log_contract import WITHIN_S, Collected, LogContract
from tests.waiting import eventually

READ_BYTES_MAX = 256 * 1024
"""What a pipe's transport may hand over in one piece."""


class FollowedApart(JetStreamLog):
    """Every following of it is by a process of its own."""

    async def follow(  # type: ignore[override]
        self, start_seq: int, handle: Callable[[Record], None]
    ) -> Following:
        def in_one_step(record: Record) -> Iterator[None]:
            handle(record)
            yield

        return await self.follow_apart(start_seq, in_one_step)


class TestFollowedApart(LogContract):
    @pytest.fixture
    async def log(self, nats: Nats, namespace: str) -> AsyncIterator[EventLog]:
        log = await FollowedApart.open(nats, namespace)
        yield log
        await log.close()


@pytest.fixture
async def log(nats: Nats, namespace: str) -> AsyncIterator[JetStreamLog]:
    log = await JetStreamLog.open(nats, namespace)
    yield log
    await log.close()


@asynccontextmanager
async def replica(log: EventLog, event_threads: int) -> AsyncIterator[Replica]:
    made = Replica(log, time.time_ns, event_threads=event_threads)
    running = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(WITHIN_S):
            await made.wait_ready()
        yield made
    finally:
        await end(running)


class Workers:
    """Appends what workers say, in records of a few blocks and of thousands."""

    def __init__(self, log: EventLog, namespace: str) -> None:
        self._log = log
        self._namespace = namespace
        self._rng = Random(1)
        self._numbers: dict[str, int] = {}

    async def register(self, worker: int) -> None:
        event = WorkerRegistered(worker, "m", "aggregated", 16)
        await self._append(worker_producer(worker), [event])

    async def cache(self, worker: int, blocks: int) -> None:
        chain = [self._rng.getrandbits(64) for _ in range(blocks)]
        stored = BlockStored(worker, 0, None, chain)
        removed = BlockRemoved(worker, 0, chain[blocks // 2 :])
        again = KvRebased(worker, 0, "asked")
        both: list[AnyEvent] = [stored, removed, again, stored, removed]
        await self._append(kv_producer(worker, 0), both)

    async def _append(self, producer: str, events: list[AnyEvent]) -> None:
        first = self._numbers.get(producer, 0)
        self._numbers[producer] = first + len(events)
        data = codec.encode(producer, 1, first, events)
        await eventually(
            lambda: self._appended(producer, data, f"{producer}.{first}"), within_s=WITHIN_S
        )

    async def _appended(self, producer: str, data: bytes, msg_id: str) -> bool:
        """As a publisher does: the same msg_id until the log has it."""
        try:
            await self._log.append(subject(self._namespace, producer), data, msg_id=msg_id)
        except LogUnavailable:
            return False
        return True


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_replicas_agree_whoever_receives(log: JetStreamLog, namespace: str) -> None:
    workers = Workers(log, namespace)
    for worker in (1, 2, 3):
        await workers.register(worker)
        await workers.cache(worker, 5_000)
    async with replica(log, 1) as here, replica(log, 4) as apart:
        for number in range(60):
            await workers.cache(1 + number % 3, 7 if number % 10 else 9_000)
        await eventually(lambda: here.state.cursor == apart.state.cursor == 66)
        assert here.status().digest == apart.status().digest
        assert here.applied == apart.applied
        apart.state.check()
        assert (here.events.threads, here.events.process) == (1, None)
        assert apart.events.threads == 4
        assert apart.events.process is not None
        pid = apart.events.process
        assert is_alive(pid)
    assert not is_alive(pid)


async def test_a_killed_process_is_replaced(log: JetStreamLog, namespace: str) -> None:
    workers = Workers(log, namespace)
    await workers.register(1)
    async with replica(log, 2) as apart, replica(log, 1) as here:
        await eventually(lambda: apart.events.process is not None)
        first = apart.events.process
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await workers.cache(1, 100)
        await eventually(lambda: here.state.cursor == apart.state.cursor == 2)
        assert apart.events.process not in (None, first)
        assert apart.restarts == 0
        assert here.status().digest == apart.status().digest


async def test_without_a_process_the_loop_receives(
    log: JetStreamLog, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await Workers(log, namespace).register(1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    async with replica(log, 4) as made:
        assert made.state.cursor == 1
        assert made.events.process is None


async def test_a_process_that_ends_at_once_is_done_without(
    log: JetStreamLog, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Workers(log, namespace).register(1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    async with replica(log, 4) as made:
        assert made.state.cursor == 1
        assert made.events.process is None


async def test_it_outlives_a_restart_of_the_server(own_server: EmbeddedServer) -> None:
    nats = await Nats.connect([own_server.url], name="test")
    log = await JetStreamLog.open(nats, "ns")
    workers = Workers(log, "ns")
    try:
        await workers.register(1)
        async with replica(log, 2) as made:
            await eventually(lambda: made.events.process is not None)
            pid = made.events.process
            await own_server.stop()
            await own_server.start()
            await nats.wait_connected()
            await workers.cache(1, 100)
            await eventually(lambda: made.state.cursor == 2, within_s=WITHIN_S)
            assert (made.events.process, made.restarts) == (pid, 0)
    finally:
        await log.close()
        await nats.close()


async def test_what_waits_is_bounded(log: JetStreamLog, namespace: str) -> None:
    """Records come faster than they are handled: they wait at the server."""
    size, count = 20_000, 600
    for number in range(count):
        data = bytes(size)
        await log.append(subject(namespace, "control"), data, msg_id=str(number))
    seen = Collected()
    most = 0

    def slowly(record: Record) -> Iterator[None]:
        nonlocal most
        for _ in range(3):
            until_s = time.monotonic() + 0.0006
            while time.monotonic() < until_s:
                pass
            yield
        most = max(most, following.waiting_bytes)
        seen(record)

    following = await log.follow_apart(1, slowly)
    await seen.until_seq(count)
    await following.close()
    assert seen.seqs == list(range(1, count + 1))
    assert size < most <= WAITING_BYTES_MAX + READ_BYTES_MAX < size * count


async def test_a_record_is_never_left_half_done(log: JetStreamLog, namespace: str) -> None:
    await log.append(subject(namespace, "control"), b"x", msg_id="x")
    taken: list[int] = []
    begun = asyncio.Event()

    def in_many_steps(record: Record) -> Iterator[None]:
        for number in range(500):
            taken.append(number)
            begun.set()
            until_s = time.monotonic() + 0.0006
            while time.monotonic() < until_s:
                pass
            yield

    following = await log.follow_apart(1, in_many_steps)
    await begun.wait()
    await following.close()
    assert taken == list(range(500))


OWNER = """
import asyncio, sys
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog

async def main():
    nats = await Nats.connect([sys.argv[1]], name="owner")
    log = await JetStreamLog.open(nats, sys.argv[2])
    following = await log.follow_apart(1, lambda record: iter(()))
    print(following.pid, flush=True)
    await following.wait()

asyncio.run(main())
"""


async def test_it_dies_with_its_owner(nats_url: str, namespace: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, nats_url, namespace), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        pid = int(await owner.stdout.readline())
    assert is_alive(pid)
    owner.kill()
    await owner.wait()
    await eventually(lambda: not is_alive(pid))


async def test_a_cancelled_start_leaves_no_process(
    log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RelayedFollowing] = []
    write = RelayedFollowing._write

    def noted(self: RelayedFollowing, data: bytes) -> None:
        started.append(self)
        write(self, data)

    monkeypatch.setattr(RelayedFollowing, "_write", noted)
    starting = asyncio.create_task(log.follow_apart(1, lambda record: iter(())))
    await eventually(lambda: bool(started))
    pid = started[0].pid
    assert pid is not None
    starting.cancel()
    await asyncio.wait([starting])
    assert not is_alive(pid)


@pytest.mark.parametrize(("threads", "apart"), [("1", False), ("2", True), ("4", True)])
async def test_the_option(nats_url: str, namespace: str, threads: str, apart: bool) -> None:
    async with deployment(nats_url, namespace) as here:
        frontend = await here.add_frontend("--router-event-threads", threads)
        await here.add_worker()
        await here.until_serving(1)
        health: dict[str, Any] = await here.health(frontend)
        pipeline = health["replica"]["events"]
        assert pipeline["threads"] == int(threads)
        assert (pipeline["process"] is not None) == apart
        if apart:
            assert "eventstore.relay" in command_of(pipeline["process"])
