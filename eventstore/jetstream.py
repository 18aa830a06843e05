"""The log on NATS JetStream: one file-backed stream a namespace.

Appends share a window: many can wait for their acknowledgement at once, and one subscription takes
all acknowledgements, for a tenth of what the client library's own publish costs. Reading and
following go through `eventstore.consumer`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self

import msgspec
from msgspec import Struct

from eventstore.connect import ApiError, Nats, NatsMessage, NatsSubscription
from eventstore.consumer import OrderedConsumer
from eventstore.errors import LogUnavailable, MessageTooLarge, SeqConflict
from eventstore.frames import Order
from eventstore.log import Appended, EventLog, Extent, Record
from eventstore.relayed import Handle, RelayedFollowing
from eventstore.stream import Stream

APPEND_TIMEOUT_S = 5.0
WINDOW_MAX = 1024
"""Appends that wait for their acknowledgement. One more waits for a place, within its timeout."""
HEADERS_BYTES = 1024
"""Kept free of the server's max_payload, which counts the headers."""
MSG_ID_MAX = 800
READ_AHEAD_MAX = 1024
"""Records that `read` holds before it stops the server."""
_WRONG_LAST_SEQUENCE = 10071


class _Ack(Struct, frozen=True):
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_ack = msgspec.json.Decoder(_Ack)


