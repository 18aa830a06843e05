"""Where a prefill worker hands computed prompts over to decode workers, and how they ask for one.

Both get a request with the same `Bootstrap` at about the same time. The decode worker connects to
the prefill worker's `BootstrapServer` and names the room; the answer comes when that room's prompt
is computed, or is known not to come. Whoever comes first is waited for: an early question for the
prompt, an early prompt for the question, both at most `wait_s`.
"""

import asyncio
import logging
import socket
from collections import OrderedDict
from typing import Any, cast

import msgspec

from workers.errors import FrameTooLarge, PrefillFailed
from workers.frames import LENGTH_BYTES, FrameReader
from workers.protocol import (
    AskForRoom,
    Bootstrap,
    RoomAnswer,
    decode_ask_for_room,
    decode_room_answer,
    frame,
)
from workers.sockets import format_address, tune

WAIT_S = 300.0
"""As long as SGLang's decode workers wait for a bootstrap by default."""
ROOMS_MAX = 4096
"""Prompts that nobody has asked for yet; beyond, the oldest is forgotten. And connections that wait
for a prompt; beyond, a further one is refused."""
FRAME_BYTES_MAX = 4096
"""A question is a number, an answer a few."""

_logger = logging.getLogger(__name__)


class _Asker(asyncio.Protocol):
    """A decode worker's connection: one question, one answer."""

    def __init__(self, server: "BootstrapServer") -> None:
        self._server = server
        self._frames = FrameReader(FRAME_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.room: int | None = None
        """What it waits for."""

    def answer(self, answer: RoomAnswer) -> None:
        """Send it and close."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(answer))
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are asyncio's by duck typing only.
        self._transport = cast(asyncio.Transport, transport)
        tune(self._transport)
        wait_s = self._server.wait_s
        late = RoomAnswer(None, f"it was not computed within {wait_s:g} s")
        self._deadline = asyncio.get_running_loop().call_later(wait_s, self.answer, late)
        if not self._server.admit(self):
            self.answer(RoomAnswer(None, f"{ROOMS_MAX} others wait here already"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._deadline is not None:
            self._deadline.cancel()
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                question = decode_ask_for_room.decode(body)
                if self.room is None:  # it asks once
                    self.room = question.room
                    self._server.asked(self, question.room)
        except (FrameTooLarge, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _logger.warning("bootstrap connection closed why=%s", error)
            self.abort()


class BootstrapServer:
    """A prefill worker's end. All but `start` and `close` are plain calls on the event loop."""

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self.wait_s = wait_s
        self._server: asyncio.Server | None = None
        self._askers: dict[_Asker, None] = {}  # ordered, unlike a set
        self._waiting: dict[int, _Asker] = {}
        """By the room that they have asked for."""
        self._done: OrderedDict[int, tuple[float, RoomAnswer]] = OrderedDict()
        """By room: since when the answer waits for the question, the oldest first."""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_waiting(self) -> int:
        """Decode workers' questions that have no answer yet."""
        return len(self._waiting)

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port (of use where 0 asked for a free one). Raises OSError."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Asker(self), host, port, family=socket.AF_UNSPEC
        )
        return int(self._server.sockets[0].getsockname()[1])

    def hand_over(self, room: int, disaggregated_params: dict[str, Any]) -> None:
        """The prompt of `room` is computed."""
        self._settle(room, RoomAnswer(disaggregated_params))

    def fail(self, room: int, why: str) -> None:
        """The prompt of `room` will not be computed."""
        self._settle(room, RoomAnswer(None, why))

    async def close(self) -> None:
        """Stop listening and close all connections. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        for asker in list(self._askers):
            asker.abort()
        await self._empty.wait()
        await self._server.wait_closed()
        self._server = None

    def _settle(self, room: int, answer: RoomAnswer) -> None:
        asker = self._waiting.pop(room, None)
        if asker is not None:
            asker.answer(answer)
            return
        now_s = self._forget_old()
        self._done.pop(room, None)
        self._done[room] = now_s, answer
        if len(self._done) > ROOMS_MAX:
            self._done.popitem(last=False)

    def _forget_old(self) -> float:
        """Forget the answers that nobody asked for in time; the time now."""
        now_s = asyncio.get_running_loop().time()
        while self._done and next(iter(self._done.values()))[0] + self.wait_s <= now_s:
            self._done.popitem(last=False)
        return now_s

    # --- called by the connections ------------------------------------------------------------

    def admit(self, asker: _Asker) -> bool:
        """Count a new connection in; False if there are too many (it must close itself)."""
        admitted = len(self._askers) < ROOMS_MAX
        self._askers[asker] = None
        self._empty.clear()
        return admitted

    def asked(self, asker: _Asker, room: int) -> None:
        """Answer now, or when `room` is settled."""
        self._forget_old()
        done = self._done.pop(room, None)
        if done is not None:
            asker.answer(done[1])
        elif room in self._waiting:
            asker.answer(RoomAnswer(None, "another worker has asked for it"))
        else:
            self._waiting[room] = asker

    def forget(self, asker: _Asker) -> None:
        if asker.room is not None and self._waiting.get(asker.room) is asker:
            del self._waiting[asker.room]
        del self._askers[asker]
        if not self._askers:
            self._empty.set()


async def fetch(bootstrap: Bootstrap, wait_s: float = WAIT_S) -> dict[str, Any]:
    """A decode worker's end: wait until the prompt of the room is computed; its
    `disaggregated_params`. Raises PrefillFailed, at the latest after `wait_s`.
    """
    room, at = bootstrap.room, format_address(bootstrap.host, bootstrap.port)
    try:
        async with asyncio.timeout(wait_s):
            answer = await _ask(bootstrap)
    except TimeoutError:
        raise PrefillFailed(room, f"no answer from {at} within {wait_s:g} s") from None
    except (OSError, ValueError, EOFError, FrameTooLarge) as error:
        raise PrefillFailed(room, f"{at}: {error}") from error
    if answer.disaggregated_params is None:
        raise PrefillFailed(room, answer.error)
    return answer.disaggregated_params


async def _ask(bootstrap: Bootstrap) -> RoomAnswer:
    reader, writer = await asyncio.open_connection(bootstrap.host, bootstrap.port)
    try:
        writer.write(frame(AskForRoom(bootstrap.room)))
        size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        if size > FRAME_BYTES_MAX:
            raise FrameTooLarge(size, FRAME_BYTES_MAX)
        return decode_room_answer.decode(await reader.readexactly(size))
    finally:
        writer.close()
