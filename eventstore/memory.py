"""The log in memory: the model of `eventstore.jetstream` for tests and simulations.

Same semantics, same errors; `tests/log_contract.py` holds the two together. It never fails by
itself: faults are put around it. The clock is the caller's, so a run can be repeated exactly.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from eventstore.errors import LogGap, MessageTooLarge, SeqConflict
from eventstore.log import Appended, EventLog, Extent, Following, Record

DUPLICATE_WINDOW_NS = 120 * 1_000_000_000
MESSAGE_BYTES_MAX = 1024 * 1024
SLICE_RECORDS = 64
"""Records handled before others on the event loop get their turn."""


class MemoryLog(EventLog):
    """One log, shared by everything that is given it."""

    def __init__(self, clock: Callable[[], int], identity: str = "memory") -> None:
        """clock: UTC nanoseconds, never going back. identity: see `Extent`."""
        self._clock = clock
        self._identity = identity
        self._records: list[Record] = []
        self._first_seq = 1
        self._bytes = 0
        self._last_on_subject: dict[str, tuple[int, str]] = {}
        self._seen: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """msg_id → (seq, time_ns) within the window, oldest first."""
        self._followings: dict[_MemoryFollowing, None] = {}  # ordered, unlike a set

    @property
    def max_message_bytes(self) -> int:
        return MESSAGE_BYTES_MAX

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if len(data) > self.max_message_bytes:
            raise MessageTooLarge(len(data), self.max_message_bytes)
        now_ns = self._clock()
        while self._seen and next(iter(self._seen.values()))[1] <= now_ns - DUPLICATE_WINDOW_NS:
            self._seen.popitem(last=False)
        last_seq, last_id = self._last_on_subject.get(subject, (0, ""))
        if last_seq < self._first_seq:
            last_seq, last_id = 0, ""  # trimmed: nothing is left on the subject
        if expected_subject_seq is not None and expected_subject_seq != last_seq:
            # Before the look for a repeat, as the real log does it.
            if last_id == msg_id:
                return Appended(last_seq, duplicate=True)
            raise SeqConflict(subject, expected_subject_seq)
        if (seen := self._seen.get(msg_id)) is not None:
            return Appended(seen[0], duplicate=True)
        seq = self._last_seq + 1
        self._records.append(Record(seq, now_ns, subject, data))
        self._bytes += len(subject) + len(data)
        self._last_on_subject[subject] = (seq, msg_id)
        self._seen[msg_id] = (seq, now_ns)
        for following in self._followings:
            following.arrived.set()
        return Appended(seq, duplicate=False)

    async def read(self, start_seq: int, end_seq: int | None = None) -> AsyncIterator[Record]:
        end = self._last_seq if end_seq is None else min(end_seq, self._last_seq)
        seq = start_seq
        while True:
            seq = max(seq, self._first_seq)
            if seq > end:
                return
            yield self._records[seq - self._first_seq]
            seq += 1

    async def follow(self, start_seq: int, handle: Callable[[Record], None]) -> Following:
        """See `EventLog`. Raises LogGap if the log ends before record `start_seq - 1`."""
        if start_seq > self._last_seq + 1:
            raise LogGap(start_seq, self._last_seq + 1)
        following = _MemoryFollowing(self, start_seq, handle)
        self._followings[following] = None
        return following

    async def extent(self) -> Extent:
        return Extent(self._identity, self._first_seq, self._last_seq, self._bytes)

    async def trim(self, before_seq: int) -> None:
        count = min(before_seq, self._last_seq + 1) - self._first_seq
        if count > 0:
            self._bytes -= sum(len(r.subject) + len(r.data) for r in self._records[:count])
            del self._records[:count]
            self._first_seq += count

    async def close(self) -> None:
        for following in tuple(self._followings):
            await following.close()

    @property
    def _last_seq(self) -> int:
        return self._first_seq + len(self._records) - 1

    def _from(self, seq: int) -> list[Record]:
        """The next records from `seq` on, at most a slice of them."""
        start = max(0, seq - self._first_seq)
        return self._records[start : start + SLICE_RECORDS]

    def _drop(self, following: "_MemoryFollowing") -> None:
        self._followings.pop(following, None)


class _MemoryFollowing(Following):
    def __init__(self, log: MemoryLog, start_seq: int, handle: Callable[[Record], None]) -> None:
        self.arrived = asyncio.Event()
        self._log = log
        self._next_seq = start_seq
        self._handle = handle
        self._error: Exception | None = None
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="follow")

    async def wait(self) -> None:
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._end()  # a task that is cancelled before its first step runs no `finally`

    def _end(self) -> None:
        self._log._drop(self)
        self._ended.set()

    async def _run(self) -> None:
        try:
            while True:
                records = self._log._from(self._next_seq)
                for record in records:
                    self._next_seq = record.seq + 1
                    self._handle(record)
                if records:
                    await asyncio.sleep(0)
                else:
                    self.arrived.clear()
                    await self.arrived.wait()
        except Exception as error:  # whatever `handle` raises comes out of `wait`
            self._error = error
        finally:
            self._end()
