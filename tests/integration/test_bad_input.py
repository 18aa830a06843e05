"""What a client may send wrong, over a real socket: a clear 4xx in one shape, nothing left."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend import app as frontend_app
from frontend.service import FRONTEND, Limits
from tests.integration.harness import MODEL, Harness, card, frontend
from tests.waiting import eventually

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
TOOL: dict[str, Any] = {"type": "function"}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def here() -> AsyncIterator[Harness]:
    async with frontend(http_body_limit_mb=1) as harness:
        await harness.add_worker(1, echo="ok", model=card(context_length=512))
        await harness.until_served()
        yield harness


def assert_error_shape(answer: Any) -> None:
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"] and "Traceback" not in answer["error"]["message"]


async def send(here: Harness, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    given = {"Content-Type": "application/json", **headers}
    async with (
        aiohttp.ClientSession() as session,
        session.post(here.url + path, data=body, headers=given) as response,
    ):
        return response.status, await response.json()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": MESSAGES, **fields}).encode()


def nested(depth: int) -> dict[str, Any]:
    """Less deep than what a JSON decoder gives up at."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


BAD_BODIES: list[tuple[str, bytes, int, str | None]] = [
    (CHAT, b"{", 400, None),
    (CHAT, b"", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, b"\xff\xfe{}", 400, None),
    (CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\xff"}]}', 400, None),
    (CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', 400, None),
    (CHAT, b"[" * 100_000, 400, None),
    (CHAT, b'{"model":"tiny","messages":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, None),
    (CHAT, chat(model="nope"), 404, "model"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    (CHAT, chat(messages="hi"), 400, "messages"),
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature="warm"), 400, "temperature"),
    (CHAT, chat(top_p=1e300), 400, "top_p"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens"),
    (CHAT, chat(max_tokens=512), 400, "max_tokens"),
    (CHAT, chat(n=2, temperature=0), 400, "n"),
    (CHAT, chat(functions=[{}]), 400, "functions"),
    (CHAT, chat(guided_json=nested(900)), 400, "guided_json"),
    (CHAT, chat(tools=[{**TOOL, "function": {"name": "f", "parameters": nested(900)}}]), 400, None),
    (CHAT, chat(foo=1, bar=2), 400, "foo"),
    (CHAT, chat(stop=["x"] * 33), 400, "stop"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    (CHAT, chat(messages=[{"role": "user", "content": [IMAGE]}]), 400, "messages[0].content[0]"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(messages=[{"role": "user", "content": "word " * 600}]), 400, "messages"),
    (TEXT, b'{"model":"tiny"}', 400, "prompt"),
    (TEXT, b'{"model":"tiny","prompt":[]}', 400, "prompt"),
    (TEXT, b'{"model":"tiny","prompt":""}', 400, "prompt"),
    (TEXT, b'{"model":"tiny","prompt":[1,"a"]}', 400, "prompt"),
    (TEXT, b'{"model":"tiny","prompt":[4294967295]}', 400, "prompt"),
    (TEXT, b'{"model":"tiny","prompt":[-1]}', 400, None),
    (TEXT, b'{"model":"tiny","prompt":[1.5]}', 400, None),
]


async def test_every_bad_body_is_a_4xx_that_names_the_field(here: Harness) -> None:
    for path, body, status, param in BAD_BODIES:
        got, answer = await send(here, path, body)
        assert got == status, (body[:80], answer)
        assert_error_shape(answer)
        if param is not None:
            assert answer["error"]["param"] == param, (body[:80], answer)
    await here.assert_nothing_left()
    assert not any(stream.request for stream in here.workers[0].streams)


async def test_wrong_routes_methods_and_media_types_have_the_same_shape(here: Harness) -> None:
    async with aiohttp.ClientSession() as session:
        for method, path, status in [
            ("GET", "/nope", 404),
            ("POST", "/", 404),
            ("GET", CHAT, 405),
            ("DELETE", "/v1/models", 405),
            ("POST", "/health", 405),
        ]:
            async with session.request(method, here.url + path) as response:
                assert response.status == status
                assert_error_shape(await response.json())
    assert (await send(here, CHAT, chat(), **{"Content-Type": "text/plain"}))[0] == 415


async def test_a_body_over_the_limit_is_a_413_whether_it_says_its_length_or_not(
    here: Harness,
) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 600_000

    big = chat(user="x" * 1_100_000)
    async with aiohttp.ClientSession() as session:
        for body in (io.BytesIO(big), drip()):
            headers = {"Content-Type": "application/json"}
            async with session.post(here.url + CHAT, data=body, headers=headers) as response:
                assert response.status == 413
                assert_error_shape(await response.json())
    bomb = gzip.compress(b" " * 50_000_000)
    status, answer = await send(here, CHAT, bomb, **{"Content-Encoding": "gzip"})
    assert status == 413
    assert_error_shape(answer)
    await here.assert_nothing_left()


async def raw(here: Harness) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = here.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), limit=2**16)


async def test_a_client_that_stalls_in_its_body_gets_a_408_and_is_closed() -> None:
    async with frontend(limits=Limits(body_idle_s=0.1)) as here:
        await here.add_worker(1, echo="ok")
        await here.until_served()
        reader, writer = await raw(here)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model"'
        )
        async with asyncio.timeout(10):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer
        writer.close()
        await writer.wait_closed()
        await here.assert_nothing_left()


async def test_a_client_that_never_reads_is_cut_off_and_its_work_is_stopped() -> None:
    """The worker floods a stream that nobody reads: bounded memory, then the end of both."""
    async with frontend(limits=Limits(unread_bytes_max=256 * 1024)) as here:
        worker = await here.add_worker(1)
        await here.until_served()
        _, writer = await raw(here)
        body = chat(stream=True)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        stream = await worker.next()
        for _ in range(20_000):
            if stream.cancelled:
                break
            stream.send("many words " * 50)
            await asyncio.sleep(0)
        await eventually(lambda: stream.cancelled)
        writer.close()
        await here.assert_nothing_left()


async def test_a_client_that_leaves_at_any_stage_leaves_nothing() -> None:
    async with frontend() as here:
        worker = await here.add_worker(1)
        await here.until_served()
        body = chat(stream=True)
        whole = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        for cut in (1, 30, 120, len(whole) - 1, len(whole)):
            _, writer = await raw(here)
            writer.write(whole[:cut])
            await writer.drain()
            if cut == len(whole):
                stream = await worker.next()
                stream.send("a")
            writer.close()
            await writer.wait_closed()
        await eventually(lambda: all(stream.cancelled for stream in worker.streams))
        await here.assert_nothing_left()
        assert len(worker.streams) == 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
known_fields = st.sampled_from(
    [
        *("messages", "prompt", "stream", "max_tokens", "stop", "temperature", "n", "nvext"),
        *("stream_options", "logit_bias", "min_tokens", "top_k", "tools", "user", "seed"),
        *("tool_choice", "response_format", "logprobs", "top_logprobs", "guided_json", "echo"),
    ]
)
bodies = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from([MODEL, "nope", ""]) | json_values,
            "messages": st.just(MESSAGES) | json_values,
            "prompt": st.just("hi") | json_values,
        },
    )
    .flatmap(
        lambda base: st.dictionaries(known_fields, json_values, max_size=3).map(
            lambda more: {**base, **more}
        )
    )
    .map(lambda body: json.dumps(body).encode()),
)


