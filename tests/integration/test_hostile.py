"""Clients that mean no good, over raw sockets: each is bounded, and others are served meanwhile."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from frontend.service import Limits
from tests.integration.harness import MODEL, Harness, frontend
from tests.waiting import eventually

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
ANSWER_S = 10.0
IDLE = 400

QUICK = Limits(
    body_bytes_max=2**20,
    body_idle_s=0.2,
    head_s=0.2,
    head_bytes_max=32 * 1024,
    idle_s=0.3,
    linger_s=0.2,
)


class Raw:
    """A connection that sends what a test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers (lower case) and JSON of the next answer."""
        async with asyncio.timeout(ANSWER_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, json.loads(body)

    async def is_closed(self) -> bool:
        """Waits for the end; what comes before it is dropped."""
        async with asyncio.timeout(ANSWER_S):
            try:
                while await self.reader.read(2**16):
                    pass
            except ConnectionError:
                pass
        return True


@asynccontextmanager
async def raw(here: Harness) -> AsyncIterator[Raw]:
    host, port = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def served(limits: Limits = QUICK) -> AsyncIterator[Harness]:
    """A frontend with an echo; at the end a request is still answered, and nothing is left."""
    async with frontend(limits) as here:
        await here.add_worker(1, echo="ok")
        await here.until_served()
        yield here
        await assert_serves(here)
        await here.assert_nothing_left()


async def assert_serves(here: Harness) -> None:
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session, asyncio.timeout(ANSWER_S):
        async with session.post(here.url + CHAT, data=BODY, headers=headers) as response:
            assert response.status == 200


def post(body: bytes = BODY, *more: str, length: int | None = None) -> bytes:
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *more,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def assert_error(answer: Any, code: str) -> None:
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == code


async def test_a_head_that_does_not_end_in_time_is_closed() -> None:
    async with served() as here, raw(here) as slow:
        await slow.send(b"GET /live HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        status, headers, answer = await slow.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert_error(answer, "request_timeout")
        assert await slow.is_closed()


async def test_a_head_that_drips_is_closed_as_soon() -> None:
    async with served() as here, raw(here) as slow:
        drops = 0
        with pytest.raises(ConnectionError):
            await slow.send(b"GET /live HTTP/1.1\r\n")
            while True:
                await slow.send(b"X: y\r\n")
                drops += 1
                assert drops < 1000
                await asyncio.sleep(0.02)
        assert drops < 100


async def test_a_second_head_on_a_connection_has_its_own_time() -> None:
    async with served() as here, raw(here) as slow:
        await slow.send(post())
        assert (await slow.answer())[0] == 200
        await slow.send(b"GET /l")
        assert (await slow.answer())[0] == 408
        assert await slow.is_closed()


async def test_an_answer_may_take_longer_than_a_head() -> None:
    async with frontend(QUICK) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        async with raw(here) as patient:
            await patient.send(post())
            stream = await worker.next()
            await asyncio.sleep(2 * QUICK.idle_s)
            stream.send("ok", finish="stop", cached=0)
            assert (await patient.answer())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
        b"GET /live HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /live HTTP/1.1\r\n" + b"a" * 10_000 + b": 1\r\n\r\n",
    ],
    ids=["value", "many", "path", "name"],
)
async def test_a_gigantic_head_is_a_431(head: bytes) -> None:
    async with served() as here, raw(here) as client:
        await client.send(head)
        status, headers, answer = await client.answer()
        assert (status, headers["connection"]) == (431, "close")
        assert_error(answer, "headers_too_large")
        assert await client.is_closed()


async def test_a_head_in_pieces_is_bounded_in_all() -> None:
    limits = Limits(head_bytes_max=32 * 1024)
    async with served(limits) as here, raw(here) as client:
        await client.send(b"GET /live HTTP/1.1\r\n")
        for number in range(10):
            await client.send(b"X%d: " % number + b"a" * 4000 + b"\r\n")
            await asyncio.sleep(0)
        status, _, answer = await client.answer()
        assert status == 431
        assert_error(answer, "headers_too_large")
        assert await client.is_closed()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /live HTTP/9.9\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nA: \x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_told_so_in_json_and_closed(sent: bytes) -> None:
    async with served() as here, raw(here) as client:
        await client.send(sent)
        status, headers, answer = await client.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert_error(answer, "bad_http")
        assert await client.is_closed()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(b"not gzip at all", "Content-Encoding: gzip"), 400),
        (post(gzip.compress(BODY)[:-20], "Content-Encoding: gzip"), 400),
        (post(b"\xff\xff\xff", "Content-Encoding: deflate"), 400),
        (post(BODY, "Content-Encoding: compress"), 415),
        (post(BODY, "Content-Encoding: br"), 415),
        (post(BODY, "Content-Encoding: zstd"), 415),
        (post(BODY, "Content-Encoding: gzip, gzip"), 415),
        (post(BODY, "Expect: the-unexpected"), 417),
        (post(BODY, "Upgrade: websocket", "Connection: Upgrade"), 200),
        (post(zlib.compress(BODY), "Content-Encoding: deflate"), 200),
        (
            f"POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\n".encode()
            + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            400,
        ),
    ],
)
async def test_a_body_that_is_not_what_its_headers_say(sent: bytes, status: int) -> None:
    async with served() as here, raw(here) as client:
        await client.send(sent)
        got, _, answer = await client.answer()
        assert got == status, answer
        assert ("error" in answer) == (status != 200)


async def test_a_compressed_bomb_is_a_413_and_never_whole() -> None:
    """200 MiB in 200 kB: aiohttp decompresses as much as is read."""
    bomb = gzip.compress(b" " * (200 * 2**20), 9)
    async with served() as here, raw(here) as client:
        await client.send(post(bomb, "Content-Encoding: gzip"))
        status, headers, answer = await client.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert_error(answer, "body_too_large")
        assert await client.is_closed()


async def test_a_body_that_drips_is_a_408() -> None:
    async with served() as here, raw(here) as slow:
        await slow.send(post(b"", length=100_000))

        async def drip() -> None:
            try:
                while True:
                    await slow.send(b" ")
                    await asyncio.sleep(0.02)
            except ConnectionError:
                return

        dripping = asyncio.create_task(drip())
        status, _, answer = await slow.answer()
        assert status == 408
        assert_error(answer, "request_timeout")
        await dripping


async def test_idle_connections_are_closed_after_a_while() -> None:
    async with served() as here, raw(here) as silent, raw(here) as used:
        await used.send(post())
        assert (await used.answer())[0] == 200
        assert await silent.is_closed()
        assert await used.is_closed()


async def test_hundreds_of_idle_connections_hold_nobody_up() -> None:
    async with served(Limits()) as here:
        host, port = here.url.removeprefix("http://").split(":")
        made = [await asyncio.open_connection(host, int(port)) for _ in range(IDLE)]
        for _, writer in made[::2]:
            writer.write(b"GET /live HT")
        await assert_serves(here)
        for _, writer in made:
            writer.close()


async def test_one_connection_too_many_closes_the_one_that_idled_longest() -> None:
    async with frontend(Limits(connections_max=3)) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        async with raw(here) as busy, raw(here) as first, raw(here) as second:
            await busy.send(post())
            stream = await worker.next()
            for idle in (first, second):
                await idle.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await idle.answer())[0] == 200
            async with raw(here) as third:
                assert await first.is_closed()
                await third.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await third.answer())[0] == 200
            await second.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await second.answer())[0] == 200
            stream.send("ok", finish="stop", cached=0)
            assert (await busy.answer())[0] == 200


async def test_where_all_connections_are_busy_a_new_one_is_closed() -> None:
    async with frontend(Limits(connections_max=2)) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        async with raw(here) as one, raw(here) as other:
            for index, client in enumerate((one, other)):
                await client.send(post())
                await worker.next(index)
            async with raw(here) as third:
                assert await third.is_closed()
            for stream, client in zip(worker.streams, (one, other), strict=True):
                stream.send("ok", finish="stop", cached=0)
                assert (await client.answer())[0] == 200


async def test_pipelined_requests_are_answered_in_order_and_bounded() -> None:
    async with served(Limits()) as here, raw(here) as client:
        worker = here.workers[0]
        count = 50
        bodies = [BODY if number % 2 == 0 else b"{" for number in range(count)]
        await client.send(b"".join(post(body) for body in bodies))
        statuses = [(await client.answer())[0] for _ in range(count)]
        assert statuses == [200, 400] * (count // 2)
        assert len(worker.streams) == count // 2


async def test_who_pipelines_without_reading_costs_no_more_than_a_bound() -> None:
    """Requests behind one that runs wait in the socket, not in memory and not at a worker."""
    async with frontend(Limits()) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        async with raw(here) as client:
            client.writer.transport.set_write_buffer_limits(high=2**16)
            sending = asyncio.create_task(client.send(post() * 40_000))
            await worker.next()
            done, _ = await asyncio.wait([sending], timeout=0.3)
            assert not done, "all was taken"
            assert len(worker.streams) == 1
            client.writer.transport.abort()
            await asyncio.wait([sending], timeout=ANSWER_S)
            assert sending.done()
            sending.exception()
        # Nothing is read there any more, so that it has left is noticed when the answer is written.
        worker.echo = "ok"
        worker.streams[0].send("ok", finish="stop", cached=0)
        await here.assert_nothing_left()
        assert len(worker.streams) <= 2


async def test_who_never_reads_is_closed() -> None:
    async with served(msgspec.structs.replace(QUICK, unread_s=0.2)) as here, raw(here) as client:
        client.reader._limit = 1  # type: ignore[attr-defined]  # take no more than a little
        client.writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)

        def is_cut() -> bool:
            client.writer.write(b" ")  # else the client does not notice
            return client.writer.transport.is_closing()

        await eventually(is_cut)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_at_every_byte_leaves_nothing(stream: bool) -> None:
    body = json.dumps({**json.loads(BODY), "stream": stream}).encode()
    whole = post(body)
    async with served() as here:
        for cut in range(0, len(whole), 7):
            async with raw(here) as client:
                await client.send(whole[:cut])
                if cut % 2:
                    client.writer.transport.abort()


async def test_leaving_while_the_answer_runs_cancels_it() -> None:
    async with frontend(Limits()) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        for index, stream in enumerate((False, True)):
            async with raw(here) as client:
                await client.send(post(json.dumps({**json.loads(BODY), "stream": stream}).encode()))
                running = await worker.next(index)
                running.send("a")
                client.writer.transport.abort()
            await eventually(lambda running=running: running.cancelled)  # type: ignore[misc]
        await here.assert_nothing_left()
