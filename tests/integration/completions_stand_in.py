"""A completions server that answers by script, for the tests of `send-trace`."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from simulations.trace import TraceRequest

DEADLINE_S = 30.0

Script = Callable[["StandIn", web.Request, dict[str, object]], Awaitable[web.StreamResponse]]


def trace(count: int, *, gap_ms: int = 0) -> list[TraceRequest]:
    """Requests of two blocks, the first one shared, of two output tokens each."""
    return [
        TraceRequest(
            timestamp_ms=1000 + gap_ms * number,
            input_length=600,
            output_length=2,
            hash_ids=[0, number + 1],
        )
        for number in range(count)
    ]


class StandIn:
    """A completions server that keeps what it is asked, and answers as `script` says."""

    def __init__(self, script: Script, models: tuple[str, ...] = ("m",)) -> None:
        self.script = script
        self.models = models
        self.bodies: list[dict[str, object]] = []
        self.open = 0
        self.open_max = 0
        self.arrived = asyncio.Condition()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self.server = TestServer(app)

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")

    async def until_arrived(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.bodies) >= count)

    async def _models(self, _: web.Request) -> web.Response:
        data = [{"id": model, "object": "model"} for model in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with self.arrived:
            self.bodies.append(body)
            self.arrived.notify_all()
        self.open += 1
        self.open_max = max(self.open_max, self.open)
        try:
            return await self.script(self, request, body)
        finally:
            self.open -= 1


def frame(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


TOKEN = frame({"choices": [{"index": 0, "text": " word"}]})
USAGE = frame(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 600,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 300},
        },
        "nvext": {
            "worker_id": {"decode_worker_id": 10, "decode_dp_rank": 1},
            "predicted_cached_tokens": 150,
        },
    }
)
DONE = b"data: [DONE]\n\n"


async def stream(request: web.Request, *frames: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for each in frames:
        await response.write(each)
    return response


async def answer(_: StandIn, request: web.Request, body: dict[str, object]) -> web.StreamResponse:
    return await stream(request, TOKEN, TOKEN, USAGE, DONE)


@asynccontextmanager
async def serving(*stand_ins: StandIn) -> AsyncIterator[aiohttp.ClientSession]:
    for stand_in in stand_ins:
        await stand_in.server.start_server()
    try:
        async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as session:
            yield session
    finally:
        for stand_in in stand_ins:
            await stand_in.server.close()


async def refuse(_: StandIn, request: web.Request, body: dict[str, object]) -> web.StreamResponse:
    error = {"message": "all busy", "type": "overloaded_error", "param": None, "code": "overloaded"}
    return web.json_response({"error": error}, status=503)


async def answer_two(
    stand_in: StandIn, request: web.Request, body: dict[str, object]
) -> web.StreamResponse:
    """Answer two requests, and leave all others waiting."""
    if len(stand_in.bodies) > 2:
        await asyncio.Event().wait()
    return await answer(stand_in, request, body)
