"""Snapshots against a real server: the process that takes them, and starting from one."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import pytest
from msgspec.structs import replace

from eventstore import codec, events
from eventstore.claims import SNAPSHOT_CLAIM, ClaimTaken
from eventstore.claims_nats import NatsClaims
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from eventstore.snapshots import (
    name_of,
    pack_header,
    read_header,
    unpack,
)
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.subjects import kv_producer, subject, worker_producer
from router.loading import SnapshotLoader
from router.refold import fold_to
from router.replica import Replica, ReplicaPhase
from router.settings import SnapshotterSettings
from router.snapshot_steps import Due, SnapshotTaker, Step
from router.snapshot_trigger import Snapshots, SnapshotTrigger
from router.snapshotter import SnapshotFailed, take_in_process
from router.state import RouterState
from tests.integration.processes import Child, Deployment, deployment, stream
from tests.waiting import eventually

WORKER = 0xAB


@pytest.fixture
async def log(nats: Nats, namespace: str) -> AsyncIterator[JetStreamLog]:
    opened = await JetStreamLog.open(nats, namespace)
    yield opened
    await opened.close()


@pytest.fixture
def store(nats: Nats, namespace: str) -> NatsSnapshots:
    return NatsSnapshots(nats, namespace)


class Writer:
    """A worker that stores blocks."""

    def __init__(self, log: JetStreamLog, namespace: str) -> None:
        self.log = log
        self.namespace = namespace
        self.numbers: dict[str, int] = {}
        self.blocks = 0

    async def write(self, producer: str, *written: events.AnyEvent) -> None:
        first = self.numbers.get(producer, 0)
        self.numbers[producer] = first + len(written)
        data = codec.encode(producer, 1, first, list(written))
        name = subject(self.namespace, producer)
        await self.log.append(name, data, msg_id=f"{producer}.1.{first}")

    async def register(self) -> None:
        await self.write(
            worker_producer(WORKER), events.WorkerRegistered(WORKER, "m", "aggregated", 16)
        )

    async def store(self, messages: int) -> None:
        for _ in range(messages):
            chain = list(range(self.blocks, self.blocks + 8))
            self.blocks += 8
            await self.write(kv_producer(WORKER, 0), events.BlockStored(WORKER, 0, None, chain))


@pytest.fixture
async def writer(log: JetStreamLog, namespace: str) -> Writer:
    made = Writer(log, namespace)
    await made.register()
    return made


async def refolded(log: JetStreamLog) -> RouterState:
    """The state of a log that still has its beginning."""
    state = RouterState()
    await fold_to(log, state, (await log.extent()).last_seq)
    return state


# --- taking one -----------------------------------------------------------------------------------


def settings(nats_url: str, namespace: str, **others: object) -> SnapshotterSettings:
    fields = {"router_snapshot_threshold": 5, "router_snapshots_kept": 2, **others}
    return SnapshotterSettings(nats_url=nats_url, namespace=namespace, **fields)  # type: ignore[arg-type]


async def test_a_process_takes_snapshots_and_trims_the_log(
    nats_url: str, namespace: str, log: JetStreamLog, store: NatsSnapshots, writer: Writer
) -> None:
    given = settings(nats_url, namespace)
    await writer.store(2)
    assert not (await take_in_process(given)).name, "not due, and there is none"
    for number in range(3):
        await writer.store(10)
        before = await log.extent()
        outcome = await take_in_process(given)
        assert outcome.taken and outcome.seq == before.last_seq
        announced = [record async for record in log.read(before.last_seq + 1)]
        assert codec.decode(announced[0].data).batch.events == [  # type: ignore[union-attr]
            events.SnapshotTaken(outcome.name, outcome.seq, outcome.digest)
        ]
        assert outcome.deleted == (number == 2)
    refs = await store.refs()
    assert len(refs) == 2
    assert (await log.extent()).first_seq == refs[0].seq == outcome.first_seq
    header = await read_header(store, refs[-1])
    assert (header.seq, header.digest) == (outcome.seq, outcome.digest)
    loaded = await SnapshotLoader(log, store).load()
    assert loaded is not None
    assert loaded.state.tree.pair_count == writer.blocks == outcome.pairs
    assert (await log.extent()).last_seq == outcome.seq + 1
    finished = await take_in_process(given)
    assert not finished.taken and finished.name == outcome.name
    assert (await log.extent()).last_seq == outcome.seq + 1, "it is announced once"


async def test_the_process_says_why_it_did_nothing(
    nats: Nats, nats_url: str, namespace: str, writer: Writer
) -> None:
    await writer.store(10)
    claim = await NatsClaims(nats, namespace, SNAPSHOT_CLAIM).take("somebody")
    with pytest.raises(ClaimTaken, match="somebody"):
        await take_in_process(settings(nats_url, namespace))
    await claim.release()
    with pytest.raises(SnapshotFailed, match="no stream"):
        await take_in_process(settings(nats_url, f"{namespace}-none"))


async def test_a_crash_of_the_process_is_made_good_by_the_next(
    nats_url: str, nats: Nats, namespace: str, log: JetStreamLog, writer: Writer
) -> None:
    """Killed after the snapshot is written and before it is announced: the next one finishes."""
    await writer.store(10)
    whole = (await refolded(log)).digest()

    class Killed(BaseException):
        pass

    def reached(step: Step) -> None:
        if step is Step.WRITTEN:
            raise Killed

    store = NatsSnapshots(nats, namespace)
    claims = NatsClaims(nats, namespace, SNAPSHOT_CLAIM)
    taker = SnapshotTaker(log, namespace, store, claims, kept=2, version="v", reached=reached)
    with pytest.raises(Killed):
        await taker.run("one")
    last_seq = (await log.extent()).last_seq
    outcome = await take_in_process(settings(nats_url, namespace))
    assert (outcome.taken, outcome.seq, outcome.digest) == (False, last_seq, whole)
    assert (await log.extent()).last_seq == last_seq + 1


async def test_the_trigger_has_one_taken_when_it_is_due(
    nats_url: str, nats: Nats, namespace: str, log: JetStreamLog, writer: Writer
) -> None:
    given = settings(nats_url, namespace)

    snapshots = Snapshots(
        NatsSnapshots(nats, namespace),
        NatsClaims(nats, namespace, SNAPSHOT_CLAIM),
        partial(take_in_process, given),
    )
    triggers = [SnapshotTrigger(log, snapshots, Due(messages=5)) for _ in range(2)]
    await writer.store(3)
    for trigger in triggers:
        await trigger.look(0.0)
    assert [trigger.outcomes for trigger in triggers] == [{}, {}]
    await writer.store(10)
    await asyncio.gather(*(trigger.look(0.0) for trigger in triggers))
    assert sum(trigger.outcomes["taken"] for trigger in triggers) == 1
    await triggers[0].look(1.0)
    assert triggers[0].newest is not None and triggers[0].newest.seq == 14


async def test_the_process_ends_with_its_parent(nats_url: str, namespace: str) -> None:
    """It is started by a process that is killed at once."""
    program = (
        "import asyncio, os, signal;"
        "from router.settings import SnapshotterSettings as S;"
        "from router import snapshotter;"
        "os.environ['RECKON_NATS_WAIT_SECS'] = '60';"
        f"s = S(nats_url='nats://127.0.0.1:9', namespace={namespace!r}, nats_wait_secs=60);"
        "asyncio.run(snapshotter.take_in_process(s))"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.DEVNULL
    )
    child = 0

    def started() -> bool:
        nonlocal child
        path = f"/proc/{parent.pid}/task/{parent.pid}/children"
        with open(path) as file:
            children = file.read().split()
        child = int(children[0]) if children else 0
        if not child:
            return False
        with open(f"/proc/{child}/stat") as file:
            # Niced: it has asked for the signal before.
            return file.read().rpartition(")")[2].split()[16] == "10"

    await eventually(started)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await eventually(lambda: not os.path.exists(f"/proc/{child}"))


# --- starting from one ----------------------------------------------------------------------------


async def test_a_replica_starts_from_the_newest_usable_snapshot(
    nats_url: str, namespace: str, log: JetStreamLog, store: NatsSnapshots, writer: Writer
) -> None:
    given = settings(nats_url, namespace)
    for _ in range(2):
        await writer.store(10)
        taken = await take_in_process(given)
    await writer.store(4)
    # A damaged one of the head, one of a record that will never come, one of another life.
    extent = await log.extent()
    good = await store.read(taken.name)
    bad = [
        name_of(extent.identity, extent.last_seq),
        name_of(extent.identity, extent.last_seq + 1000),
        name_of("another", extent.last_seq),
    ]
    for name in bad:
        await store.write(name, good[:-1] + b"!")
    replica = Replica(log, time.time_ns, snapshots=SnapshotLoader(log, store))
    running = asyncio.create_task(replica.run())
    try:
        await asyncio.wait_for(replica.wait_ready(), 10)
        status = replica.status()
        assert status.phase is ReplicaPhase.READY and status.snapshot is not None
        assert (status.snapshot.name, status.snapshot.seq) == (taken.name, taken.seq)
        assert set(status.snapshot.skipped) == set(bad)
        assert not status.snapshot.incomplete
        assert replica.state.tree.pair_count == writer.blocks
        assert sum(replica.applied.values()) == 4 + 1, "the tail and the announcement, no more"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_snapshot_of_a_lost_tail_is_not_used(
    nats: Nats, namespace: str, log: JetStreamLog, store: NatsSnapshots, writer: Writer
) -> None:
    """The log has another record under the snapshot's seq: the seq fits and the time does not."""
    await writer.store(10)
    claims = NatsClaims(nats, namespace, SNAPSHOT_CLAIM)
    taker = SnapshotTaker(log, namespace, store, claims, kept=2, version="v")
    older = await taker.run("one")
    await writer.store(10)
    newer = await taker.run("two")
    written = unpack(newer.name, await store.read(newer.name))
    lost = replace(written.header, time_ns=written.header.time_ns - 1)
    await store.write(newer.name, pack_header(lost) + written.body)
    loader = SnapshotLoader(log, store)
    loaded = await loader.load()
    assert loaded is not None and loaded.name == older.name
    assert loader.report.skipped == {newer.name: "is of records that the log has lost since"}


