"""The log as processes meet it: one server that may fail, and a faulty link to it for each of them.

    FaultyLog of a process  ──▶ delay, drop, lost answer, cut ──▶  LogServer  ──▶  MemoryLog
    (an `EventLog`)         ◀── slow, in slices, trimmed away ◀──  (its history)

`LogServer` keeps the `MemoryLog` and everything that ever was in it, in *lives*: the log begins a
new one when it is made anew, and when a crash of the server rolls its tail back. A link behaves as
the real client of JetStream does; with every rate at 0 it passes the same contract suite.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from random import Random
from typing import Any, TypeVar

from msgspec import Struct

from eventstore.errors import EventStoreError, LogGap, LogUnavailable, MessageTooLarge, SeqConflict
from eventstore.log import Appended, EventLog, Extent, Following, Record
from eventstore.memory import MESSAGE_BYTES_MAX, MemoryLog

ANSWER_S = 5.0
"""How long a link waits for an answer, as the real client does."""
REATTACH_S = 2.0
"""Longest time until a following that lost its server is taken up again."""
SLICE_RECORDS = 64

T = TypeVar("T")


class LinkRates(Struct, frozen=True, kw_only=True):
    """How links treat messages. Probabilities are per write; times are means, in seconds."""

    latency_s: float = 0.0
    drop: float = 0.0
    """The message never reaches the server."""
    lost_answer: float = 0.0
    """It does, and the writer does not hear of it."""
    duplicate: float = 0.0
    """It arrives once more, after the server has forgotten its id."""
    duplicate_after_s: float = 1.0


class Life:
    """One unbroken history of the log. `records` are all that it ever had, also if trimmed."""

    def __init__(self, number: int, identity: str, now_ns: Callable[[], int]) -> None:
        self.number = number
        self.records: list[Record] = []
        self.msg_ids: list[str] = []
        self.log = MemoryLog(self._time_ns, identity)
        self.identity = identity
        self._now_ns = now_ns
        self._of_old_ns: int | None = None

    @property
    def head(self) -> int:
        return len(self.records)

    def append(self, subject: str, data: bytes, msg_id: str, expected: int | None) -> Appended:
        """As `MemoryLog.append`, with its errors."""
        appended = at_once(
            self.log.append(subject, data, msg_id=msg_id, expected_subject_seq=expected)
        )
        if not appended.duplicate:
            self.records.append(Record(appended.seq, self._time_ns(), subject, data))
            self.msg_ids.append(msg_id)
        return appended

    def relive(self, other: "Life", count: int) -> None:
        """Begin with the first `count` records of another life, times and trimmed places too."""
        for record, msg_id in zip(other.records[:count], other.msg_ids, strict=False):
            self._of_old_ns = record.time_ns
            self.append(record.subject, record.data, msg_id, None)
        self._of_old_ns = None
        at_once(self.log.trim(other.extent().first_seq))

    def extent(self) -> Extent:
        return at_once(self.log.extent())

    def _time_ns(self) -> int:
        return self._now_ns() if self._of_old_ns is None else self._of_old_ns


class LogServer:
    """What all links lead to. `on_append` sees every new record, `on_new_life` what was lost."""

    def __init__(
        self,
        now_ns: Callable[[], int],
        rates: LinkRates,
        on_append: Callable[[Life, Record], None] = lambda life, record: None,
        on_new_life: Callable[[Life, list[Record]], None] = lambda life, lost: None,
    ) -> None:
        self._now_ns = now_ns
        self._on_append = on_append
        self._on_new_life = on_new_life
        self.rates = rates
        """Of all links."""
        self.life = Life(0, "life-0", now_ns)
        self.lives = [self.life]
        self.links: list[FaultyLog] = []
        self.is_up = True
        self.starts = 0
        """Connections live no longer than the server: this tells one start from another."""

    def append(self, subject: str, data: bytes, msg_id: str, expected: int | None) -> Appended:
        """Raises SeqConflict."""
        life = self.life
        appended = life.append(subject, data, msg_id, expected)
        if not appended.duplicate:
            self._on_append(life, life.records[-1])
            for link in self.links:
                link.wake()
        return appended

    def crash(self, lost_tail: int = 0) -> None:
        """Stop, and forget the last `lost_tail` records."""
        self.is_up = False
        if lost_tail:
            self._begin_life(self.life.identity, max(0, self.life.head - lost_tail))
        for link in self.links:
            link.disconnect()

    def start(self) -> None:
        self.is_up = True
        self.starts += 1

    def recreate(self) -> None:
        """Delete the stream, and make an empty one."""
        self._begin_life(f"life-{self.life.number + 1}", 0)
        for link in self.links:
            link.wake()

    def _begin_life(self, identity: str, kept: int) -> None:
        before = self.life
        self.life = Life(before.number + 1, identity, self._now_ns)
        self.lives.append(self.life)
        self.life.relive(before, kept)
        self._on_new_life(self.life, before.records[kept:])


class FaultyLog(EventLog):
    """One process's log. Belongs to it: after `kill` nothing it does reaches the server."""

    def __init__(
        self,
        server: LogServer,
        rng: Random,
        on_acknowledged: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        """on_acknowledged: told what the process now knows to be in the log."""
        self.server = server
        self.is_cut = False
        self.slow_s = 0.0
        """Added to the delay of what is read, in seconds."""
        self._rng = rng
        self._on_acknowledged = on_acknowledged
        self._is_dead = False
        self._waiting: dict[asyncio.Future[Any], None] = {}
        self._followings: dict[_FaultyFollowing, None] = {}
        server.links.append(self)

    @property
    def max_message_bytes(self) -> int:
        return MESSAGE_BYTES_MAX

    @property
    def is_open(self) -> bool:
        return self.server.is_up and not self.is_cut

    def cut(self) -> None:
        self.is_cut = True
        self.wake()

    def heal(self) -> None:
        self.is_cut = False

    def kill(self) -> None:
        """The process is gone. What it sent before may still arrive."""
        self._is_dead = True
        if self in self.server.links:
            self.server.links.remove(self)

    def disconnect(self) -> None:
        """The connection broke, and the client can tell."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(LogUnavailable("the connection was lost"))
        self.wake()

    def wake(self) -> None:
        for following in self._followings:
            following.changed.set()

    def delay_s(self) -> float:
        return self.server.rates.latency_s * self._rng.expovariate(1)

    # --- EventLog ---------------------------------------------------------------------------------

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if len(data) > self.max_message_bytes:
            raise MessageTooLarge(len(data), self.max_message_bytes)

        def arrive() -> Appended:
            rates = self.server.rates
            appended = self.server.append(subject, data, msg_id, expected_subject_seq)
            if self._rng.random() < rates.duplicate:
                after_s = rates.duplicate_after_s * self._rng.expovariate(1)
                loop = asyncio.get_running_loop()
                loop.call_later(after_s, self._repeat, subject, data, msg_id, expected_subject_seq)
            return appended

        appended = await self.ask("an append", arrive, lossy=True)
        self._on_acknowledged(data)
        return appended

    async def read(self, start_seq: int, end_seq: int | None = None) -> AsyncIterator[Record]:
        """See `EventLog`. Raises LogGap if the log begins a new life meanwhile."""
        life, head = await self.ask("a read", lambda: (self.server.life, self.server.life.head))
        end = head if end_seq is None else min(end_seq, head)
        seq = start_seq
        while True:
            seq = max(seq, life.extent().first_seq)
            if seq > end:
                return
            async for record in life.log.read(seq, min(end, seq + SLICE_RECORDS - 1)):
                yield record
                seq = record.seq + 1
            now = await self.ask("a read", lambda: self.server.life)
            if now is not life:
                raise LogGap(seq, now.head + 1)

    async def follow(self, start_seq: int, handle: Callable[[Record], None]) -> Following:
        life = await self.ask("a follow", lambda: self.server.life)
        if start_seq > life.head + 1:
            raise LogGap(start_seq, life.head + 1)
        following = _FaultyFollowing(self, life.identity, start_seq, handle)
        self._followings[following] = None
        return following

    async def extent(self) -> Extent:
        return await self.ask("a look at the extent", lambda: self.server.life.extent())

    async def trim(self, before_seq: int) -> None:
        await self.ask("a trim", lambda: at_once(self.server.life.log.trim(before_seq)))

    async def close(self) -> None:
        for following in tuple(self._followings):
            await following.close()

    # --- the wire ---------------------------------------------------------------------------------

    async def ask(self, what: str, ask: Callable[[], T], *, lossy: bool = False) -> T:
        """Have `ask` called at the server; return its answer, or raise what it raises.

        lossy: it may be dropped, or its answer. Raises LogUnavailable if there is no answer: nobody
        knows then whether it was called.
        """
        rates = self.server.rates
        lost = lossy and self._rng.random() < rates.drop
        unheard = lossy and self._rng.random() < rates.lost_answer
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def hear(result: T | EventStoreError) -> None:
            if answer.done() or not self.is_open:
                return
            if isinstance(result, EventStoreError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        starts = self.server.starts

        def arrive() -> None:
            if not self.is_open or self.server.starts != starts:
                return
            result: T | EventStoreError
            try:
                result = ask()
            except EventStoreError as error:
                result = error
            if not unheard:
                loop.call_later(self.delay_s(), hear, result)

        if not lost and not self._is_dead:
            loop.call_later(self.delay_s(), arrive)
        self._waiting[answer] = None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            raise LogUnavailable(f"no answer to {what} within {ANSWER_S:g} s") from None
        finally:
            del self._waiting[answer]

    def _repeat(self, subject: str, data: bytes, msg_id: str, expected: int | None) -> None:
        if self.server.is_up:
            try:
                self.server.append(subject, data, f"{msg_id}.again", expected)
            except SeqConflict:
                return  # the log's other defence against repeats

    def drop(self, following: "_FaultyFollowing") -> None:
        self._followings.pop(following, None)


class _FaultyFollowing(Following):
    """Like the real consumer: after any trouble it goes on behind the last record handled, once it
    has seen that the log is the same and has that record.
    """

    def __init__(
        self, link: FaultyLog, identity: str, start_seq: int, handle: Callable[[Record], None]
    ) -> None:
        self.changed = asyncio.Event()
        """There may be another record, or the connection broke."""
        self._link = link
        self._identity = identity
        self._next_seq = max(1, start_seq)
        self._last_handled: Record | None = None
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
        self._end()

    def _end(self) -> None:
        self._link.drop(self)
        self._ended.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._deliver_until_lost()
                await self._reattach()
        except Exception as error:  # whatever `handle` raises comes out of `wait`
            self._error = error
        finally:
            self._end()

    async def _deliver_until_lost(self) -> None:
        link, server = self._link, self._link.server
        starts = server.starts
        while True:
            self.changed.clear()
            if self._next_seq > server.life.head:
                await self.changed.wait()
            await asyncio.sleep(link.delay_s() + link.slow_s)
            life = server.life
            if not link.is_open or server.starts != starts or life.identity != self._identity:
                return
            # Read no sooner than handed over: what a slow reader has not got may be trimmed.
            start = max(self._next_seq, life.extent().first_seq)
            async for record in life.log.read(start, start + SLICE_RECORDS - 1):
                self._next_seq = record.seq + 1
                self._last_handled = record
                self._handle(record)

    async def _reattach(self) -> None:
        """Raises LogGap if what was read is not this log's past."""
        link = self._link
        while True:
            await asyncio.sleep(REATTACH_S * link._rng.random())
            if link.is_open:
                break
        life = link.server.life
        if life.identity != self._identity:
            raise LogGap(self._next_seq, life.extent().first_seq)
        if life.head + 1 < self._next_seq:
            raise LogGap(self._next_seq, life.head + 1)
        # A log that lost its tail may have grown past that place again.
        last = self._last_handled
        if last is not None and life.records[last.seq - 1].time_ns != last.time_ns:
            raise LogGap(last.seq + 1, last.seq)


def at_once(operation: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, as those of `MemoryLog`."""
    try:
        operation.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")