def test_generated_bodies_never_make_a_5xx() -> None:
    """Any body on either endpoint: 200 or a 4xx in the one shape; bookings are back to zero."""

    async def hold(ready: "asyncio.Future[Harness]", stop: asyncio.Event) -> None:
        async with frontend() as here:
            await here.add_worker(1, echo="ok")
            await here.until_served()
            ready.set_result(here)
            await stop.wait()
            await here.assert_nothing_left()

    async def check(here: Harness, path: str, body: bytes) -> None:
        status, answer = await send(here, path, body)
        assert status == 200 or 400 <= status < 500, answer
        if status != 200:
            assert_error_shape(answer)

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        ready: asyncio.Future[Harness] = loop.create_future()
        stop = asyncio.Event()
        held = loop.create_task(hold(ready, stop))
        here = loop.run_until_complete(ready)

        @settings(suppress_health_check=list(HealthCheck), max_examples=300)
        @given(st.sampled_from([CHAT, TEXT]), bodies)
        def drive(path: str, body: bytes) -> None:
            loop.run_until_complete(check(here, path, body))

        try:
            drive()
        finally:
            stop.set()
            loop.run_until_complete(held)


async def test_an_error_of_our_own_is_a_500_without_its_words(
    here: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outermost edge: whatever a handler raises that has no row."""

    async def broken(request: Any) -> Any:
        raise ZeroDivisionError("secret")

    handler: Callable[[Any], Awaitable[Any]] = broken
    response = await frontend_app.answer_errors(_Request(), handler)  # type: ignore[arg-type]
    assert response.status == 500
    assert b"secret" not in (response.body or b"")  # type: ignore[attr-defined]


class _Request(dict[Any, Any]):
    app: ClassVar = {FRONTEND: SimpleNamespace(overload_status=503)}
    headers: dict[str, str] = {}  # noqa: RUF012
