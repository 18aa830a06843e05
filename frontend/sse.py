"""Server-sent events written from plain calls.

aiohttp's `StreamResponse.write` is a coroutine, so every token would wake the handler's task. Once
the response has begun, frames go to the transport directly, in the same chunked encoding; aiohttp
writes the head and the end. What a slow client leaves unread stays in the transport's buffer, up to
a bound: then the client is cut off, so that it costs neither memory nor a worker's time.
"""

import asyncio
from collections.abc import Callable

from aiohttp import web

from frontend.errors import ClientTooSlow
from frontend.service import Limits

HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class EventStream:
    """One SSE response. `send` before `open` collects; after it, writes at once."""

    def __init__(
        self, request: web.Request, limits: Limits, overrun: Callable[[ClientTooSlow], None]
    ) -> None:
        """overrun: called once, from `send`, when the client has too much unread."""
        self._request = request
        self._limits = limits
        self._overrun = overrun
        self._response = web.StreamResponse(headers=HEADERS)
        self._early: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._chunked = True
        self._dead = False
        self._closed = False

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    async def open(self) -> None:
        """Send status and headers, with what was collected so far.

        Raises ConnectionResetError if the client is gone.
        """
        response = self._response
        await response.prepare(self._request)
        self._chunked = bool(response.chunked) or "Transfer-Encoding" in response.headers
        while self._early:
            # `write` may wait, and more may be collected meanwhile.
            early, self._early = b"".join(self._early), []
            await response.write(early)
        transport = self._request.transport
        if transport is not None:
            self._transport = transport

    def send(self, frame: bytes) -> None:
        """Queue one or more whole frames for the client. Never blocks; nothing after an overrun."""
        transport = self._transport
        if transport is None:
            self._early.append(frame)
            return
        if self._dead or transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(frame), frame) if self._chunked else frame)
        unread_bytes = transport.get_write_buffer_size()
        if unread_bytes > self._limits.unread_bytes_max:
            self._dead = True
            transport.abort()
            self._overrun(ClientTooSlow(unread_bytes))

    async def close(self) -> None:
        """Wait until the client has taken the rest, within a bound; then end the response. A client
        that is gone by now has missed nothing that could still be told."""
        try:
            async with asyncio.timeout(self._limits.unread_s):
                await self._response.write_eof()
        except (TimeoutError, ConnectionResetError):
            self.abandon()
        self._closed = True

    def abandon(self) -> None:
        """Cut the client off if the response has begun and not ended: nothing can be said in it
        any more that it would understand."""
        if self._transport is not None and not self._closed:
            self._transport.abort()
