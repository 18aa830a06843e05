"""Reading marks against a real server: what holds the trim back, and a slow start under trims."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from eventstore import codec, events, marks_nats
from eventstore.claims import SNAPSHOT_CLAIM
from eventstore.claims_nats import NatsClaims
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.marks_nats import NatsMarks
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.subjects import kv_producer, subject, worker_producer
from router.loading import SnapshotLoader
from router.reading import ReadingMark
from router.replica import Replica
from router.snapshot_steps import Outcome, SnapshotTaker
from tests.waiting import eventually

WORKER = 0xAB


@pytest.fixture
async def log(nats: Nats, namespace: str) -> AsyncIterator[JetStreamLog]:
    opened = await JetStreamLog.open(nats, namespace)
    yield opened
    await opened.close()


async def test_marks_are_seen_by_others_until_removed(nats: Nats, namespace: str) -> None:
    mine, others = NatsMarks(nats, namespace), NatsMarks(nats, namespace)
    assert await others.lowest() is None, "there is no bucket yet"
    await mine.remove("a")
    await mine.put("a", 50)
    await mine.put("b", 60)
    assert await others.lowest() == 50
    await mine.put("a", 70)
    assert await others.lowest() == 60
    await mine.remove("b")
    assert await others.lowest() == 70
    claim = await NatsClaims(nats, namespace, SNAPSHOT_CLAIM).take("somebody")
    assert await others.lowest() == 70, "a claim is no mark"
    await claim.release()
    await mine.remove("a")
    assert await others.lowest() is None


async def test_a_mark_that_is_not_renewed_ends(nats: Nats, namespace: str) -> None:
    marks = NatsMarks(nats, namespace, ttl_s=1)
    await marks.put("a", 50)
    assert await marks.lowest() == 50

    async def is_gone() -> bool:
        return await marks.lowest() is None

    await eventually(is_gone)
    await marks.put("a", 60)
    assert await marks.lowest() == 60


async def test_marks_that_cannot_be_read_are_an_error(
    nats: Nats, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = NatsMarks(nats, namespace)
    for reader in ("a", "b"):
        await marks.put(reader, 5)
    monkeypatch.setattr(marks_nats, "MARKS_MAX", 1)
    with pytest.raises(LogUnavailable, match="2 reading marks"):
        await marks.lowest()
    await marks.remove("b")
    monkeypatch.undo()
    bucket = await nats.jetstream.key_value(f"reckon_{namespace}_claims")
    await bucket.put("reading.b", b"soon")
    with pytest.raises(LogUnavailable, match="not a number"):
        await marks.lowest()


class SlowSnapshots(NatsSnapshots):
    """Hands out what it has read only when it is told to."""

    def __init__(self, nats: Nats, namespace: str) -> None:
        super().__init__(nats, namespace)
        self.reading = asyncio.Event()
        self.go_on = asyncio.Event()

    async def read(self, name: str, first_bytes: int = 2**32) -> bytes:
        data = await super().read(name, first_bytes)
        self.reading.set()
        await self.go_on.wait()
        return data


async def test_a_slow_start_is_not_overtaken_by_trims(
    nats: Nats, namespace: str, log: JetStreamLog
) -> None:
    numbers: dict[str, int] = {}

    async def write(producer: str, event: events.AnyEvent) -> None:
        number = numbers[producer] = numbers.get(producer, -1) + 1
        data = codec.encode(producer, 1, number, [event])
        await log.append(subject(namespace, producer), data, msg_id=f"{producer}.{number}")

    async def snapshot() -> Outcome:
        for _ in range(10):
            blocks = [sum(numbers.values())]
            await write(kv_producer(WORKER, 0), events.BlockStored(WORKER, 0, None, blocks))
        taker = SnapshotTaker(
            log,
            namespace,
            NatsSnapshots(nats, namespace),
            NatsClaims(nats, namespace, SNAPSHOT_CLAIM),
            kept=2,
            version="v",
            marks=NatsMarks(nats, namespace),
        )
        return await taker.run("taker")

    await write(worker_producer(WORKER), events.WorkerRegistered(WORKER, "m", "aggregated", 16))
    for _ in range(3):
        before = await snapshot()
    assert before.first_seq > 1 and not before.held_back
    slow, marks = SlowSnapshots(nats, namespace), NatsMarks(nats, namespace)
    replica = Replica(
        log,
        time.time_ns,
        snapshots=SnapshotLoader(log, slow),
        reading=ReadingMark(marks, "slow"),
    )
    running = asyncio.create_task(replica.run())
    try:
        await slow.reading.wait()
        for _ in range(4):
            during = await snapshot()
            assert during.held_back and during.first_seq == before.first_seq
        slow.go_on.set()
        await asyncio.wait_for(replica.wait_ready(), 10)
        assert replica.restarts == 0
        assert replica.status().snapshot.name == before.name  # type: ignore[union-attr]

        async def is_gone() -> bool:
            return await marks.lowest() is None

        await eventually(is_gone)
        after = await snapshot()
        assert not after.held_back and after.first_seq == during.seq
        await eventually(lambda: replica.state.cursor > after.seq)
        assert replica.restarts == 0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
