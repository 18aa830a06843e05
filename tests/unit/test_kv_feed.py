"""What a rank's feed leaves in the log is its cache, whatever the log did meanwhile."""

import itertools
from collections.abc import AsyncIterator

from eventstore.codec import decode
from eventstore.errors import LogUnavailable
from eventstore.events import BlockRemoved, BlockStored, KvRebased, PrefixPinned
from eventstore.log import Appended, EventLog
from eventstore.memory import MemoryLog
from eventstore.publisher import BLOCKS_PER_EVENT_MAX
from workers.engine import EngineConfig, MockEngine
from workers.kv_cache import KvEvent
from workers.kv_feed import KvFeed
from workers.protocol import EngineRequest, StopConditions

WORKER, RANK = 77, 2


class Log(MemoryLog):
    """A log that can be made unreachable."""

    reachable = True

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if not self.reachable:
            raise LogUnavailable("unreachable")
        return await super().append(
            subject, data, msg_id=msg_id, expected_subject_seq=expected_subject_seq
        )


def make_log() -> Log:
    return Log(itertools.count().__next__)


class Cache:
    """A rank's cache as the log tells it, epoch by epoch."""

    def __init__(self) -> None:
        self.blocks: dict[int, int | None] = {}
        """Sequence hash → the one before it."""
        self.reasons: list[str] = []
        self.pinned: list[PrefixPinned] = []
        """Since the last rebase."""
        self.seen: dict[tuple[str, int], int] = {}

    async def read(self, log: EventLog) -> "Cache":
        async for record in log.read(1):
            batch = decode(record.data).batch
            assert batch is not None
            assert record.subject.endswith(f"kv.{WORKER:016x}.{RANK}")
            key = batch.producer, batch.epoch
            assert batch.first == self.seen.get(key, 0), "a hole in the numbers"
            self.seen[key] = batch.first + len(batch.events)
            for event in batch.events:
                self._apply(event)
        return self

    def _apply(self, event: object) -> None:
        match event:
            case KvRebased(worker_id=worker, dp_rank=rank, reason=reason):
                self.blocks.clear()
                self.pinned.clear()
                self.reasons.append(reason)
            case BlockStored(worker_id=worker, dp_rank=rank, parent_hash=parent):
                assert parent is None or parent in self.blocks
                for each in event.sequence_hashes:
                    self.blocks[each] = parent
                    parent = each
            case BlockRemoved(worker_id=worker, dp_rank=rank, sequence_hashes=hashes):
                for each in hashes:
                    self.blocks.pop(each, None)
            case PrefixPinned(worker_id=worker, dp_rank=rank, sequence_hashes=hashes):
                assert self.blocks.keys() >= set(hashes), "pinned before it is stored"
                self.pinned.append(event)
            case _:
                raise AssertionError(event)
        assert (worker, rank) == (WORKER, RANK)


def expected(engine: MockEngine) -> dict[int, int | None]:
    blocks: dict[int, int | None] = {}
    for event in engine.cache_contents():
        assert isinstance(event, BlockStored)
        parent = event.parent_hash
        for each in event.sequence_hashes:
            blocks[each] = parent
            parent = each
    return blocks


def make_engine(num_gpu_blocks: int = 40) -> MockEngine:
    config = EngineConfig(block_size=4, num_gpu_blocks=num_gpu_blocks, context_length=10_000)
    return MockEngine(config, worker_id=0, dp_rank=RANK)


def traffic(engine: MockEngine, requests: int) -> AsyncIterator[list[KvEvent]]:
    """Serve requests that share some prefixes and together do not fit into the cache."""

    async def events() -> AsyncIterator[list[KvEvent]]:
        for number in range(requests):
            engine.submit(
                EngineRequest(
                    request_id=str(number),
                    model="m",
                    token_ids=[number % 3] * 20 + [number] * 20,
                    stop_conditions=StopConditions(max_tokens=8),
                )
            )
            while (result := engine.step()) is not None:
                yield result.kv_events

    return events()


