"""What is published is in the log exactly once and in order, whatever the log does."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore import codec
from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent, BlockRemoved, BlockStored, OutputGrown
from eventstore.log import Appended, EventLog, Extent, Following, Record
from eventstore.memory import MemoryLog
from eventstore.publisher import Publisher, split_blocks


class FaultyLog(EventLog):
    """A log whose appends fail before or after they happen, and which forgets msg_ids."""

    def __init__(self, rng: random.Random, failing: float, forgetting: float) -> None:
        self._log = MemoryLog(lambda: 0)
        self._rng = rng
        self._failing = failing
        self._forgetting = forgetting
        self._copies = 0

    @property
    def max_message_bytes(self) -> int:
        return self._log.max_message_bytes

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if self._rng.random() < self._failing:
            raise LogUnavailable("before the append")
        if self._rng.random() < 0.3:
            await asyncio.sleep(0)
        if self._rng.random() < self._forgetting:
            self._copies += 1
            msg_id = f"{msg_id} copy {self._copies}"
        appended = await self._log.append(subject, data, msg_id=msg_id)
        if self._rng.random() < self._failing:
            raise LogUnavailable("after the append")
        return appended

    def read(self, start_seq: int, end_seq: int | None = None) -> AsyncIterator[Record]:
        return self._log.read(start_seq, end_seq)

    async def follow(self, start_seq: int, handle: Callable[[Record], None]) -> Following:
        return await self._log.follow(start_seq, handle)

    async def extent(self) -> Extent:
        return await self._log.extent()

    async def trim(self, before_seq: int) -> None:
        await self._log.trim(before_seq)

    async def close(self) -> None:
        await self._log.close()


async def deduplicated(log: EventLog) -> list[tuple[int, int, AnyEvent]]:
    """(epoch, number, event) as a reader takes them: what it has seen before is skipped."""
    seen: list[tuple[int, int, AnyEvent]] = []
    async for record in log.read(1):
        batch = codec.decode(record.data).batch
        assert batch is not None
        for number, event in enumerate(batch.events, batch.first):
            if not seen or (batch.epoch, number) > seen[-1][:2]:
                seen.append((batch.epoch, number, event))
    return seen


def grown(number: int) -> OutputGrown:
    return OutputGrown("r", number)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    failing=st.sampled_from([0.0, 0.2, 0.6]),
    forgetting=st.sampled_from([0.0, 0.2]),
    batch_bytes_max=st.sampled_from([100, 150, 256 * 1024]),
)
def test_published_is_written_exactly_once_and_in_order(
    seed: int, failing: float, forgetting: float, batch_bytes_max: int
) -> None:
    """Events in = events out, numbered from 0, whatever appends fail, repeat or are forgotten."""
    rng = random.Random(seed)
    count = rng.randrange(1, 60)

    async def run() -> None:
        log = FaultyLog(rng, failing, forgetting)
        async with Publisher(
            *(log, "ns", "request.1", 7),
            linger_s=0,
            batch_bytes_max=batch_bytes_max,
            retry_s=(0, 0),
        ) as publisher:
            for number in range(count):
                publisher.publish(grown(number))
                if rng.random() < 0.2:
                    await asyncio.sleep(0)
                if rng.random() < 0.05:
                    await publisher.flush()
                    assert publisher.buffered == 0
            await publisher.flush(10)
            assert publisher.appended_events == count
        assert await deduplicated(log) == [(7, n, grown(n)) for n in range(count)]

    asyncio.run(run())


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_a_new_epoch_loses_only_what_is_queued(seed: int) -> None:
    """What an epoch has in the log is a prefix of what was published in it; the last is whole."""
    rng = random.Random(seed)

    async def run() -> None:
        log = FaultyLog(rng, 0.2, 0.0)
        published: dict[int, list[int]] = {0: []}
        async with Publisher(
            *(log, "ns", "kv.1.0", 0), linger_s=0, batch_bytes_max=150, retry_s=(0, 0)
        ) as publisher:
            for number in range(rng.randrange(1, 60)):
                if rng.random() < 0.1:
                    queued = publisher.buffered
                    dropped = publisher.start_epoch(publisher.epoch + 1)
                    assert dropped <= queued
                    published[publisher.epoch] = []
                publisher.publish(grown(number))
                published[publisher.epoch].append(number)
                if rng.random() < 0.4:
                    await asyncio.sleep(0)
            await publisher.flush(10)
            total = sum(map(len, published.values()))
            assert publisher.appended_events + publisher.dropped_events == total
        written = await deduplicated(log)
        for epoch, numbers in published.items():
            events = [(number, event) for e, number, event in written if e == epoch]
            assert events == [(i, grown(n)) for i, n in enumerate(numbers[: len(events)])]
            if epoch == publisher.epoch:
                assert len(events) == len(numbers)

    asyncio.run(run())


_hashes = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@given(_hashes, st.none() | st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_split_stores_chain_up_to_the_whole(
    hashes: list[int], parent: int | None, blocks_max: int
) -> None:
    """The parts in order are the blocks in order, each below the last block of the one before."""
    parts = list(split_blocks(BlockStored(1, 2, parent, hashes), blocks_max))
    assert [h for part in parts for h in part.sequence_hashes] == hashes
    assert all(len(part.sequence_hashes) <= blocks_max for part in parts)
    below = parent
    for part in parts:
        assert isinstance(part, BlockStored)
        assert (part.worker_id, part.dp_rank, part.parent_hash) == (1, 2, below)
        below = part.sequence_hashes[-1] if part.sequence_hashes else below


@given(_hashes, st.integers(1, 50))
def test_split_removals_are_the_whole(hashes: list[int], blocks_max: int) -> None:
    parts = list(split_blocks(BlockRemoved(1, 2, hashes), blocks_max))
    assert [h for part in parts for h in part.sequence_hashes] == hashes
    assert all(isinstance(part, BlockRemoved) for part in parts)
    assert all(len(part.sequence_hashes) <= blocks_max for part in parts)
