"""`python -m eventstore.relay`: a process that follows a log for another process.

What it takes off the other's event loop is the client library's work: sockets, the protocol,
acknowledgement subjects, flow control, consumers made anew. It passes on what `follow` delivers, in
order and unread, as frames (`eventstore.frames`) on its standard output. The order to begin comes
as a frame on its standard input, because it may hold a password. The end of the input ends the
process, so it does not outlive its owner. The other end is `eventstore.relayed`.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from typing import cast

import uvloop

from eventstore import frames
from eventstore.connect import Nats
from eventstore.consumer import OrderedConsumer
from eventstore.errors import EventStoreError, LogGap, LogUnavailable
from eventstore.frames import LENGTH_BYTES, Frame, Gap, Line, Order, Records, Started, Unavailable
from eventstore.jetstream import JetStreamLog
from eventstore.log import Record

FRAME_BYTES = 64 * 1024
"""A frame is closed when its records' data reach this; a record more may be in it."""
WRITE_BYTES_MAX = 256 * 1024
"""What may wait for the owner to read it. Beyond, nothing is handled, and the server soon stops."""


class FrameWriter(asyncio.Protocol):
    """Records into frames, for an owner who may be slow to read them."""

    def __init__(self, on_lost: Callable[[], object]) -> None:
        self._consumer: OrderedConsumer | None = None
        self._full = False
        self._on_lost = on_lost
        self._transport: asyncio.WriteTransport | None = None
        self._records: list[Record] = []
        self._bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_MAX)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def pause_writing(self) -> None:
        self._full = True
        if self._consumer is not None:
            self._consumer.room.clear()

    def resume_writing(self) -> None:
        self._full = False
        if self._consumer is not None:
            self._consumer.room.set()

    def hold_back(self, consumer: OrderedConsumer) -> None:
        """From now on the consumer has room only while the owner reads."""
        self._consumer = consumer
        if self._full:
            consumer.room.clear()

    def add(self, record: Record) -> None:
        """Send it with those that come in the same turn of the event loop."""
        if not self._records:
            asyncio.get_running_loop().call_soon(self.flush)
        self._records.append(record)
        self._bytes += len(record.data)
        if self._bytes >= FRAME_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._records:
            records, self._records, self._bytes = self._records, [], 0
            self._write(Records(records))

    def send(self, frame: Frame) -> None:
        """Send it behind all records so far."""
        self.flush()
        self._write(frame)

    def _write(self, frame: Frame) -> None:
        if self._transport is not None:
            self._transport.write(frames.encode(frame))


class _Lines(logging.Handler):
    """Log lines to the owner, who has the format and the place for them."""

    def __init__(self, writer: FrameWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.send(Line(record.levelno, record.name, self.format(record)))


async def relay(order: Order, writer: FrameWriter) -> None:
    """Follow until cancelled, or until something ends the following, which is told."""
    try:
        nats = await Nats.connect(order.addresses, name="reckon events", access=order.access)
        try:
            log = await JetStreamLog.open(
                nats, order.namespace, replicas=order.replicas, create=False
            )
            consumer = await log.follow(order.start_seq, writer.add)
            writer.hold_back(consumer)
            writer.send(Started())
            await consumer.wait()
        finally:
            await nats.close()
    except LogGap as gap:
        writer.send(Gap(gap.expected, gap.got))
    except LogUnavailable as error:
        writer.send(Unavailable(error.what, error.try_this))
    except EventStoreError as error:
        writer.send(Unavailable(str(error), ""))


async def _run() -> None:
    loop = asyncio.get_running_loop()
    owner = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(owner), sys.stdin.buffer)
    try:
        length = frames.length(await owner.readexactly(LENGTH_BYTES))
        order = frames.decode_order(await owner.readexactly(length))
    except asyncio.IncompleteReadError:
        return  # the owner has changed its mind
    # Whatever a library prints must not get between the frames.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    over = asyncio.Event()
    transport, writer = await loop.connect_write_pipe(lambda: FrameWriter(over.set), output)
    logging.basicConfig(handlers=[_Lines(writer)], level=order.level)
    relaying = asyncio.create_task(relay(order, writer), name="relay")
    told = asyncio.create_task(over.wait(), name="owner stops reading")
    gone = asyncio.create_task(owner.read(), name="owner is gone")
    tasks = (relaying, told, gone)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    transport.close()  # what was written is sent before
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await over.wait()
    if not relaying.cancelled():
        relaying.result()


def main() -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
