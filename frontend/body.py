"""Reading a request's body: of the right kind, within its bound, and without waiting for ever."""

import asyncio

from aiohttp import web

from frontend.errors import BodyTooLarge, RequestTimeout, UnsupportedMediaType
from frontend.service import Limits


async def read_json_body(request: web.Request, limits: Limits) -> bytes:
    """The whole body, decompressed if it came compressed.

    Raises UnsupportedMediaType, BodyTooLarge (as soon as that is known), or RequestTimeout when no
    byte came for `limits.body_idle_s`.
    """
    content_type = request.content_type
    if "Content-Type" not in request.headers:
        raise UnsupportedMediaType(None)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMediaType(content_type)
    length = request.content_length
    if length is not None and length > limits.body_bytes_max:
        raise BodyTooLarge(limits.body_bytes_max)
    pieces: list[bytes] = []
    size = 0
    try:
        while True:
            async with asyncio.timeout(limits.body_idle_s):
                piece = await request.content.readany()
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > limits.body_bytes_max:
                raise BodyTooLarge(limits.body_bytes_max)
            pieces.append(piece)
    except TimeoutError:
        raise RequestTimeout(limits.body_idle_s) from None
