"""What the log is told of a worker: its registration once, its removal once, whoever writes it."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from eventstore.codec import decode
from eventstore.connect import Nats
from eventstore.events import WorkerRegistered, WorkerRemoved
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog
from eventstore.memory import DUPLICATE_WINDOW_NS, MemoryLog
from tests.integration.listing import instance
from workers.registry import LEASE_EXPIRED, SHUTDOWN, record_registered, record_removed


@pytest.fixture(params=["jetstream", "memory"])
async def log(
    request: pytest.FixtureRequest, nats: Nats, namespace: str
) -> AsyncIterator[EventLog]:
    opened: EventLog
    if request.param == "memory":
        opened = MemoryLog(time.time_ns)
    else:
        opened = await JetStreamLog.open(nats, namespace)
    yield opened
    await opened.close()


async def events(log: EventLog) -> list[object]:
    """All events of the log, each with the number that its producer gave it."""
    found: list[object] = []
    async for record in log.read(1):
        batch = decode(record.data).batch
        assert batch is not None
        assert record.subject.endswith(batch.producer)
        found += [(batch.first, event) for event in batch.events]
    return found


async def test_a_removal_is_recorded_once_by_however_many_see_it(
    log: EventLog, namespace: str
) -> None:
    seq = await record_registered(log, instance(5, namespace))
    wrote = await asyncio.gather(
        *(record_removed(log, namespace, 5, LEASE_EXPIRED, seq) for _ in range(3)),
        record_removed(log, namespace, 5, SHUTDOWN, seq),
    )
    assert sum(wrote) == 1
    registered, removed = await events(log)
    assert registered == (
        0,
        WorkerRegistered(
            worker_id=5, model="m", worker_type="aggregated", block_size=64, context_length=1000
        ),
    )
    assert removed in [(1, WorkerRemoved(5, cause)) for cause in (LEASE_EXPIRED, SHUTDOWN)]


async def test_other_workers_do_not_matter(log: EventLog, namespace: str) -> None:
    seqs = [await record_registered(log, instance(n, namespace)) for n in range(3)]
    assert await record_removed(log, namespace, 0, LEASE_EXPIRED, seqs[0])
    assert await record_removed(log, namespace, 2, LEASE_EXPIRED, seqs[2])
    assert not await record_removed(log, namespace, 0, LEASE_EXPIRED, seqs[0])
    assert len(await events(log)) == 5


async def test_a_late_observer_adds_nothing(namespace: str) -> None:
    """Beyond the window of message ids, its expectation of the subject keeps it out."""
    now_ns = 0
    log = MemoryLog(lambda: now_ns)
    seq = await record_registered(log, instance(5, namespace))
    assert await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    now_ns += 10 * DUPLICATE_WINDOW_NS
    await record_registered(log, instance(6, namespace))
    assert not await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert len(await events(log)) == 3


async def test_a_removal_after_the_registration_was_trimmed(log: EventLog, namespace: str) -> None:
    seq = await record_registered(log, instance(5, namespace))
    other = await record_registered(log, instance(6, namespace))
    await log.trim(other)
    assert await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert not await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert len(await events(log)) == 2


async def test_a_removal_without_the_registrations_seq(log: EventLog, namespace: str) -> None:
    await record_registered(log, instance(5, namespace))
    wrote = [await record_removed(log, namespace, 5, LEASE_EXPIRED, 0) for _ in range(2)]
    assert wrote == [True, False]