class JetStreamLog(EventLog):
    """The log of a namespace. Made by `open`. The connection belongs to the caller."""

    def __init__(self, nats: Nats, namespace: str, replicas: int | None) -> None:
        self._nats = nats
        self._namespace = namespace
        self._replicas = replicas
        self._stream = Stream(nats, namespace, replicas=replicas)
        self._window = asyncio.Semaphore(WINDOW_MAX)
        self._inbox = nats.client.new_inbox() + "."
        self._acks: dict[int, asyncio.Future[NatsMessage | None]] = {}
        self._numbers = 0
        self._subscription: NatsSubscription | None = None
        self._consumers: set[OrderedConsumer] = set()
        self._relayed: set[RelayedFollowing] = set()

    @classmethod
    async def open(
        cls,
        nats: Nats,
        namespace: str,
        *,
        replicas: int | None = None,
        create: bool = True,
        wait_s: float = 10.0,
    ) -> Self:
        """Open the namespace's log; if there is none, make it, or raise.

        replicas: see `eventstore.replicas`. wait_s: for a cluster that still elects its leaders.
        Raises LogUnavailable, also if a stream of that name cannot serve as the log.
        """
        self = cls(nats, namespace, replicas)
        await self._stream.open(create=create, wait_s=wait_s)
        self._subscription = await nats.subscribe(f"{self._inbox}*", self._on_ack)
        nats.on_disconnected.add(self._give_up_appends)
        return self

    @property
    def max_message_bytes(self) -> int:
        return self._nats.max_payload - HEADERS_BYTES

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if len(data) > self.max_message_bytes or len(msg_id) > MSG_ID_MAX:
            raise MessageTooLarge(len(data) + len(msg_id), self.max_message_bytes)
        headers = {"Nats-Msg-Id": msg_id}
        if expected_subject_seq is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_subject_seq)
        self._numbers += 1
        number = self._numbers
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(APPEND_TIMEOUT_S), self._window:
                await self._nats.wait_connected()
                future: asyncio.Future[NatsMessage | None]
                future = asyncio.get_running_loop().create_future()
                self._acks[number] = future
                await self._nats.publish(subject, data, f"{self._inbox}{number}", headers)
                message = await future
        except TimeoutError as error:
            what = f"{self._nats.url} did not acknowledge an append within {APPEND_TIMEOUT_S:g} s"
            raise self._nats.denied(what, began_at) or LogUnavailable(what) from error
        finally:
            self._acks.pop(number, None)
        if message is None:
            raise LogUnavailable("the connection to NATS was lost during an append")
        if not message.data:
            # Nobody listens to the subject: no JetStream just now, or the stream is gone.
            await self._stream.ensure()
            raise LogUnavailable(f"no stream on {self._nats.url} took the append")
        try:
            return self._appended(message.data, subject, expected_subject_seq)
        except SeqConflict:
            # The server looks at the expected seq before it looks for a repeat.
            seq = await self._stream.last_with_id(subject, msg_id)
            if seq is None:
                raise
            return Appended(seq, duplicate=True)

    async def read(self, start_seq: int, end_seq: int | None = None) -> AsyncIterator[Record]:
        extent = await self.extent()
        end = extent.last_seq if end_seq is None else min(end_seq, extent.last_seq)
        start = max(start_seq, extent.first_seq)
        if start > end:
            return
        if start == end:
            record = await self._stream.record(start)  # for one, a consumer would cost more
            if record is not None:
                yield record
            return
        ahead: deque[Record] = deque()
        arrived = asyncio.Event()
        complete = False

        def handle(record: Record) -> None:
            if record.seq <= end:
                ahead.append(record)
                arrived.set()
                if len(ahead) >= READ_AHEAD_MAX:
                    consumer.room.clear()
            if record.seq >= end:
                finish()

        def finish() -> None:
            nonlocal complete
            complete = True
            arrived.set()

        consumer = OrderedConsumer(
            self._nats, self._stream, start, handle, caught_up=finish, on_ended=arrived.set
        )
        self._consumers.add(consumer)
        try:
            await consumer.start()
            while True:
                while ahead:
                    yield ahead.popleft()
                if complete:
                    return
                if consumer.ended:
                    await consumer.wait()
                    raise LogUnavailable("the log was closed during a read")
                consumer.room.set()
                arrived.clear()
                await arrived.wait()
        finally:
            self._consumers.discard(consumer)
            await consumer.close()

    async def follow(self, start_seq: int, handle: Callable[[Record], None]) -> OrderedConsumer:
        """See `EventLog`. Raises LogUnavailable if the following cannot begin.

        LogGap is raised, here or by `wait`, if the log ends before the record that precedes the
        next one, or was made anew: what was read before is not the past of what would come.
        """
        self._consumers.difference_update([old for old in self._consumers if old.ended])
        consumer = OrderedConsumer(self._nats, self._stream, start_seq, handle)
        await consumer.start()
        self._consumers.add(consumer)
        return consumer

    async def follow_apart(self, start_seq: int, handle: Handle) -> RelayedFollowing:
        """`follow`, with a process of its own that receives: see `eventstore.relayed`.

        Raises RelayFailed, too.
        """
        self._relayed.difference_update([old for old in self._relayed if old.ended])
        level = logging.getLogger(__package__).getEffectiveLevel()
        order = Order(
            self._nats.addresses,
            self._nats.access,
            self._namespace,
            self._replicas,
            start_seq,
            level,
        )
        following = RelayedFollowing(order, handle)
        await following.start()
        self._relayed.add(following)
        return following

    async def extent(self) -> Extent:
        info = await self._stream.info()
        state = info.state
        first_seq = state.first_seq if state.messages else state.last_seq + 1
        return Extent(info.created, first_seq, state.last_seq, state.bytes)

    async def trim(self, before_seq: int) -> None:
        """See `EventLog`. Raises LogUnavailable."""
        if before_seq > 1:
            await self._stream.purge(before_seq)

    async def close(self) -> None:
        self._nats.on_disconnected.discard(self._give_up_appends)
        for following in (*self._consumers, *self._relayed):
            await following.close()
        if self._subscription is not None:
            await self._nats.unsubscribe(self._subscription)
        self._give_up_appends()

    def _appended(self, data: bytes, subject: str, expected_subject_seq: int | None) -> Appended:
        try:
            ack = _ack.decode(data)
        except msgspec.MsgspecError as error:
            raise LogUnavailable(f"{self._nats.url} gave an unknown acknowledgement") from error
        if ack.error is None:
            return Appended(ack.seq, ack.duplicate)
        if ack.error.err_code == _WRONG_LAST_SEQUENCE:
            raise SeqConflict(subject, expected_subject_seq or 0)
        raise LogUnavailable(
            f"JetStream refused an append: {ack.error.description} ({ack.error.err_code})"
        )

    async def _on_ack(self, message: NatsMessage) -> None:
        future = self._acks.get(int(message.subject[len(self._inbox) :]))
        if future is not None and not future.done():
            future.set_result(message)

    def _give_up_appends(self) -> None:
        # Their acknowledgements may have been lost on the way, and a retry is safe.
        for future in self._acks.values():
            if not future.done():
                future.set_result(None)
