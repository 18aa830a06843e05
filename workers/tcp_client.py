"""The frontend's end of the request plane over TCP: one connection per worker.

The way of a token is short: the event loop reads a socket, one frame is decoded, and each output in
it is handed to its stream's `sink`, a plain call. Nothing is queued here and no task is woken; what
to buffer, and whom to wake, is the caller's choice.

While a worker is listed its client keeps trying to connect, with jittered, bounded pauses.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import cast

import msgspec

from workers.errors import (
    CannotConnect,
    FrameTooLarge,
    WorkerBacklogged,
    WorkerLost,
)
from workers.frames import LENGTH_BYTES, FrameReader
from workers.protocol import (
    FRAME_BYTES_MAX,
    Announce,
    Audit,
    Cancel,
    EngineRequest,
    Generate,
    Output,
    Pin,
    Refused,
    Running,
    ToWorker,
    decode_to_frontend,
    frame,
)
from workers.sockets import parse_address, tune

CONNECT_TIMEOUT_S = 3.0
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
WRITE_BUFFER_BYTES_MAX = 16 * 1024 * 1024
"""Over this many bytes waiting for one worker, new requests to it are refused."""

_logger = logging.getLogger(__name__)

Sink = Callable[[Output], None]
Lost = Callable[[WorkerLost], None]
Changed = Callable[[int], None]


class StreamHandle:
    """One open request. Ends with its last output, with `lost`, or with `cancel`."""

    __slots__ = ("_connection", "lost", "number", "sink")

    def __init__(self, connection: "_Connection", number: int, sink: Sink, lost: Lost) -> None:
        self._connection = connection
        self.number = number
        self.sink = sink
        self.lost = lost

    def cancel(self) -> None:
        """Tell the worker to stop; neither `sink` nor `lost` is called again.

        Safe to call twice, and after the stream has ended.
        """
        self._connection.cancel(self.number)


class _Connection(asyncio.Protocol):
    """One established connection, with the streams open on it."""

    def __init__(self, client: "WorkerClient") -> None:
        self._client = client
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, StreamHandle] = {}
        self._next_number = 0
        self._audited: int | None = None
        """While an audit is under way: the first number that it does not concern."""
        self._broken: str | None = None
        self.gone = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def open(self, request: EngineRequest, sink: Sink, lost: Lost) -> StreamHandle:
        assert self._transport is not None
        waiting_bytes = self._transport.get_write_buffer_size()
        if waiting_bytes > WRITE_BUFFER_BYTES_MAX:
            raise WorkerBacklogged(self._client.worker_id, waiting_bytes)
        number = self._next_number
        self._next_number += 1
        message = frame(Generate(number, request))
        if len(message) - LENGTH_BYTES > FRAME_BYTES_MAX:
            raise FrameTooLarge(len(message) - LENGTH_BYTES, FRAME_BYTES_MAX)
        self._transport.write(message)
        stream = self._streams[number] = StreamHandle(self, number, sink, lost)
        return stream

    def cancel(self, number: int) -> None:
        if self._streams.pop(number, None) is None:
            return
        self._write(Cancel(number))
        self._client.stream_ended()

    def audit(self) -> None:
        """Ask which streams the worker runs. Nothing while an answer is awaited."""
        if self._audited is None:
            self._audited = self._next_number
            self._write(Audit())

    def tell(self, message: Announce | Refused) -> None:
        self._write(message)

    def pin(self, message: Pin) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = frame(message)
        unsent_bytes = self._transport.get_write_buffer_size()
        if unsent_bytes <= WRITE_BUFFER_BYTES_MAX and len(data) <= FRAME_BYTES_MAX + LENGTH_BYTES:
            self._transport.write(data)

    def _compare(self, message: Running) -> None:
        # Frames keep their order, so what was opened before the question and has not ended before
        # the answer must be in it.
        opened_before, self._audited = self._audited or 0, None
        running = set(message.streams)
        for number in [n for n in self._streams if n < opened_before and n not in running]:
            stream = self._streams.pop(number)
            stream.lost(WorkerLost(self._client.worker_id, "the worker does not run the request"))
            self._client.stream_ended()
        for number in running - self._streams.keys():
            self._write(Cancel(number))

    def end(self, cause: str) -> None:
        """Close now; every open stream is lost."""
        if self._broken is None:
            self._broken = cause
        if self._transport is not None:
            self._transport.abort()
        self._lose_streams(cause)

    def _write(self, message: ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def _lose_streams(self, cause: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.lost(WorkerLost(self._client.worker_id, cause))

    # --- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are asyncio's by duck typing only.
        self._transport = cast(asyncio.Transport, transport)
        tune(self._transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                message = decode_to_frontend.decode(body)
                if isinstance(message, Running):
                    self._compare(message)
                    continue
                for output in message.items:
                    # Looked up each time: a sink may cancel any stream, or end the connection.
                    stream = self._streams.get(output.stream)
                    if stream is None:  # cancelled a moment ago
                        continue
                    if output.finish_reason is not None or output.error is not None:
                        del self._streams[output.stream]
                        stream.sink(output)
                        self._client.stream_ended()
                    else:
                        stream.sink(output)
        except FrameTooLarge as error:
            self._break(str(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._break(f"a frame cannot be read: {error}")

    def _break(self, why: str) -> None:
        worker_id, address = self._client.worker_id, self._client.address
        _logger.warning(
            "worker connection closed worker=%016x at=%s why=%s", worker_id, address, why
        )
        self.end(why)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        cause = self._broken or (
            str(exc) if exc is not None else "the worker closed the connection"
        )
        self.gone.set()
        self._client.connection_ended(self, cause)
        self._lose_streams(cause)


class WorkerClient:
    """One worker's client. Everything but `ready` and `wait_closed` is synchronous."""

    def __init__(
        self,
        worker_id: int,
        address: str,
        rng: random.Random,
        *,
        on_connected: Changed = lambda worker_id: None,
        on_disconnected: Changed = lambda worker_id: None,
    ) -> None:
        """rng: for the jitter of the pauses between attempts. on_connected, on_disconnected: called
        with `worker_id`; they must not raise. Raises ValueError on `address`."""
        self.worker_id = worker_id
        self.address = address
        self._host, self._port = parse_address(address)
        self._rng = rng
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._connection: _Connection | None = None
        self._connected = asyncio.Event()
        self._failure = "not tried yet"
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self._closed = False

    @property
    def is_connected(self) -> bool:
        """Whether `generate` would be sent now."""
        connection = self._connection
        return connection is not None and connection.is_open and not self._draining

    @property
    def stream_count(self) -> int:
        return 0 if self._connection is None else self._connection.stream_count

    def start(self) -> asyncio.Task[None]:
        """Begin to connect, and to reconnect until `close`. The task ends when all is released."""
        assert self._task is None and not self._closed
        self._task = asyncio.create_task(
            self._stay_connected(), name=f"connect {self.worker_id:016x}"
        )
        return self._task

    async def ready(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Return once connected. Raises CannotConnect after `timeout_s`, with the last cause."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_connected:
                    if self._closed or self._draining:
                        raise self._cannot_connect()
                    self._connected.clear()
                    await self._connected.wait()
        except TimeoutError:
            raise self._cannot_connect() from None

    def generate(self, request: EngineRequest, sink: Sink, lost: Lost) -> StreamHandle:
        """Send `request`; from here on `sink` gets every output, up to the one that ends it.

        sink, lost: called on the event loop, never before this returns; they must not raise.
        `lost` is called at most once, instead of a last output, when the connection ends. Raises
        CannotConnect, WorkerBacklogged or FrameTooLarge, and then neither is ever called.
        """
        connection = self._connection
        if connection is None or not self.is_connected:
            raise self._cannot_connect()
        return connection.open(request, sink, lost)

    def audit(self) -> None:
        """Compare the open streams with what the worker runs: those that it does not know are lost,
        those that are known only to it are cancelled. Nothing while not connected."""
        if self._connection is not None and self.is_connected:
            self._connection.audit()

    def ask_to_announce(self, dp_rank: int | None, epoch: int) -> None:
        """Send `Announce`. Nothing while not connected."""
        if self._connection is not None and self.is_connected:
            self._connection.tell(Announce(self.worker_id, dp_rank, epoch))

    def refuse(self, frontend_id: int, why: str) -> None:
        """Send `Refused`. Nothing while not connected."""
        if self._connection is not None and self.is_connected:
            self._connection.tell(Refused(self.worker_id, frontend_id, why))

    def pin(self, dp_rank: int, token_ids: list[int], ttl_s: int) -> None:
        """Send `Pin`. Nothing while not connected, or if `generate` would refuse that prompt."""
        if self._connection is not None and self.is_connected:
            self._connection.pin(Pin(dp_rank, token_ids, ttl_s))

    def drain(self) -> None:
        """Take no new request, and close when the open streams have ended."""
        self._draining = True
        self._connected.set()  # wakes `ready`, which then refuses
        if self.stream_count == 0:
            self.close("drained")

    def close(self, cause: str = "closed here") -> None:
        """Disconnect and stay so; open streams are lost at once. Safe to call twice."""
        self._closed = True
        self._failure = cause
        self._connected.set()
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.end(cause)

    async def wait_closed(self) -> None:
        """Return once `close` has released everything."""
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._connection is not None:
            await self._connection.gone.wait()

    # --- called by the connection -------------------------------------------------------------

    def connection_ended(self, connection: _Connection, cause: str) -> None:
        if self._connection is connection:
            self._connection = None
            self._failure = cause
            self._on_disconnected(self.worker_id)

    def stream_ended(self) -> None:
        if self._draining and self.stream_count == 0:
            self.close("drained")

    # --- connecting ---------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        """Connect, wait for the end, pause, and again: until cancelled.

        The pause doubles with each attempt that did not hold, from BACKOFF_FIRST_S to
        BACKOFF_MAX_S, and is cut by up to half at random so that frontends do not come in step.
        """
        loop = asyncio.get_running_loop()
        pause_s = BACKOFF_FIRST_S
        while not self._draining:
            started_s = loop.time()
            try:
                await self._hold_connection(loop)
            except (OSError, TimeoutError) as error:
                self._failure = str(error) or f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
                _logger.debug("cannot connect worker=%016x why=%s", self.worker_id, self._failure)
            if loop.time() - started_s > CONNECT_TIMEOUT_S + BACKOFF_MAX_S:
                pause_s = BACKOFF_FIRST_S  # it held for a while: not a failing worker
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def _hold_connection(self, loop: asyncio.AbstractEventLoop) -> None:
        connection = _Connection(self)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: connection, self._host, self._port)
        self._connection = connection
        self._connected.set()
        self._on_connected(self.worker_id)
        _logger.debug("connected worker=%016x at=%s", self.worker_id, self.address)
        await connection.gone.wait()

    def _cannot_connect(self) -> CannotConnect:
        cause = "it is shutting down" if self._draining else self._failure
        return CannotConnect(self.worker_id, self.address, cause)
