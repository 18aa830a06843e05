"""Writes one producer's events to the log: ordered, numbered, retried, in batches.

`publish` only encodes and queues. A task of the publisher's own gathers what is queued, for
`linger_s` or for as long as the previous batch waits for its acknowledgement, and appends it as one
message. One batch is in flight at a time, so a retry can never overtake a later batch, and it keeps
its `msg_id`, so that it cannot be appended twice either. An event is dropped only by `start_epoch`.
"""

import asyncio
import contextlib
import logging
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

from eventstore import codec
from eventstore.errors import (
    BufferFull,
    EventStoreError,
    LogGap,
    LogUnavailable,
    MessageTooLarge,
)
from eventstore.events import AnyEvent, BlockRemoved, BlockStored
from eventstore.log import Appended, EventLog
from eventstore.subjects import subject
from eventstore.tasks import end

RETRY_MIN_S = 0.05
RETRY_MAX_S = 5.0
ENVELOPE_BYTES = 64
"""Of a batch beside its events and its producer's name: numbers and array heads, below 40."""
CHECK_S = 30.0
"""How often, with a random cut of up to half, an idle publisher looks whether what it wrote last is
still there. While it is not idle, gaps in its numbers show what is not."""
BLOCKS_PER_EVENT_MAX = 16_384
"""As MessagePack a hash takes 9 bytes, so such an event takes 144 KiB."""

_log = logging.getLogger(__name__)