async def test_frontends_take_snapshots_by_themselves_and_start_from_them(
    nats_url: str, nats: Nats, namespace: str
) -> None:
    """Under traffic one of two takes it; one that is killed and started again begins with it."""
    options = ("--router-snapshot-threshold", "20", "--router-snapshots-kept", "2")
    async with deployment(nats_url, namespace) as here:
        frontends = [await here.add_frontend(*options) for _ in range(2)]
        await here.add_worker("--speedup-ratio", "50")
        await here.until_serving(1)
        stop = asyncio.Event()

        async def traffic() -> None:
            async with aiohttp.ClientSession() as session:
                while not stop.is_set():
                    for frontend in frontends:
                        assert (await stream(session, frontend.url, "a prompt " * 100, 4))[0] == 200

        def taken() -> int:
            return here.observer.applied[events.SnapshotTaken]

        running = asyncio.create_task(traffic())
        try:
            await eventually(lambda: taken() >= 2 or running.done(), 60)
        finally:
            stop.set()
            await running
        assert taken() >= 2
        store = NatsSnapshots(nats, namespace)

        async def trimmed() -> bool:
            """The last one announced is being tidied up after, or another one taken."""
            refs = await store.refs()
            return len(refs) == 2 and (await here.log.extent()).first_seq == refs[0].seq

        await eventually(trimmed, 30)
        refs = await store.refs()
        frontends[0].signal(signal.SIGKILL)
        await frontends[0].process.wait()
        again = await here.add_frontend(*options)
        await eventually(lambda: is_healthy(here, again))
        health = await here.health(again)
        report = health["replica"]["snapshot"]  # type: ignore[index]
        assert report["seq"] >= refs[-1].seq and report["skipped"] == {}
        async with aiohttp.ClientSession() as session:
            async with session.get(again.url + "/metrics") as response:
                page = await response.text()
        assert "reckon_snapshots_skipped 0.0" in page and "reckon_snapshot_seq" in page

        async def agree() -> bool:
            """The observer has read everything from the beginning."""
            state = await snapshot_and_tail(here.log, store)
            observed = here.observer.state
            return (state.cursor, state.digest()) == (observed.cursor, observed.digest())

        await eventually(agree)
        assert here.observer.state.tree.pair_count > 0


async def is_healthy(here: Deployment, frontend: Child) -> bool:
    return (await here.health(frontend))["status"] == "healthy"


async def snapshot_and_tail(log: JetStreamLog, store: NatsSnapshots) -> RouterState:
    loaded = await SnapshotLoader(log, store).load()
    assert loaded is not None
    await fold_to(log, loaded.state, (await log.extent()).last_seq)
    return loaded.state
