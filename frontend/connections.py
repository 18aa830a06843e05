"""What a connection may cost before its client has asked for anything, and HTTP that is none.

aiohttp bounds the lines of a request's head and how long a connection idles. Here is the rest: how
long and how large a head may be that is still coming, how many connections there may be, and that
what can't be parsed is answered as every other error is.
"""

import asyncio
import logging
import resource
import ssl
from functools import partial
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

from frontend.body import UnsupportedEncoding
from frontend.errors import SHOWN_CHARS_MAX, BadRequest, RequestTimeout, http_of
from frontend.service import Limits

BACKLOG = 1024
OPEN_FILES = 65_536
"""As many as are asked of the system, where it allows."""
LOOKED_AT_MAX = 64
"""Connections that are looked at to find an idle one."""
_TOO_MANY_HEADERS = "Too many headers received"
"""aiohttp's words; it has no class for it."""

_log = logging.getLogger(__name__)


def allow_open_files() -> int:
    """Let this process open as many files as it may, up to OPEN_FILES; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


class Connections:
    """Those that are open. One too many closes the one that has idled for longest, or the new one
    if none of LOOKED_AT_MAX idles. Cost: O(1) a request."""

    def __init__(self, connections_max: int) -> None:
        self._max = connections_max
        self._open: dict[GuardedConnection, None] = {}
        """Oldest use first."""
        self._is_full = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "GuardedConnection") -> None:
        self._open[connection] = None
        if len(self._open) <= self._max:
            return
        if not self._is_full:
            self._is_full = True
            _log.warning("there are %d connections; idle ones are closed for new ones", self._max)
        for _ in range(LOOKED_AT_MAX):
            oldest = next(iter(self._open))
            if oldest.is_idle:
                break
            self.used(oldest)
        else:
            oldest = connection
        self.remove(oldest)
        oldest.force_close()

    def used(self, connection: "GuardedConnection") -> None:
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def remove(self, connection: "GuardedConnection") -> None:
        self._open.pop(connection, None)
        if len(self._open) < self._max // 2:
            self._is_full = False


class GuardedConnection(web.RequestHandler):
    """aiohttp's side of a connection, with bounds on a head that is still coming."""

    __slots__ = ("_connections", "_head_bytes", "_head_timer", "_limits")

    def __init__(self, manager: web.Server, limits: Limits, connections: Connections) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # None is what turns it off
            keepalive_timeout=limits.idle_s,
            lingering_time=limits.linger_s,
        )
        self._limits = limits
        self._connections = connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits here: what has come since is less than a head."""
        waits = self._waiter is not None and not self._waiter.done()
        return waits or self._request_count == 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.remove(self)
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_idle = self.is_idle
        super().data_received(data)
        if not was_idle:
            return
        if not self.is_idle:
            self._connections.used(self)
            self._head_is_over()
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.head_bytes_max:
            self._refuse_head(_head_too_large(), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._head_timer is None and self.transport is not None:
            loop = asyncio.get_running_loop()
            self._head_timer = loop.call_later(self._limits.head_s, self._head_is_late)

    def _head_is_over(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.is_idle:
            self._refuse_head(RequestTimeout(self._limits.head_s), HTTPStatus.REQUEST_TIMEOUT)

    def _refuse_head(self, error: Exception, status: HTTPStatus) -> None:
        """Answer and close. Nothing else is being written: no request is whole yet."""
        self._head_is_over()
        if self.transport is not None:
            body = http_of(error).body
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What can't be parsed, and what failed outside of the application's own error handling."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        _log.debug("not HTTP, from %s: %s", request.remote, exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if isinstance(exc, LineTooLong) or exc.message == _TOO_MANY_HEADERS:
            return _closing(_head_too_large(), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if isinstance(exc, ContentEncodingError):
            return _closing(UnsupportedEncoding("it can't be read"))
        said = (exc.message.splitlines() or [""])[0][:SHOWN_CHARS_MAX]
        return _closing(BadRequest(f"this is not valid HTTP: {said}", None, "bad_http"))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPExpectationFailed):  # raised before any middleware
            error = BadRequest("only Expect: 100-continue can be met", None, "expectation_failed")
            resp = _closing(error, HTTPStatus.EXPECTATION_FAILED)
        try:
            async with asyncio.timeout(self._limits.unread_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:  # the client does not read, and would hold the answer for ever
            if self.transport is not None:
                self.transport.abort()
            return resp, True


def _closing(error: Exception, status: HTTPStatus | None = None) -> web.Response:
    """The answer that ends a connection. status: None: that of the error's row."""
    answer = http_of(error)
    headers = answer.headers | {"Connection": "close"}
    response = web.Response(status=status or answer.status, headers=headers, body=answer.body)
    response.force_close()
    return response


def _head_too_large() -> BadRequest:
    return BadRequest("the request's headers are too large", None, "headers_too_large")


class GuardedSite(web.BaseSite):
    """Listens for connections like these."""

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str,
        port: int,
        limits: Limits,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context, backlog=BACKLOG)
        self._host = host
        self._port = port
        self._limits = limits
        self.connections = Connections(limits.connections_max)

    @property
    def name(self) -> str:
        """Its URL, once it listens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._ssl_context is None else 'https'}://{host}:{self._port}"

    async def start(self) -> None:
        """Raises OSError."""
        await super().start()
        manager = self._runner.server
        assert manager is not None
        self._server = server = await asyncio.get_running_loop().create_server(
            partial(GuardedConnection, manager, self._limits, self.connections),
            self._host,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=None if self._ssl_context is None else self._limits.head_s,
            backlog=BACKLOG,
        )
        self._port = server.sockets[0].getsockname()[1]
