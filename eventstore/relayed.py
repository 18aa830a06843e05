"""A log followed by a process of its own: the side that gets the records.

    nats-server ──▶ process `eventstore.relay` ──frames, by a pipe──▶ `RelayedFollowing` ──▶ handle

It is a `Following` like the one on the event loop: the same records in the same order, the same
errors out of `wait`. Of the loop it needs one wake-up for all records that came together, and their
handling, in slices, for which a record may be handled in steps.

What waits here is bounded by WAITING_BYTES_MAX and a read more; beyond, the pipe is not read. Then
the other process has nowhere to write, stops handling, and the server stops sending.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, cast, runtime_checkable

from eventstore import frames
from eventstore.errors import LogGap, LogUnavailable
from eventstore.frames import LENGTH_BYTES, Frame, Gap, Line, Order, Records, Started, Unavailable
from eventstore.log import Following, Record
from eventstore.tasks import end

SLICE_S = 0.0005
"""How long records are handled before others on the event loop get their turn."""
WAITING_BYTES_MAX = 512 * 1024
START_TIMEOUT_S = 30.0
"""Until a process that was started follows the log, which takes some 0.3 s."""
END_S = 1.0
"""How long the process may take to end by itself."""

Handle: TypeAlias = Callable[[Record], Iterator[object]]
"""Returns the steps of handling a record. It is complete when they have all been taken, and they
are, whatever happens, before the next record."""

_log = logging.getLogger(__name__)


class RelayFailed(LogUnavailable):
    """There is no process that follows, and it is not the log's fault."""


@runtime_checkable
class FollowsApart(Protocol):
    """A log that can be followed by a process of its own."""

    async def follow_apart(self, start_seq: int, handle: Handle) -> "RelayedFollowing":
        """As `EventLog.follow`, with the receiving in another process, and records handled in
        steps. Raises RelayFailed too."""


class FrameReader(asyncio.SubprocessProtocol):
    """The frames that a process writes, as they come; it is kept from writing too many."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        """The process has ended. What it wrote may still come."""
        self.ended = asyncio.Event()
        """All that it wrote is here."""
        self._received = bytearray()
        self._in_hand = 0
        self._arrived = asyncio.Event()
        self._transport: asyncio.SubprocessTransport | None = None
        self._paused = False

    @property
    def waiting_bytes(self) -> int:
        """Received, and not yet handled."""
        return len(self._received) + self._in_hand

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._received += data
        self._arrived.set()
        if not self._paused and self.waiting_bytes > WAITING_BYTES_MAX:
            self._pipe().pause_reading()
            self._paused = True

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self._arrived.set()

    async def next(self) -> Frame | None:
        """The next frame; None after the last one. Asking for it says that the last is handled."""
        self._in_hand = 0
        while True:
            received = self._received
            begin = LENGTH_BYTES
            stop = begin + frames.length(received[:begin])
            if begin < stop <= len(received):
                break
            if self.ended.is_set():
                return None
            self._resume(at_once=True)
            self._arrived.clear()
            await self._arrived.wait()
        with memoryview(received) as view:
            frame = frames.decode(view[begin:stop])
        del received[:stop]
        self._in_hand = stop
        self._resume()
        return frame

    def _resume(self, at_once: bool = False) -> None:
        # With at_once for a frame that is larger than what may wait: it has to arrive.
        if self._paused and (at_once or self.waiting_bytes <= WAITING_BYTES_MAX // 2):
            self._paused = False
            if not self.ended.is_set():
                self._pipe().resume_reading()

    def _pipe(self) -> asyncio.ReadTransport:
        assert self._transport is not None
        return cast(asyncio.ReadTransport, self._transport.get_pipe_transport(1))


class RelayedFollowing(Following):
    """A `Following` whose records come from a process of its own. `start` sets it going."""

    def __init__(self, order: Order, handle: Handle) -> None:
        self._order = order
        self._handle = handle
        self._reader = FrameReader()
        self._process: asyncio.SubprocessTransport | None = None
        self._started = asyncio.Event()
        self._error: Exception | None = None
        self._ended = asyncio.Event()
        self._slice_end = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        running = self._process is not None and not self._reader.exited.is_set()
        return self._process.get_pid() if self._process is not None and running else None

    @property
    def waiting_bytes(self) -> int:
        """Received from the process, and not yet handled."""
        return self._reader.waiting_bytes

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def start(self) -> None:
        """Returns when records begin to come. Raises LogGap, LogUnavailable, RelayFailed."""
        try:
            # A session of its own: a Ctrl-C at the terminal is for the owner, who ends in order.
            self._process, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: self._reader,
                *(sys.executable, "-m", "eventstore.relay"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=None,
                start_new_session=True,
            )
        except OSError as error:
            raise RelayFailed(f"no process to follow the log could be started: {error}") from error
        try:
            self._write(frames.encode(self._order))
            self._task = asyncio.create_task(self._run(), name="relayed")
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._started.wait()
        except TimeoutError as error:
            await self.close()
            what = f"the process that follows the log did not within {START_TIMEOUT_S:g} s"
            raise RelayFailed(what) from error
        except BaseException:
            await self.close()
            raise
        if self._error is not None:
            await self.close()
            raise self._error

    async def wait(self) -> None:
        """Return after `close`; raise what ended the following otherwise."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Stop; nothing is handled any more, and the process ends. Safe to call twice."""
        if self._task is not None:
            await end(self._task)
        self._ended.set()
        await self._end_process()

    async def _run(self) -> None:
        try:
            await self._handle_frames()
        except Exception as error:  # whatever it is, `wait` raises it
            self._error = error
        finally:
            self._started.set()
            self._ended.set()

    async def _handle_frames(self) -> None:
        while (frame := await self._reader.next()) is not None:
            match frame:
                case Records(records):
                    for record in records:
                        await self._handle_record(record)
                case Started():
                    self._started.set()
                case Line(level, logger, text):
                    logging.getLogger(logger).log(level, "%s", text)
                case Gap(expected, got):
                    raise LogGap(expected, got)
                case Unavailable(what, try_this):
                    raise LogUnavailable(what, try_this)
        assert self._process is not None
        what = f"the process that follows the log ended: {self._process.get_returncode()}"
        raise LogUnavailable(what) if self._started.is_set() else RelayFailed(what)

    async def _handle_record(self, record: Record) -> None:
        await self._give_turn()
        steps = self._handle(record)
        try:
            for _ in steps:
                await self._give_turn()
        finally:
            deque(steps, maxlen=0)  # also when this is cancelled: no record is left half done

    async def _give_turn(self) -> None:
        """To others on the event loop, once a slice."""
        if time.monotonic() >= self._slice_end:
            await asyncio.sleep(0)
            self._slice_end = time.monotonic() + SLICE_S

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))
        stdin.write(data)

    async def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        if not self._reader.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(END_S):
                    await self._reader.exited.wait()
            except TimeoutError:
                _log.warning("the process that follows the log had to be killed")
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await self._reader.exited.wait()
        process.close()
