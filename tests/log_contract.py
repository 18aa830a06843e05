"""What every `EventLog` must do. A test module subclasses `LogContract` and provides `log`.

Where the two logs differ, the memory log is wrong: it is a model of the real one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from eventstore.errors import LogGap, MessageTooLarge, SeqConflict
from eventstore.log import EventLog, Record

WITHIN_S = 20.0


class Collected:
    """A handler that keeps what it is given and can be waited for."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._changed = asyncio.Event()

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        self._changed.set()

    @property
    def seqs(self) -> list[int]:
        return [record.seq for record in self.records]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_seq(self, seq: int) -> None:
        await self.until(lambda: bool(self.records) and self.records[-1].seq >= seq)


async def listed(records: AsyncIterator[Record]) -> list[Record]:
    async with asyncio.timeout(WITHIN_S):
        return [record async for record in records]


class LogContract:
    """`log` is empty and new; `subject` names a subject that it takes."""

    @pytest.fixture
    def subject(self, namespace: str) -> Callable[[str], str]:
        return lambda name: f"reckon.{namespace}.{name}"

    async def _fill(self, log: EventLog, subject: Callable[[str], str], count: int) -> None:
        for number in range(count):
            await log.append(
                subject(f"kv.{number % 3}"), b"data %d" % number, msg_id=f"fill.{number}"
            )

    async def test_an_empty_log_has_an_empty_extent(self, log: EventLog) -> None:
        extent = await log.extent()
        assert (extent.first_seq, extent.last_seq) == (1, 0)
        assert await listed(log.read(1)) == []

    async def test_appended_records_come_back_in_order(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        appended = [
            await log.append(subject("control"), data, msg_id=f"m.{number}")
            for number, data in enumerate([b"one", b"", b"\x00\xff" * 100])
        ]
        assert [(a.seq, a.duplicate) for a in appended] == [(1, False), (2, False), (3, False)]
        records = await listed(log.read(1))
        assert [(r.seq, r.subject, r.data) for r in records] == [
            (1, subject("control"), b"one"),
            (2, subject("control"), b""),
            (3, subject("control"), b"\x00\xff" * 100),
        ]
        times = [r.time_ns for r in records]
        assert times == sorted(times)
        extent = await log.extent()
        assert (extent.first_seq, extent.last_seq) == (1, 3)
        assert extent.bytes > 0

    async def test_time_is_the_same_however_a_record_is_read(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 5)
        seen = Collected()
        following = await log.follow(1, seen)
        await seen.until_seq(5)
        await following.close()
        assert seen.records == await listed(log.read(1))

    async def test_a_repeated_msg_id_adds_nothing(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        first = await log.append(subject("kv.1"), b"a", msg_id="same")
        await log.append(subject("kv.1"), b"b", msg_id="other")
        again = await log.append(subject("kv.1"), b"c", msg_id="same")
        assert again == (first.seq, True)
        assert [r.data for r in await listed(log.read(1))] == [b"a", b"b"]

    async def test_expected_subject_seq_lets_one_writer_win(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        mine = subject("threshold.m")
        first = await log.append(mine, b"1", msg_id="t1", expected_subject_seq=0)
        await log.append(subject("control"), b"-", msg_id="c1")
        second = await log.append(mine, b"2", msg_id="t2", expected_subject_seq=first.seq)
        with pytest.raises(SeqConflict):
            await log.append(mine, b"3", msg_id="t3", expected_subject_seq=first.seq)
        with pytest.raises(SeqConflict):
            await log.append(mine, b"4", msg_id="t4", expected_subject_seq=0)
        assert (await log.extent()).last_seq == second.seq

    async def test_a_repeat_of_a_won_expected_append_is_a_duplicate(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        """A writer whose acknowledgement got lost must not take its own record for another's."""
        first = await log.append(subject("t"), b"1", msg_id="t1", expected_subject_seq=0)
        again = await log.append(subject("t"), b"1", msg_id="t1", expected_subject_seq=0)
        assert again == (first.seq, True)

    async def test_a_repeat_of_an_expected_append_that_was_followed_is_a_conflict(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await log.append(subject("t"), b"1", msg_id="t1", expected_subject_seq=0)
        await log.append(subject("t"), b"2", msg_id="t2", expected_subject_seq=1)
        with pytest.raises(SeqConflict):
            await log.append(subject("t"), b"1", msg_id="t1", expected_subject_seq=0)
        assert (await log.extent()).last_seq == 2

    async def test_a_lost_expected_append_may_be_tried_again_with_its_msg_id(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await log.append(subject("t"), b"1", msg_id="t1")
        with pytest.raises(SeqConflict):
            await log.append(subject("t"), b"2", msg_id="t2", expected_subject_seq=0)
        assert await log.append(subject("t"), b"2", msg_id="t2", expected_subject_seq=1) == (
            2,
            False,
        )

    async def test_an_oversized_record_is_refused(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        limit = log.max_message_bytes
        with pytest.raises(MessageTooLarge):
            await log.append(subject("kv.1"), bytes(limit + 1), msg_id="large")
        await log.append(subject("kv.1"), bytes(limit), msg_id="x" * 200)
        assert (await log.extent()).last_seq == 1

    async def test_read_takes_a_range(self, log: EventLog, subject: Callable[[str], str]) -> None:
        await self._fill(log, subject, 10)
        for start, end, expected in [
            (3, 5, [3, 4, 5]),
            (7, 7, [7]),
            (0, 2, [1, 2]),
            (9, None, [9, 10]),
            (9, 99, [9, 10]),
            (6, 5, []),
            (11, None, []),
            (50, 60, []),
        ]:
            assert [r.seq for r in await listed(log.read(start, end))] == expected, (start, end)

    async def test_read_ends_at_the_head_of_its_beginning(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 3)
        seqs = []
        async with asyncio.timeout(WITHIN_S):
            async for record in log.read(1):
                seqs.append(record.seq)
                await log.append(subject("control"), b"more", msg_id=f"more.{record.seq}")
        assert seqs == [1, 2, 3]

    async def test_trim_removes_what_is_before_and_keeps_the_numbering(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 10)
        before = (await log.extent()).bytes
        await log.trim(0)
        await log.trim(1)
        assert (await log.extent()).first_seq == 1
        await log.trim(4)
        extent = await log.extent()
        assert (extent.first_seq, extent.last_seq) == (4, 10)
        assert extent.bytes < before
        await log.trim(2)
        assert [r.seq for r in await listed(log.read(1))] == [4, 5, 6, 7, 8, 9, 10]
        assert await listed(log.read(1, 3)) == []

    async def test_a_log_that_is_trimmed_empty_goes_on_where_it_was(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 5)
        await log.trim(99)
        extent = await log.extent()
        assert (extent.first_seq, extent.last_seq) == (6, 5)
        assert await listed(log.read(1)) == []
        assert (await log.append(subject("kv.1"), b"next", msg_id="next")).seq == 6
        assert [r.seq for r in await listed(log.read(1))] == [6]

    async def test_a_trimmed_subject_expects_zero(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await log.append(subject("t"), b"1", msg_id="t1")
        await log.append(subject("u"), b"2", msg_id="u1")
        await log.trim(2)
        with pytest.raises(SeqConflict):
            await log.append(subject("t"), b"3", msg_id="t2", expected_subject_seq=1)
        assert (await log.append(subject("t"), b"3", msg_id="t3", expected_subject_seq=0)).seq == 3

    async def test_follow_gives_the_past_and_then_the_present(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 5)
        seen = Collected()
        following = await log.follow(3, seen)
        await seen.until_seq(5)
        await log.append(subject("control"), b"new", msg_id="new")
        await seen.until_seq(6)
        assert seen.seqs == [3, 4, 5, 6]
        assert seen.records[-1].data == b"new"
        await following.close()
        await following.wait()

    async def test_nothing_is_handled_after_close(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        seen = Collected()
        following = await log.follow(1, seen)
        await log.append(subject("control"), b"1", msg_id="1")
        await seen.until_seq(1)
        await following.close()
        await following.close()
        other = Collected()
        second = await log.follow(1, other)
        await log.append(subject("control"), b"2", msg_id="2")
        await other.until_seq(2)
        await second.close()
        assert seen.seqs == [1]

    async def test_followers_do_not_disturb_each_other(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        everything, tail = Collected(), Collected()
        await self._fill(log, subject, 4)
        followings = [await log.follow(1, everything), await log.follow(5, tail)]
        await self._fill_more(log, subject, 300)
        await everything.until_seq(304)
        await tail.until_seq(304)
        assert everything.seqs == list(range(1, 305))
        assert tail.seqs == list(range(5, 305))
        for following in followings:
            await following.close()

    async def _fill_more(self, log: EventLog, subject: Callable[[str], str], count: int) -> None:
        await asyncio.gather(
            *(log.append(subject("kv.m"), b"m", msg_id=f"more.{n}") for n in range(count))
        )

    async def test_follow_from_a_trimmed_place_begins_later(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 6)
        await log.trim(4)
        seen = Collected()
        following = await log.follow(2, seen)
        await seen.until_seq(6)
        assert seen.seqs == [4, 5, 6]
        await following.close()

    async def test_follow_beyond_the_head_is_a_gap(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        """Who has seen record 9 of a log that ends at 2 has seen another log."""
        await self._fill(log, subject, 2)
        with pytest.raises(LogGap) as caught:
            await log.follow(10, Collected())
        assert (caught.value.expected, caught.value.got) == (10, 3)

    async def test_what_handle_raises_ends_the_following(
        self, log: EventLog, subject: Callable[[str], str]
    ) -> None:
        await self._fill(log, subject, 5)
        seqs: list[int] = []

        def handle(record: Record) -> None:
            seqs.append(record.seq)
            if record.seq == 3:
                raise ZeroDivisionError("on purpose")

        following = await log.follow(1, handle)
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(ZeroDivisionError):
                await following.wait()
        assert seqs == [1, 2, 3]
        await following.close()
        with pytest.raises(ZeroDivisionError):
            await following.wait()

    async def test_close_ends_the_followings(self, log: EventLog) -> None:
        following = await log.follow(1, Collected())
        await log.close()
        async with asyncio.timeout(WITHIN_S):
            await following.wait()
        await log.close()

    async def test_identity_stays(self, log: EventLog, subject: Callable[[str], str]) -> None:
        before = await log.extent()
        await self._fill(log, subject, 2)
        assert (await log.extent()).identity == before.identity
