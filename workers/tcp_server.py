"""The worker's end of the request plane over TCP.

Many streams share a connection. What the engine is told (`Handler`) and what it answers
(`Connection.send`) are plain calls on the event loop; this module only moves and bounds the bytes.

A connection is closed, and its streams cancelled, when the frontend breaks the protocol (a frame
that is too large or cannot be read, a stream number that does not count upwards) or does not read:
over WRITE_BUFFER_BYTES_MAX of unsent output, keeping it connected would only grow memory.
"""

import asyncio
import itertools
import logging
import socket
from typing import Protocol, cast

import msgspec

from workers.errors import BrokenProtocol, FrameTooLarge
from workers.frames import FrameReader
from workers.protocol import (
    Announce,
    Audit,
    Cancel,
    EngineRequest,
    Generate,
    Output,
    Outputs,
    Pin,
    Refused,
    Running,
    ToFrontend,
    decode_to_worker,
    frame,
)
from workers.sockets import tune

WRITE_BUFFER_BYTES_MAX = 16 * 1024 * 1024
CONNECTIONS_MAX = 1024
"""A frontend needs one; further ones are closed at once."""
FLUSH_S = 1.0
"""How long `WorkerServer.close` waits for the last bytes to leave."""

_logger = logging.getLogger(__name__)


class Handler(Protocol):
    """Who gets the requests. Called on the event loop; what it raises closes the connection."""

    def on_generate(self, connection: "Connection", stream: int, request: EngineRequest) -> None:
        """A new stream. Every stream ends with an output that says so, or with one of the below."""

    def on_cancel(self, connection: "Connection", stream: int) -> None:
        """An open stream is no longer wanted; what is sent on it from here on is dropped."""

    def on_disconnect(self, connection: "Connection", streams: frozenset[int]) -> None:
        """The connection is gone, and with it the `streams` that were still open."""

    def on_announce(self, message: Announce) -> None:
        """The log lacks something that this worker can tell."""

    def on_pin(self, message: Pin) -> None:
        """What is cached of a prompt is worth keeping."""

    def on_refused(self, message: Refused) -> None:
        """A frontend sends no requests here."""

    def running(self, connection: "Connection") -> list[int]:
        """The connection's streams that are worked on or wait."""


class Connection(asyncio.Protocol):
    """One frontend's connection, with its open streams. `number`: no other one's of this server."""

    def __init__(self, server: "WorkerServer", handler: Handler, number: int) -> None:
        self.number = number
        self._server = server
        self._handler = handler
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._streams: set[int] = set()
        self._last_stream = -1
        self.peer = "?"

    def __repr__(self) -> str:
        return f"Connection(peer={self.peer}, streams={len(self._streams)})"

    @property
    def streams(self) -> frozenset[int]:
        """The open streams."""
        return frozenset(self._streams)

    def send(self, outputs: list[Output]) -> None:
        """Send what a step produced for this connection, as one frame. Never blocks or raises.

        Outputs of streams that are not open (cancelled meanwhile) are dropped. O(outputs).
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        streams = self._streams
        items = [output for output in outputs if output.stream in streams]
        if not items:
            return
        for output in items:
            if output.finish_reason is not None or output.error is not None:
                streams.discard(output.stream)
        self._write(Outputs(items))

    def _write(self, message: ToFrontend) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(frame(message))
        waiting_bytes = transport.get_write_buffer_size()
        if waiting_bytes > WRITE_BUFFER_BYTES_MAX:
            self._abort(f"does not read: {waiting_bytes} bytes wait for it")

    def close(self) -> None:
        """Close once what was sent has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now; unsent output is lost."""
        if self._transport is not None:
            self._transport.abort()

    def _abort(self, why: str) -> None:
        _logger.warning("frontend connection closed peer=%s why=%s", self.peer, why)
        self.abort()

    # --- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are asyncio's by duck typing only.
        self._transport = cast(asyncio.Transport, transport)
        self.peer = str(transport.get_extra_info("peername"))
        tune(self._transport)
        if not self._server.admit(self):
            self._abort(f"there are {CONNECTIONS_MAX} connections already")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.forget(self)
        streams, self._streams = frozenset(self._streams), set()
        self._handler.on_disconnect(self, streams)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                message = decode_to_worker.decode(body)
                match message:
                    case Generate():
                        self._open(message.stream)
                        self._handler.on_generate(self, message.stream, message.request)
                    case Cancel():
                        self._cancel(message)
                    case Announce():
                        self._handler.on_announce(message)
                    case Pin():
                        self._handler.on_pin(message)
                    case Refused():
                        self._handler.on_refused(message)
                    case Audit():
                        self._write(Running(self._handler.running(self)))
        except (FrameTooLarge, BrokenProtocol) as error:
            self._abort(str(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._abort(f"a frame cannot be read: {error}")

    def _open(self, stream: int) -> None:
        # Counting upwards is how "never used twice" is kept without remembering every number.
        if stream <= self._last_stream:
            raise BrokenProtocol(f"stream {stream} came after stream {self._last_stream}")
        self._last_stream = stream
        self._streams.add(stream)

    def _cancel(self, message: Cancel) -> None:
        # A cancel may cross the stream's last output on the wire, and is nothing then.
        if message.stream in self._streams:
            self._streams.discard(message.stream)
            self._handler.on_cancel(self, message.stream)


class WorkerServer:
    """Listens for frontends and hands their requests to `handler`."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._numbers = itertools.count(1)
        self._connections: dict[Connection, None] = {}  # ordered, unlike a set
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port (of use where 0 asked for a free one). Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self, self._handler, next(self._numbers)),
            host,
            port,
            family=socket.AF_UNSPEC,
        )
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> frozenset[Connection]:
        return frozenset(self._connections)

    async def close(self) -> None:
        """Stop listening and close all connections, open streams included. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.close()
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._empty.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
        await self._empty.wait()
        await self._server.wait_closed()
        self._server = None

    # --- called by the connections ------------------------------------------------------------

    def admit(self, connection: Connection) -> bool:
        """Count a new connection in; False if there are too many (it must close itself)."""
        admitted = len(self._connections) < CONNECTIONS_MAX
        self._connections[connection] = None
        self._empty.clear()
        return admitted

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        if not self._connections:
            self._empty.set()
