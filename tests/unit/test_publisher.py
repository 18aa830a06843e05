"""The publisher at its edges: full, too large, unreachable, rewound, closed."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from eventstore import codec
from eventstore.errors import BufferFull, LogUnavailable, MessageTooLarge
from eventstore.events import BlockStored, KvRebased, OutputGrown
from eventstore.log import Appended
from eventstore.memory import MemoryLog
from eventstore.publisher import Publisher
from tests.waiting import eventually


class GatedLog(MemoryLog):
    """Appends wait while the gate is closed; `down` makes them fail."""

    def __init__(self) -> None:
        super().__init__(lambda: 0)
        self.gate = asyncio.Event()
        self.gate.set()
        self.down = False
        self.attempts: list[str] = []

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        self.attempts.append(msg_id)
        await self.gate.wait()
        if self.down:
            raise LogUnavailable("down")
        return await super().append(subject, data, msg_id=msg_id)

    async def batches(self) -> list[codec.Batch]:
        decoded = [codec.decode(record.data).batch async for record in self.read(1)]
        return [batch for batch in decoded if batch is not None]


@pytest.fixture
def log() -> GatedLog:
    return GatedLog()


@pytest.fixture
async def publisher(log: GatedLog) -> AsyncIterator[Publisher]:
    publisher = Publisher(log, "ns", "request.01", 3, linger_s=0, events_max=5, retry_s=(0, 0))
    publisher.start()
    yield publisher
    await publisher.close(0.1)


def grown(osl: int) -> OutputGrown:
    return OutputGrown("r", osl)


async def test_what_gathers_while_a_batch_is_under_way_is_the_next_batch(
    log: GatedLog, publisher: Publisher
) -> None:
    log.gate.clear()
    publisher.publish(grown(0))
    await eventually(lambda: len(log.attempts) == 1)
    for osl in (1, 2, 3):
        publisher.publish(grown(osl))
    assert publisher.buffered == 4
    log.gate.set()
    await publisher.flush()
    assert [(b.producer, b.epoch, b.first, b.events) for b in await log.batches()] == [
        ("request.01", 3, 0, [grown(0)]),
        ("request.01", 3, 1, [grown(1), grown(2), grown(3)]),
    ]
    assert log.attempts == ["request.01.3.0", "request.01.3.1"]
    assert publisher.appended_batches == 2
    assert [record.subject async for record in log.read(1, 1)] == ["reckon.ns.request.01"]


async def test_a_full_buffer_refuses_and_recovers(log: GatedLog, publisher: Publisher) -> None:
    log.gate.clear()
    for osl in range(5):
        publisher.publish(grown(osl))
    with pytest.raises(BufferFull):
        publisher.publish(grown(5))
    await eventually(lambda: len(log.attempts) == 1)
    for osl in range(5, 10):  # what is in flight is bounded by its bytes, and comes on top
        publisher.publish(grown(osl))
    with pytest.raises(BufferFull):
        publisher.publish(grown(10))
    log.gate.set()
    await publisher.flush()
    publisher.publish(grown(10))
    await publisher.flush()
    assert [e for b in await log.batches() for e in b.events] == [grown(n) for n in range(11)]


async def test_a_new_epoch_always_has_the_whole_buffer(log: GatedLog, publisher: Publisher) -> None:
    log.gate.clear()
    for osl in range(5):
        publisher.publish(grown(osl))
    await eventually(lambda: len(log.attempts) == 1)
    for epoch in (4, 5):
        publisher.start_epoch(epoch)
        for osl in range(5):
            publisher.publish(grown(osl))
    log.gate.set()
    await publisher.flush()


async def test_an_event_is_what_it_was_when_it_was_published(
    log: GatedLog, publisher: Publisher
) -> None:
    hashes = [1, 2]
    publisher.publish(BlockStored(1, 0, None, hashes))
    hashes.append(3)
    await publisher.flush()
    assert (await log.batches())[0].events == [BlockStored(1, 0, None, [1, 2])]


async def test_a_large_event_travels_alone_and_a_too_large_one_not_at_all(
    log: GatedLog, publisher: Publisher
) -> None:
    large = BlockStored(1, 0, None, [2**64 - 1] * 100_000)
    publisher.publish(grown(0))
    publisher.publish(large)
    publisher.publish(grown(1))
    with pytest.raises(MessageTooLarge):
        publisher.publish(BlockStored(1, 0, None, [2**64 - 1] * 120_000))
    await publisher.flush()
    assert [b.events for b in await log.batches()] == [[grown(0)], [large], [grown(1)]]


async def test_an_event_of_just_the_largest_size_is_written(
    log: GatedLog, publisher: Publisher
) -> None:
    low, high = 0, log.max_message_bytes
    while low < high - 1:
        middle = (low + high) // 2
        try:
            publisher._check_size(len(codec.encoded_event(KvRebased(1, 0, "x" * middle))))
            low = middle
        except MessageTooLarge:
            high = middle
    publisher.publish(KvRebased(1, 0, "x" * low))
    await publisher.flush()
    assert len(await log.batches()) == 1


async def test_retries_keep_the_msg_id_and_are_counted(log: GatedLog, publisher: Publisher) -> None:
    log.down = True
    publisher.publish(grown(0))
    await eventually(lambda: len(log.attempts) >= 3)
    log.down = False
    await publisher.flush()
    assert set(log.attempts) == {"request.01.3.0"}
    assert publisher.retries == len(log.attempts) - 1
    assert publisher.oldest_buffered_s == 0


async def test_flush_gives_up_in_time_and_loses_nothing(
    log: GatedLog, publisher: Publisher
) -> None:
    log.down = True
    publisher.publish(grown(0))
    with pytest.raises(LogUnavailable):
        await publisher.flush(0.01)
    assert publisher.buffered == 1
    log.down = False
    await publisher.flush()
    assert publisher.buffered == 0


async def test_close_tells_how_much_was_left(log: GatedLog) -> None:
    publisher = Publisher(log, "ns", "request.01", 3, retry_s=(0, 0))
    publisher.start()
    publisher.publish(grown(0))
    assert await publisher.close() == 0
    with pytest.raises(LogUnavailable):
        publisher.publish(grown(1))
    assert await publisher.close() == 0

    log.down = True
    publisher = Publisher(log, "ns", "request.02", 3, retry_s=(0, 0))
    publisher.start()
    publisher.publish(grown(0))
    publisher.publish(grown(1))
    assert await publisher.close(0.01) == 2
    with pytest.raises(LogUnavailable):
        await publisher.flush()


async def test_what_is_published_before_the_start_is_written(log: GatedLog) -> None:
    publisher = Publisher(log, "ns", "control", 0)
    publisher.publish(grown(0))
    async with publisher:
        await publisher.flush()
    assert len(await log.batches()) == 1


async def test_a_log_that_went_backwards_is_told_and_a_new_epoch_begins(log: GatedLog) -> None:
    """As the publisher of a rank does it: what it holds now is the base of the new epoch."""

    def rebase() -> None:
        rank.start_epoch(4)
        rank.publish(KvRebased(1, 0, "log_rewound"))

    rank = Publisher(log, "ns", "kv.01.0", 3, linger_s=0, on_log_rewound=rebase)
    async with rank:
        for osl in range(3):
            rank.publish(grown(osl))
            await rank.flush()
        log._records.clear()
        rank.publish(grown(3))
        await rank.flush()
        await rank.flush()
        assert rank.rewinds == 1
        assert [(b.epoch, b.first, b.events) for b in await log.batches()] == [
            (3, 3, [grown(3)]),
            (4, 0, [KvRebased(1, 0, "log_rewound")]),
        ]
        rank.publish(grown(4))
        await rank.flush()
        assert rank.rewinds == 1


async def test_a_new_epoch_drops_what_is_queued_and_not_what_is_under_way(
    log: GatedLog, publisher: Publisher
) -> None:
    log.gate.clear()
    publisher.publish(grown(0))
    await eventually(lambda: len(log.attempts) == 1)
    publisher.publish(grown(1))
    early = asyncio.create_task(publisher.flush())
    await asyncio.sleep(0)
    assert publisher.start_epoch(4) == 1
    publisher.publish(grown(2))
    await asyncio.sleep(0)
    assert not early.done()
    log.gate.set()
    await early
    await publisher.flush()
    assert [(b.epoch, b.first, b.events) for b in await log.batches()] == [
        (3, 0, [grown(0)]),
        (4, 0, [grown(2)]),
    ]
    assert publisher.dropped_events == 1


async def test_a_log_that_takes_less_than_it_said_stops_the_publisher_loudly() -> None:
    class ShrunkLog(MemoryLog):
        async def append(
            self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
        ) -> Appended:
            raise MessageTooLarge(len(data), 10)

    publisher = Publisher(ShrunkLog(lambda: 0), "ns", "control", 0, linger_s=0)
    publisher.start()
    publisher.publish(grown(0))
    with pytest.raises(MessageTooLarge):
        await publisher.flush()
    with pytest.raises(MessageTooLarge):
        publisher.publish(grown(1))
    assert await publisher.close() == 1
