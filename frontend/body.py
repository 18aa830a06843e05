"""Reading a request's body: of the right kind, within its bounds, and without waiting for ever."""

import asyncio

from aiohttp import web

from frontend.errors import (
    BadRequest,
    BodyTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
    shown,
)
from frontend.service import Limits

ENCODINGS = ("gzip", "deflate")


class UnsupportedEncoding(UnsupportedMediaType):
    def __str__(self) -> str:
        return f"the content-encoding must be one of {', '.join(ENCODINGS)}; {self.content_type}"


async def read_json_body(request: web.Request, limits: Limits) -> bytes:
    """The whole body, decompressed if it came compressed.

    Raises UnsupportedMediaType, BodyTooLarge (as soon as that is known, and of what is compressed
    after at most a piece too much), BadRequest for what is not encoded as it says, or
    RequestTimeout when it comes too slowly.
    """
    _check_kind(request)
    length = request.content_length
    if length is not None and length > limits.body_bytes_max:
        raise BodyTooLarge(limits.body_bytes_max)
    pieces: list[bytes] = []
    size = 0
    now_s = asyncio.get_running_loop().time
    begun_s = now_s()
    try:
        while True:
            # By a deadline for each piece, one byte at a time could go on for ever.
            due_s = begun_s + limits.body_idle_s + size / limits.body_bytes_per_s_min
            async with asyncio.timeout_at(min(due_s, now_s() + limits.body_idle_s)):
                piece = await request.content.readany()
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > limits.body_bytes_max:
                raise BodyTooLarge(limits.body_bytes_max)
            pieces.append(piece)
    except TimeoutError:
        raise RequestTimeout(limits.body_idle_s) from None
    except web.RequestPayloadError as error:
        raise BadRequest(
            "the body is not encoded as its headers say", None, "bad_encoding"
        ) from error


def _check_kind(request: web.Request) -> None:
    content_type = request.content_type
    if "Content-Type" not in request.headers:
        raise UnsupportedMediaType(None)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMediaType(content_type)
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in (*ENCODINGS, "identity"):
        raise UnsupportedEncoding(shown(encoding))
