"""Rooms: whoever comes first is waited for, within bounds; nonsense is cut off."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.waiting import eventually
from workers import bootstrap as module
from workers.bootstrap import BootstrapServer, fetch
from workers.errors import PrefillFailed
from workers.protocol import AskForRoom, Bootstrap, RoomAnswer, frame


@asynccontextmanager
async def listening(wait_s: float = 5.0) -> AsyncIterator[tuple[BootstrapServer, int]]:
    server = BootstrapServer(wait_s)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.close()
        await server.close()


@asynccontextmanager
async def asking(port: int, data: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that has sent `data`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


async def ask(port: int, room: int) -> dict[str, object]:
    return await fetch(Bootstrap("127.0.0.1", port, room), 5.0)


async def test_each_gets_its_own_room_once() -> None:
    async with listening() as (server, port):
        early = asyncio.create_task(ask(port, 1))
        await eventually(lambda: server.num_waiting == 1)
        server.hand_over(2, {"room": 2})
        assert await ask(port, 2) == {"room": 2}
        server.hand_over(1, {"room": 1})
        assert await early == {"room": 1}
        again = asyncio.create_task(ask(port, 1))
        await eventually(lambda: server.num_waiting == 1)
        server.fail(1, "no more")
        with pytest.raises(PrefillFailed, match="no more"):
            await again


async def test_a_room_has_one_asker() -> None:
    async with listening() as (server, port):
        first = asyncio.create_task(ask(port, 1))
        await eventually(lambda: server.num_waiting == 1)
        with pytest.raises(PrefillFailed, match="another worker"):
            await ask(port, 1)
        server.hand_over(1, {})
        assert await first == {}


async def test_what_nobody_asked_for_is_forgotten_the_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROOMS_MAX", 3)
    async with listening(wait_s=0.2) as (server, port):
        for room in range(5):
            server.hand_over(room, {"room": room})
        assert [await ask(port, room) for room in (2, 3, 4)] == [{"room": n} for n in (2, 3, 4)]
        with pytest.raises(PrefillFailed, match=r"within 0\.2 s"):
            await ask(port, 1)


async def test_too_many_askers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOMS_MAX", 2)
    async with listening() as (server, port):
        waiting = [asyncio.create_task(ask(port, room)) for room in range(2)]
        await eventually(lambda: server.num_waiting == 2)
        with pytest.raises(PrefillFailed, match="others wait"):
            await ask(port, 2)
        for room in range(2):
            server.hand_over(room, {})
        assert await asyncio.gather(*waiting) == [{}, {}]


@pytest.mark.parametrize("junk", [b"\xff" * 8, b"\0\0\0\x02\xc1\xc1", frame(RoomAnswer({}))])
async def test_what_is_no_question_is_cut_off(junk: bytes) -> None:
    async with listening() as (server, port):
        async with asking(port, junk) as reader:
            assert await cut_off(reader)
        server.hand_over(1, {})
        assert await ask(port, 1) == {}


async def test_one_question_a_connection() -> None:
    async with listening() as (server, port):
        async with asking(port, frame(AskForRoom(1)) + frame(AskForRoom(2))) as reader:
            await eventually(lambda: server.num_waiting == 1)
            server.hand_over(1, {})
            assert await reader.read() == frame(RoomAnswer({}))


@pytest.mark.parametrize("answer", [b"", b"\0", b"\0\0\0\x02\xc1\xc1", b"\xff" * 8])
async def test_what_is_no_answer_is_a_failed_prefill(answer: bytes) -> None:
    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    try:
        with pytest.raises(PrefillFailed):
            await ask(server.sockets[0].getsockname()[1], 1)
    finally:
        server.close()
        await server.wait_closed()


async def cut_off(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True