class Publisher:
    """The only writer of `producer`'s subject. Runs from `start` to `close`, or as `async with`."""

    def __init__(
        self,
        log: EventLog,
        namespace: str,
        producer: str,
        epoch: int,
        *,
        linger_s: float = 0.005,
        events_max: int = 100_000,
        batch_bytes_max: int = 256 * 1024,
        retry_s: tuple[float, float] = (RETRY_MIN_S, RETRY_MAX_S),
        check_s: float = CHECK_S,
        jitter: Callable[[], float] = random.random,
        on_log_rewound: Callable[[], None] = lambda: None,
    ) -> None:
        """producer: the subject behind the namespace. epoch: its incarnation, 0 or more.

        events_max: bound of what waits to be sent; beyond it `publish` raises. The one batch in
        flight comes on top, so that after `start_epoch` there is always room for events_max.
        retry_s: first and longest pause between two attempts; jitter: uniform in [0, 1).
        check_s: see CHECK_S.
        on_log_rewound: called when an acknowledgement, or a look after `check_s` without any, shows
        that the log lost records which it had acknowledged before; it may call `start_epoch` and
        `publish`, and must not raise.
        """
        self.producer = producer
        self.events_max = events_max
        self.epoch = epoch
        self.appended_events = 0
        self.appended_batches = 0
        self.retries = 0
        self.duplicates = 0
        """Batches that the log had already: it was only the acknowledgement that got lost."""
        self.dropped_events = 0
        """By `start_epoch`."""
        self.rewinds = 0
        self._log = log
        self._subject = subject(namespace, producer)
        self._linger_s = linger_s
        self._overhead_bytes = ENVELOPE_BYTES + len(producer.encode())
        self._batch_bytes_max = min(batch_bytes_max, log.max_message_bytes) - self._overhead_bytes
        self._retry_s = retry_s
        self._check_s = check_s
        self._jitter = jitter
        self._on_log_rewound = on_log_rewound
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._in_flight = 0
        self._number = 0
        self._published = 0
        self._last_seq = 0
        self._last_checksum = 0
        self._oldest_at = 0.0
        self._failure: EventStoreError | None = None
        self._closed = False
        self._flushes: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._some = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._now: Callable[[], float] = lambda: 0.0

    @property
    def buffered(self) -> int:
        """Events published and not yet acknowledged."""
        return len(self._waiting) + self._in_flight

    @property
    def published(self) -> int:
        """Events published so far."""
        return self._published

    @property
    def last_seq(self) -> int:
        """Position of the last batch that the log acknowledged; 0 before the first, and after it
        was found to be lost."""
        return self._last_seq

    @property
    def oldest_buffered_s(self) -> float:
        """Upper bound for the age of the oldest buffered event, in seconds; 0 if there is none."""
        return self._now() - self._oldest_at if self.buffered else 0.0

    def publish(self, event: AnyEvent) -> None:
        """Queue `event`. Never waits; about 1 µs, and 10 ns for each hash in it.

        The event is encoded here, so what becomes of it afterwards does not matter.
        Raises BufferFull, MessageTooLarge (see `split_blocks`), LogUnavailable after `close`.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise LogUnavailable(f"the publisher of {self.producer} is closed")
        waiting = self._waiting
        if len(waiting) >= self.events_max:
            raise BufferFull(self.producer, self.events_max)
        data = codec.encoded_event(event)
        size = len(data)
        if size > self._batch_bytes_max:
            self._check_size(size)
        if not waiting:
            if not self._in_flight:
                self._oldest_at = self._now()
            self._some.set()
        waiting.append(data)
        self._published += 1
        self._waiting_bytes += size
        if self._waiting_bytes >= self._batch_bytes_max:
            self._hurry.set()

    def start_epoch(self, epoch: int) -> int:
        """Drop what is queued and number anew from 0 in `epoch`; returns how many were dropped.

        A batch in flight still ends in the old epoch, before all that follows.
        """
        dropped = len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self.epoch = epoch
        self._number = 0
        self.dropped_events += dropped
        if not self._in_flight:
            self._settle()
        return dropped

    async def flush(self, timeout_s: float | None = None) -> None:
        """Return when all that is published up to now is in the log (or dropped).

        Raises LogUnavailable after `timeout_s`; nothing is lost by that.
        """
        if self.buffered == 0:
            return
        if self._task is None or self._task.done():
            raise self._failure or LogUnavailable(f"the publisher of {self.producer} does not run")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushes.append((self._published, done))
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError as error:
            raise LogUnavailable(
                f"{self.buffered} events of {self.producer} are not written after {timeout_s:g} s"
            ) from error

    def start(self) -> None:
        """Begin to write, on the running event loop."""
        self._now = asyncio.get_running_loop().time
        self._oldest_at = self._now()
        self._task = asyncio.create_task(self._run(), name=f"publish {self.producer}")

    async def close(self, timeout_s: float = 5.0) -> int:
        """Write what is buffered, for at most `timeout_s`, then stop. Safe to call twice.

        Returns how many events were left unwritten.
        """
        self._closed = True
        try:
            if self._task is not None and not self._task.done():
                with contextlib.suppress(EventStoreError):
                    await self.flush(timeout_s)
        finally:
            if self._task is not None:
                await end(self._task)
        if self._task is not None and not self._task.cancelled():
            self._task.result()
        if self.buffered:
            _log.error("events left unwritten producer=%s events=%d", self.producer, self.buffered)
        return self.buffered

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_size(self, size: int) -> None:
        """Such an event fills a message of its own, if the log takes it at all."""
        event_bytes_max = self._log.max_message_bytes - self._overhead_bytes
        if size > event_bytes_max:
            raise MessageTooLarge(size, event_bytes_max)

    async def _run(self) -> None:
        try:
            await self._write_for_ever()
        except EventStoreError as error:
            self._failure = error
            _log.error("publisher stopped producer=%s: %s", self.producer, error)
        finally:
            self._closed = True
            stopped = LogUnavailable(f"the publisher of {self.producer} stopped")
            for _, done in self._flushes:
                if not done.done():
                    done.set_exception(self._failure or stopped)

    async def _write_for_ever(self) -> None:
        while True:
            if not self._some.is_set() and not await self._some_came():
                await self._check_last()
                continue
            await self._linger()
            events = self._take()
            if not events:
                continue
            msg_id = f"{self.producer}.{self.epoch}.{self._number}"
            data = codec.join(self.producer, self.epoch, self._number, events)
            self._number += len(events)
            taken_at = self._now()
            appended = await self._append(data, msg_id)
            self._in_flight = 0
            self._oldest_at = taken_at
            self.appended_events += len(events)
            self.appended_batches += 1
            self.duplicates += appended.duplicate
            self._settle()
            self._last_checksum = zlib.crc32(data)
            self._watch_for_rewind(appended.seq)

    async def _some_came(self) -> bool:
        """Wait for something to write; False if there was nothing for long."""
        try:
            async with asyncio.timeout(self._check_s * (0.5 + self._jitter() / 2)):
                await self._some.wait()
        except TimeoutError:
            return False
        return True

    async def _check_last(self) -> None:
        """Notice that the log has lost its tail, also if nothing more is ever written."""
        seq = self._last_seq
        if not seq:
            return
        try:
            found = [record async for record in self._log.read(seq, seq)]
            trimmed = not found and (await self._log.extent()).first_seq > seq
        except (LogUnavailable, LogGap):
            return
        there = any(
            record.subject == self._subject and zlib.crc32(record.data) == self._last_checksum
            for record in found
        )
        if not there and not trimmed:
            self._last_seq = 0
            self._rewound(seq)

    async def _linger(self) -> None:
        """Let more events gather, unless there is a batch full of them or somebody waits."""
        if self._waiting_bytes < self._batch_bytes_max and not self._flushes:
            self._hurry.clear()
            timer = asyncio.get_running_loop().call_later(self._linger_s, self._hurry.set)
            try:
                await self._hurry.wait()
            finally:
                timer.cancel()

    def _take(self) -> list[bytes]:
        """The next batch. At least one event, if there is one."""
        waiting, room = self._waiting, self._batch_bytes_max
        if self._waiting_bytes <= room:
            events = list(waiting)
            waiting.clear()
            self._waiting_bytes = 0
        else:
            events = []
            while waiting and (len(waiting[0]) <= room or not events):
                data = waiting.popleft()
                room -= len(data)
                self._waiting_bytes -= len(data)
                events.append(data)
        self._in_flight = len(events)
        if not waiting:
            self._some.clear()
        return events

    async def _append(self, data: bytes, msg_id: str) -> Appended:
        """Append until the log has it. Raises what no retry can mend."""
        delay_s, delay_max_s = self._retry_s
        troubled = False
        while True:
            try:
                appended = await self._log.append(self._subject, data, msg_id=msg_id)
            except LogUnavailable as error:
                self.retries += 1
                if not troubled:
                    _log.warning("append failed, retrying producer=%s: %s", self.producer, error)
                    troubled = True
                await asyncio.sleep(delay_s * (0.5 + self._jitter() / 2))
                delay_s = min(delay_max_s, delay_s * 2)
            else:
                if troubled:
                    _log.info("append succeeded producer=%s seq=%d", self.producer, appended.seq)
                return appended

    def _watch_for_rewind(self, seq: int) -> None:
        # One batch at a time: in one life of the log, acknowledged positions only rise.
        rewound = seq <= self._last_seq
        self._last_seq = seq
        if rewound:
            self._rewound(seq)

    def _rewound(self, seq: int) -> None:
        self.rewinds += 1
        _log.error("the log went backwards producer=%s seq=%d", self.producer, seq)
        self._on_log_rewound()

    def _settle(self) -> None:
        """Tell the flushes. With nothing in flight, all but what waits is in the log or dropped."""
        settled = self._published - len(self._waiting)
        while self._flushes and self._flushes[0][0] <= settled:
            _, done = self._flushes.popleft()
            if not done.done():
                done.set_result(None)


def split_blocks(
    event: BlockStored | BlockRemoved, blocks_max: int = BLOCKS_PER_EVENT_MAX
) -> Iterator[BlockStored | BlockRemoved]:
    """The same fact as events of at most `blocks_max` blocks each; stored ones chain up."""
    hashes = event.sequence_hashes
    for start in range(0, max(1, len(hashes)), blocks_max):
        part = hashes[start : start + blocks_max]
        if isinstance(event, BlockRemoved):
            yield BlockRemoved(event.worker_id, event.dp_rank, part)
        else:
            parent = hashes[start - 1] if start else event.parent_hash
            yield BlockStored(event.worker_id, event.dp_rank, parent, part)
