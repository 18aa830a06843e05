"""Reading marks by example: what they hold back, how long, and what happens without them."""

import asyncio
import time

import pytest

from eventstore.claims import MemoryClaims
from eventstore.errors import LogUnavailable
from eventstore.log import Extent
from eventstore.marks import (
    HELD_BYTES_MAX,
    MARK_TTL_S,
    MARKS_MAX,
    Cut,
    MemoryMarks,
    ReadingMarks,
    cut_at,
)
from eventstore.memory import MemoryLog
from eventstore.snapshots import MemorySnapshots
from router import reading
from router.loading import SnapshotLoader
from router.reading import ReadingMark
from router.replica import Replica
from router.snapshot_steps import Outcome, SnapshotTaker
from tests.property.test_fold import history
from tests.waiting import eventually

SMALL = Extent("i", 11, 110, 1000)


class Unreachable(MemoryMarks):
    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.tries = 0

    async def put(self, reader: str, seq: int) -> None:
        self.tries += 1
        raise LogUnavailable("no rights")

    async def lowest(self) -> int | None:
        raise LogUnavailable("no rights")


# --- where the log is cut -------------------------------------------------------------------------


async def test_the_log_is_cut_at_the_lowest_mark() -> None:
    marks = MemoryMarks(lambda: 0.0)
    assert await cut_at(marks, SMALL, 100) == Cut(100)
    await marks.put("ahead", 105)
    assert await cut_at(marks, SMALL, 100) == Cut(100)
    await marks.put("a", 60)
    await marks.put("b", 50)
    assert await cut_at(marks, SMALL, 100) == Cut(50, "a replica still reads at record 50")
    await marks.put("b", 70)
    assert (await cut_at(marks, SMALL, 100)).before_seq == 60, "a mark moves on"
    await marks.remove("a")
    assert (await cut_at(marks, SMALL, 100)).before_seq == 70
    await marks.put("a", 1)
    assert (await cut_at(marks, SMALL, 100)).before_seq == 11, "nothing is before the beginning"


async def test_a_mark_ends_by_itself() -> None:
    now_s = 0.0
    marks = MemoryMarks(lambda: now_s)
    await marks.put("a", 50)
    now_s = MARK_TTL_S - 0.1
    assert await marks.lowest() == 50
    now_s = MARK_TTL_S
    assert await marks.lowest() is None


async def test_unreadable_marks_hold_everything_back_and_so_do_too_many() -> None:
    cut = await cut_at(Unreachable(), SMALL, 100)
    assert cut.before_seq == SMALL.first_seq and "no rights" in cut.held_back
    marks = MemoryMarks(lambda: 0.0)
    for number in range(MARKS_MAX):
        await marks.put(f"r{number}", 50)
    assert (await cut_at(marks, SMALL, 100)).before_seq == 50
    await marks.put("one more", 50)
    cut = await cut_at(marks, SMALL, 100)
    assert cut.before_seq == SMALL.first_seq and f"{MARKS_MAX + 1} reading marks" in cut.held_back


@pytest.mark.parametrize("marks", [MemoryMarks(lambda: 0.0), Unreachable()])
async def test_marks_hold_back_so_much_and_no_more(marks: MemoryMarks) -> None:
    """Frontends that start and die for ever do not let the log grow for ever."""
    await MemoryMarks.put(marks, "a", 1)
    extent = Extent("i", 1, 400, 2 * HELD_BYTES_MAX)
    assert (await cut_at(marks, extent, 201)).before_seq == 1
    assert await cut_at(marks, extent, 202) == Cut(202)


# --- who takes a snapshot -------------------------------------------------------------------------


async def grown(log: MemoryLog, count: int) -> None:
    last_seq = (await log.extent()).last_seq
    for record in history(7, last_seq + count)[last_seq:]:
        await log.append("reckon.t.any", record.data, msg_id=f"h{record.seq}")


async def taken(log: MemoryLog, store: MemorySnapshots, marks: ReadingMarks) -> Outcome:
    await grown(log, 10)
    claims = MemoryClaims(lambda: 0.0)
    return await SnapshotTaker(log, "t", store, claims, kept=2, version="v", marks=marks).run("a")


