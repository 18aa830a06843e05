"""What a chat completion costs without a router: an aiohttp handler that answers by rote.

    python -m benchmarks.bare_server PORT WORKER_PORT

Decodes the request and answers in the shape of a chat completion: at once, or as a stream that
passes on the tokens of a scripted worker (`fake_worker`) as they come. The yardstick of
`bench_frontend`, measured with the same load.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import msgspec
import uvloop
from aiohttp import web
from msgspec import Struct

from workers.frames import FrameReader
from workers.protocol import (
    EngineRequest,
    Generate,
    StopConditions,
    decode_to_frontend,
    frame,
)

MODEL_NAME = "scripted"
WORKER_PORT = web.AppKey("worker_port", int)


class _Request(Struct, frozen=True):
    model: str
    messages: list[msgspec.Raw]
    max_tokens: int
    stream: bool = False


_decode = msgspec.json.Decoder(_Request).decode
_encode = msgspec.json.Encoder().encode


def _chunk(model: str, choices: list[object], usage: object = None) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": model}
    tail = {"usage": usage} if usage else {}
    return b"data: " + _encode({**head, "choices": choices, **tail}) + b"\n\n"


async def chat(request: web.Request) -> web.StreamResponse:
    asked = _decode(await request.read())
    usage = {"prompt_tokens": 1, "completion_tokens": asked.max_tokens, "total_tokens": 1}
    if not asked.stream:
        message = {"role": "assistant", "content": " word" * asked.max_tokens}
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": asked.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            "usage": usage,
        }
        return web.Response(body=_encode(body), content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    delta = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
    async for tokens in _worker_tokens(request.app[WORKER_PORT], asked.max_tokens):
        for _ in range(tokens):
            await response.write(_chunk(asked.model, [delta]))
    await response.write(_chunk(asked.model, [], usage) + b"data: [DONE]\n\n")
    return response


async def _worker_tokens(port: int, max_tokens: int) -> AsyncIterator[int]:
    """How many tokens came, frame by frame."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = EngineRequest(
        request_id="1",
        model=MODEL_NAME,
        token_ids=[1],
        stop_conditions=StopConditions(max_tokens=max_tokens),
    )
    writer.write(frame(Generate(0, asked)))
    frames, left = FrameReader(), max_tokens
    while left:
        for body in frames.feed(await reader.read(65536)):
            for output in decode_to_frontend.decode(body).items:
                left -= len(output.token_ids)
                yield len(output.token_ids)
    writer.close()


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]})


def main() -> None:
    app = web.Application(client_max_size=64 * 1024 * 1024)
    port, app[WORKER_PORT] = map(int, sys.argv[1:])
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        access_log=None,
        print=lambda *_: None,
        loop=uvloop.new_event_loop(),
    )


if __name__ == "__main__":
    main()