async def test_the_log_tells_the_cache() -> None:
    log, engine = make_log(), make_engine()
    feed = make_feed(log, engine)
    async for events in traffic(engine, 20):
        feed.publish(events)
    await feed.close(1.0)
    cache = await Cache().read(log)
    assert cache.blocks == expected(engine) != {}
    assert cache.reasons == ["started"]


async def test_a_feed_that_starts_late_begins_with_the_whole_cache() -> None:
    log, engine = make_log(), make_engine()
    async for _ in traffic(engine, 5):
        pass
    feed = make_feed(log, engine)
    await feed.close(1.0)
    assert (await Cache().read(log)).blocks == expected(engine) != {}


async def test_an_overflow_rebases_and_nothing_is_missing() -> None:
    """Also when it overflows again and again while the log is away."""
    log, engine = make_log(), make_engine()
    feed = make_feed(log, engine, events_max=10)
    await feed.flush(5.0)
    log.reachable = False
    async for events in traffic(engine, 60):
        feed.publish(events)
    assert feed.epoch > 2
    assert feed.buffered <= 10 + 2 * engine.config.num_gpu_blocks + 1
    log.reachable = True
    async for events in traffic(engine, 3):
        feed.publish(events)
    await feed.flush(5.0)
    await feed.close(1.0)
    cache = await Cache().read(log)
    assert cache.blocks == expected(engine) != {}
    assert cache.reasons[0] == "started" and set(cache.reasons[1:]) == {"overflow"}


async def test_pins_are_told_anew_with_every_announcement() -> None:
    """The first ones, too, of a feed that follows an engine with pins."""
    log, engine = make_log(), make_engine()
    async for _ in traffic(engine, 3):
        pass
    feed = make_feed(log, engine)
    kept = engine.pin([0] * 20, 60_000, 0.0)
    feed.follow_pins(lambda: engine.pinned(0.0))
    feed.publish([PrefixPinned(0, RANK, kept[:1], 90)])
    await feed.flush(5.0)
    told = await Cache().read(log)
    assert [(pin.sequence_hashes, pin.ttl_s) for pin in told.pinned] == [
        (kept, 60),
        (kept[:1], 90),
    ]
    feed.announce_after(feed.epoch)
    await feed.close(5.0)
    told = await Cache().read(log)
    assert told.reasons == ["started", "asked"]
    assert [(pin.sequence_hashes, pin.ttl_s) for pin in told.pinned] == [(kept, 60)]


async def test_a_pin_of_any_size_is_told() -> None:
    log, engine = make_log(), make_engine()
    feed = make_feed(log, engine)
    hashes = list(range(2 * BLOCKS_PER_EVENT_MAX + 5))
    feed.publish([BlockStored(0, RANK, None, hashes), PrefixPinned(0, RANK, hashes, 5)])
    await feed.close(5.0)
    pinned = (await Cache().read(log)).pinned
    assert [each for pin in pinned for each in pin.sequence_hashes] == hashes
    assert [pin.ttl_s for pin in pinned] == [5, 5, 5]


async def test_a_fact_of_any_size_is_told() -> None:
    log, engine = make_log(), make_engine()
    feed = make_feed(log, engine)
    hashes = list(range(3 * BLOCKS_PER_EVENT_MAX + 5))
    feed.publish([BlockStored(0, RANK, None, hashes)])
    await feed.close(5.0)
    cache = await Cache().read(log)
    assert list(cache.blocks) == hashes
    assert list(cache.blocks.values()) == [None, *hashes[:-1]]


def make_feed(log: EventLog, engine: MockEngine, events_max: int = 10_000) -> KvFeed:
    feed = KvFeed(
        log,
        "n",
        WORKER,
        RANK,
        engine.cache_contents,
        contents_max=engine.config.num_gpu_blocks,
        events_max=events_max,
        on_log_rewound=lambda: None,
    )
    feed.start()
    return feed