async def test_a_run_trims_no_further_than_the_marks_and_says_why() -> None:
    log, store, marks = MemoryLog(time.time_ns), MemorySnapshots(), MemoryMarks(lambda: 0.0)
    first = await taken(log, store, marks)
    await marks.put("a", 5)
    second = await taken(log, store, marks)
    assert (second.first_seq, second.held_back) == (5, "a replica still reads at record 5")
    third = await taken(log, store, marks)
    assert third.deleted == 1, "snapshots are deleted all the same"
    assert third.first_seq == (await log.extent()).first_seq == 5 < first.seq
    await marks.remove("a")
    fourth = await taken(log, store, marks)
    assert (fourth.first_seq, fourth.held_back) == (third.seq, "")
    held = await taken(log, store, Unreachable())
    assert held.first_seq == third.seq and "cannot be read" in held.held_back


# --- who holds one --------------------------------------------------------------------------------


class SlowStore(MemorySnapshots):
    """Hands out what it has read only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = asyncio.Event()
        self.go_on = asyncio.Event()

    async def read(self, name: str, first_bytes: int = 2**32) -> bytes:
        data = await super().read(name, first_bytes)
        self.reading.set()
        await self.go_on.wait()
        return data


@pytest.mark.parametrize("marked", [True, False])
async def test_a_slow_loader_with_a_mark_is_not_overtaken(marked: bool) -> None:
    log, quick, slow = MemoryLog(time.time_ns), MemorySnapshots(), SlowStore()
    slow.objects = quick.objects
    marks = MemoryMarks(asyncio.get_running_loop().time)
    for _ in range(2):
        await taken(log, quick, marks)
    mark = ReadingMark(marks, "a") if marked else None
    replica = Replica(
        log, time.time_ns, snapshots=SnapshotLoader(log, slow), jitter=lambda: 0.0, reading=mark
    )
    running = asyncio.create_task(replica.run())
    try:
        await slow.reading.wait()
        for _ in range(4):
            outcome = await taken(log, quick, marks)
        assert bool(outcome.held_back) == marked
        slow.go_on.set()
        await asyncio.wait_for(replica.wait_ready(), 10)
        assert replica.restarts == (0 if marked else 1)

        async def is_gone() -> bool:
            return await marks.lowest() is None

        await eventually(is_gone)
        assert not (await taken(log, quick, marks)).held_back
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_mark_moves_with_its_reader_and_is_kept_no_longer_than_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "RENEW_S", 0.001)
    marks, cursor = MemoryMarks(asyncio.get_running_loop().time), 7
    mark = ReadingMark(marks, "a")
    running = asyncio.create_task(mark.run())

    async def lowest_is(seq: int | None) -> bool:
        return await marks.lowest() == seq

    try:
        await mark.hold(lambda: cursor)
        assert await marks.lowest() == 7
        cursor = 8
        await eventually(lambda: lowest_is(8))
        mark.release()
        await eventually(lambda: lowest_is(None))
        monkeypatch.setattr(reading, "HOLD_MAX_S", 0.0)
        await mark.hold(lambda: cursor)
        assert await marks.lowest() is None
        mark.release()
        monkeypatch.setattr(reading, "HOLD_MAX_S", 0.3)
        await mark.hold(lambda: cursor)
        assert await marks.lowest() == 8
        await eventually(lambda: lowest_is(None))
        await mark.hold(lambda: cursor)
        assert await marks.lowest() is None, "beginning again does not make it longer"
        assert caplog.text.count("the log may be trimmed from now on") == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_replica_starts_without_a_mark_where_none_can_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "RENEW_S", 0.001)
    log, marks, slow = MemoryLog(time.time_ns), Unreachable(), SlowStore()
    slow.go_on.set()
    await taken(log, slow, MemoryMarks(lambda: 0.0))
    slow.go_on.clear()
    replica = Replica(
        log, time.time_ns, snapshots=SnapshotLoader(log, slow), reading=ReadingMark(marks, "a")
    )
    running = asyncio.create_task(replica.run())
    try:
        await eventually(lambda: marks.tries > 2)
        slow.go_on.set()
        await asyncio.wait_for(replica.wait_ready(), 10)
        assert caplog.text.count("no reading mark") == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
