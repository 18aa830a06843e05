"""An ordered consumer of a whole stream: every record once, in order, until it is closed.

The consumer lives in the server's memory and ends with its subscription: nothing is left behind.
Whatever goes wrong (a lost message, a restart of the server, silence) has one answer: to make a new
consumer from the record after the last one handled. The client library has an ordered consumer too,
but answers flow control when a message arrives instead of when it was handled, so that a slow
handler gets no back-pressure, and what then overflows is lost without a word.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from datetime import datetime

from msgspec import Struct

from eventstore.connect import JetStreamRefused, Nats, NatsMessage, NatsSubscription
from eventstore.errors import LogGap, LogUnavailable
from eventstore.log import Record
from eventstore.stream import STREAM_NOT_FOUND, Stream
from eventstore.tasks import end

SLICE_S = 0.002
"""How long records are handled before others on the event loop get their turn."""
HEARTBEAT_S = 1
SILENCE_MAX_S = 3 * HEARTBEAT_S
INACTIVE_S = 10
"""The server removes a consumer that nobody has listened to for so long."""
RETRY_MAX_S = 2.0
REWIND_CHECKS = 3
REWIND_CHECK_S = 0.2
_NS = 1_000_000_000

_log = logging.getLogger(__name__)


class _ConsumerInfo(Struct, frozen=True):
    num_pending: int


def parse_ack_subject(reply: str) -> tuple[int, int, int, int]:
    """A delivered message's stream seq, consumer seq, time (UTC ns) and pending count.

        $JS.ACK.<stream>.<consumer>.<delivered>.<seq>.<consumer seq>.<ns>.<pending>
        $JS.ACK.<domain>.<account>.<stream>.<consumer>.… as above ….<pending>[.<token>]

    Raises ValueError for any other subject.
    """
    tokens = reply.split(".")
    count = len(tokens)
    if (count != 9 and count < 11) or tokens[0] != "$JS" or tokens[1] != "ACK":
        raise ValueError(f"{reply!r} is not the reply subject of a stream's message")
    seq, consumer_seq, time_ns, pending = tokens[5:9] if count == 9 else tokens[7:11]
    return int(seq), int(consumer_seq), int(time_ns), int(pending)


def nanoseconds(time: str) -> int:
    """UTC ns of a time as the server writes it, RFC 3339 with up to nine digits of a second.

    Raises ValueError.
    """
    whole, _, fraction = time.removesuffix("Z").partition(".")
    seconds = int(datetime.fromisoformat(f"{whole}+00:00").timestamp())
    return seconds * _NS + int(fraction.ljust(9, "0") or 0)


class OrderedConsumer:
    """A `Following` of `stream` from `start_seq` on. `start` sets it going."""

    def __init__(
        self,
        nats: Nats,
        stream: Stream,
        start_seq: int,
        handle: Callable[[Record], None],
        caught_up: Callable[[], None] = lambda: None,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """caught_up: called whenever all that the stream held has been handled."""
        self.room = asyncio.Event()
        """While it is cleared nothing is handled, and soon the server stops sending."""
        self.room.set()
        self._nats = nats
        self._stream = stream
        self._next_seq = max(1, start_seq)
        self._handle = handle
        self._caught_up = caught_up
        self._on_ended = on_ended
        self._created: str | None = None
        self._last_handled: tuple[int, int] | None = None
        """seq and time_ns of the last record handled."""
        self._subscription: NatsSubscription | None = None
        self._consumer_seq = 0
        self._verified = asyncio.Event()
        self._lost = asyncio.Event()
        self._active = False
        self._slice_end = 0.0
        self._error: Exception | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def start(self) -> None:
        """Returns when records begin to come. Raises LogUnavailable, and LogGap if the stream ends
        before the record that precedes `start_seq`.
        """
        try:
            await self._attach()
        except BaseException:
            await self._end()
            raise
        self._nats.on_disconnected.add(self._lost.set)
        self._task = asyncio.create_task(self._run(), name=f"follow {self._stream.name}")

    async def wait(self) -> None:
        """Return after `close`; raise what ended the following otherwise."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Stop; nothing is handled any more. Safe to call twice."""
        if self._task is not None:
            await end(self._task)
            await self._end()  # a task that is cancelled before its first step runs no `finally`

    async def _run(self) -> None:
        try:
            while self._error is None:
                await self._until_lost()
                if self._error is None:
                    await self._reattach()
        finally:
            await self._end()

    async def _end(self) -> None:
        self._nats.on_disconnected.discard(self._lost.set)
        self._ended.set()
        self._on_ended()
        await self._detach()

    async def _until_lost(self) -> None:
        while True:
            self._active = False
            try:
                async with asyncio.timeout(SILENCE_MAX_S):
                    await self._lost.wait()
                return
            except TimeoutError:
                waiting = self._subscription is not None and self._subscription.pending_msgs > 0
                busy = self._active or waiting or not self.room.is_set()
                if not busy and self._nats.connected:
                    _log.warning("consumer silent stream=%s", self._stream.name)
                    return

    async def _reattach(self) -> None:
        delay_s = 0.05
        while True:
            try:
                await self._nats.wait_connected()
                await self._attach()
                return
            except LogGap as gap:
                self._error = gap
                return
            except LogUnavailable as error:
                if self._nats.closed or (isinstance(error, JetStreamRefused) and error.final):
                    self._error = error
                    return
                _log.debug("consumer not made, trying again: %s", error)
                if isinstance(error, JetStreamRefused) and error.error.err_code == STREAM_NOT_FOUND:
                    await self._restore()
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    async def _restore(self) -> None:
        try:
            await self._stream.ensure()
        except LogUnavailable as error:
            _log.warning("stream lost and not made again: %s", error)

    async def _attach(self) -> None:
        """Have a consumer from `_next_seq` on. Raises LogUnavailable, LogGap."""
        await self._detach()
        self._lost.clear()
        self._verified.clear()
        self._consumer_seq = 0
        inbox = self._nats.client.new_inbox()
        self._subscription = await self._nats.subscribe(inbox, self._on_message)
        consumer = await self._nats.api(
            f"CONSUMER.CREATE.{self._stream.name}",
            {"stream_name": self._stream.name, "config": self._config(inbox)},
            _ConsumerInfo,
        )
        # Checked after the consumer exists, and before any record is handled: a stream that is made
        # anew in between cannot slip in.
        await self._check_same_log()
        self._verified.set()
        if consumer.num_pending == 0:
            self._caught_up()

    async def _detach(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await self._nats.unsubscribe(subscription)

    def _config(self, inbox: str) -> dict[str, object]:
        return {
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._next_seq,
            "ack_policy": "none",
            "max_deliver": 1,
            "flow_control": True,
            "idle_heartbeat": HEARTBEAT_S * _NS,
            "inactive_threshold": INACTIVE_S * _NS,
            "mem_storage": True,
            "num_replicas": 1,
        }

    async def _check_same_log(self) -> None:
        """Raises LogGap if the stream was made anew or has lost records that were in it.

        A new leader may need a moment until it knows all that the last one had.
        """
        for check in range(REWIND_CHECKS):
            if check:
                await asyncio.sleep(REWIND_CHECK_S)
            info = await self._stream.info()
            if self._created is None:
                self._created = info.created
            if info.created != self._created:
                raise LogGap(self._next_seq, max(1, info.state.first_seq))
            if info.state.last_seq + 1 >= self._next_seq:
                await self._check_last_handled()
                return
        raise LogGap(self._next_seq, info.state.last_seq + 1)

    async def _check_last_handled(self) -> None:
        """Raises LogGap if another record stands now where the last one handled was: a stream that
        lost its tail may have grown past that place again."""
        if self._last_handled is None:
            return
        seq, time_ns = self._last_handled
        stored = await self._stream.time_of(seq)
        if stored is not None and nanoseconds(stored) != time_ns:
            raise LogGap(seq + 1, seq)

    async def _on_message(self, message: NatsMessage) -> None:
        if not self._verified.is_set():
            await self._verified.wait()
        if not self.room.is_set():
            await self.room.wait()
        if self._lost.is_set():
            return  # of a consumer that is about to be replaced
        self._active = True
        if message.headers is not None and not message.data and "Status" in message.headers:
            await self._on_status(message.reply, message.headers)
            return
        seq, consumer_seq, time_ns, pending = parse_ack_subject(message.reply)
        if consumer_seq != self._consumer_seq + 1:
            self._lost.set()
            return
        self._consumer_seq = consumer_seq
        if seq >= self._next_seq:
            self._next_seq = seq + 1
            self._last_handled = seq, time_ns
            try:
                self._handle(Record(seq, time_ns, message.subject, message.data))
            except Exception as error:  # whatever it is, `wait` raises it
                self._error = error
                self._lost.set()
                return
        if pending == 0:
            self._caught_up()
        if time.monotonic() >= self._slice_end:
            if self._subscription is not None and self._subscription.pending_msgs:
                await asyncio.sleep(0)
            self._slice_end = time.monotonic() + SLICE_S

    async def _on_status(self, reply: str, headers: dict[str, str]) -> None:
        """Flow control wants an answer; a heartbeat says what should have come up to now."""
        if headers["Status"] != "100":
            self._lost.set()
            return
        answer_to = reply or headers.get("Nats-Consumer-Stalled")
        if answer_to:
            try:
                await self._nats.publish(answer_to, b"")
            except LogUnavailable:
                self._lost.set()
        elif headers.get("Nats-Last-Consumer") != str(self._consumer_seq):
            self._lost.set()
        else:
            self._caught_up()
