"""One NATS connection for everything that a process does with NATS: the log, discovery, objects.

The only module of the log that imports `nats`. It connects within a bounded time, reconnects for
ever afterwards, and turns the library's errors into `eventstore.errors`. `client` and `jetstream`
are the library's own objects for those who need a KV bucket or an object store.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Self, TypeVar
from urllib.parse import urlsplit

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from eventstore.errors import LogUnavailable, MessageTooLarge

DEFAULT_URL = "nats://127.0.0.1:4222"
REQUEST_TIMEOUT_S = 5.0
SLICE_S = 0.001
"""How long the client may parse what came in before others get their turn."""
RECONNECT_WAIT_S = (0.05, 0.15)
"""Between two attempts to reconnect. Drawn once a connection: clients should not march in step."""
PING_INTERVAL_S = 2
"""Two unanswered pings end a connection, so a silent one is noticed within 6 s."""
PENDING_MESSAGES_MAX = 1_000_000
PENDING_BYTES_MAX = 128 * 1024 * 1024
"""Received and not yet handled. Flow control keeps a consumer below the server's 32 MiB."""

NatsMessage = Msg
NatsSubscription = Subscription
Answer = TypeVar("Answer", bound=Struct)

_log = logging.getLogger(__name__)


class _Client(Client):
    """nats-py's client with three of its habits changed."""

    _slice_end = 0.0

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        # The library parses all that the socket gave it, up to 256 KiB, without a pause: 10 ms and
        # more of small messages, in which no HTTP request would be served.
        await super()._process_msg(sid, subject, reply, data, headers)
        if time.monotonic() >= self._slice_end:
            await asyncio.sleep(0)
            self._slice_end = time.monotonic() + SLICE_S

    async def _process_err(self, err_msg: str) -> None:
        # The library closes for good on most errors that a server sends, "slow consumer" among
        # them. All but denied permissions end with the server closing the connection: reconnect.
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {err_msg}"))

    async def end(self) -> None:
        """Close, also where the library's own `close` would trip."""
        if self._flush_queue is None:
            return  # `connect` refused its arguments: nothing was opened
        if not self.is_connected:
            # It would be written to a socket that is gone.
            self._pending.clear()
            self._pending_data_size = 0
        with contextlib.suppress(OSError, nats.errors.Error):
            await self.close()


class ApiError(Struct, frozen=True):
    """What JetStream answered instead of a result. `err_code` is the exact cause, 5 digits."""

    code: int
    err_code: int = 0
    description: str = ""


class JetStreamRefused(LogUnavailable):
    """JetStream answered a request with an error."""

    def __init__(self, what: str, error: ApiError) -> None:
        super().__init__(f"{what}: {error.description} ({error.err_code})")
        self.error = error

    @property
    def final(self) -> bool:
        """Whether asking again would get the same answer."""
        return self.error.code in (400, 401, 403)


class NoResponders(LogUnavailable):
    """Nobody on the server listens to that subject."""


class _Failure(Struct, frozen=True):
    error: ApiError | None = None


_failure = msgspec.json.Decoder(_Failure)


class Nats:
    """A connection that mends itself. Made by `connect`; whoever connects also closes."""

    def __init__(self) -> None:
        self._client = _Client()
        self.disconnects = 0
        self.reconnects = 0
        self.errors = 0
        """Reported by the client library, each failed attempt to reconnect included."""
        self.last_error = ""
        self.on_connected: set[Callable[[], None]] = set()
        """Called after every reconnect; must not raise."""
        self.on_disconnected: set[Callable[[], None]] = set()
        """Called when the connection is lost or closed; must not raise."""
        self._where = ""
        self._up = asyncio.Event()
        self._closing = False

    @property
    def client(self) -> Client:
        """The library's client, for what this class does not do."""
        return self._client

    @classmethod
    async def connect(
        cls,
        urls: Sequence[str],
        *,
        name: str,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        wait_s: float = 10.0,
    ) -> Self:
        """Connect to the first of `urls` that answers, trying for `wait_s` seconds.

        name: shown in the server's monitoring. credentials: path of a .creds file.
        Raises LogUnavailable.
        """
        self = cls()
        self._where = ", ".join(without_secrets(url) for url in urls)
        try:
            async with asyncio.timeout(wait_s):
                await self._client.connect(
                    servers=list(urls),
                    name=name,
                    user=user,
                    password=password,
                    token=token,
                    user_credentials=credentials,
                    tls=tls,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=random.uniform(*RECONNECT_WAIT_S),  # type: ignore[arg-type]
                    ping_interval=PING_INTERVAL_S,
                )
        except TimeoutError as error:
            await self.close()
            why = f"no answer within {wait_s:g} s"
            raise self._not_connected(
                f"{why} ({self.last_error})" if self.last_error else why
            ) from error
        except (OSError, ValueError, ImportError, nats.errors.Error) as error:
            # Only what does not pass is raised: bad addresses and unreadable credentials.
            await self.close()
            raise self._not_connected(str(error)) from error
        except BaseException:
            await self.close()
            raise
        self._up.set()
        return self

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self._client.is_connected

    @property
    def closed(self) -> bool:
        """Whether `close` was called: nothing will work any more."""
        return self._closing

    @property
    def url(self) -> str:
        """The server connected with, or those to connect to."""
        current = self._client.connected_url
        return without_secrets(current.geturl()) if current is not None else self._where

    @property
    def max_payload(self) -> int:
        """The server's bound for a message, headers included, in bytes."""
        return self._client.max_payload

    @property
    def jetstream(self) -> JetStreamContext:
        return self._client.jetstream()

    async def wait_connected(self) -> None:
        """Return as soon as there is a connection. Raises LogUnavailable once it is closed."""
        while not self.connected:
            if self._closing:
                raise LogUnavailable("the connection to NATS is closed")
            self._up.clear()
            await self._up.wait()

    async def close(self) -> None:
        """Send what waits, then end. Safe to call twice."""
        self._closing = True
        await self._client.end()
        self._up.set()
        # The library cancels its tasks without waiting: give them their turn to end.
        await asyncio.sleep(0)

    async def publish(
        self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Hand a message to the connection. Raises LogUnavailable, MessageTooLarge."""
        try:
            await self._client.publish(subject, data, reply, headers)
        except nats.errors.MaxPayloadError as error:
            raise MessageTooLarge(len(data), self.max_payload) from error
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailable(f"could not send to {self.url}: {error}") from error

    async def subscribe(
        self, subject: str, handle: Callable[[NatsMessage], Awaitable[None]]
    ) -> NatsSubscription:
        """Call `handle`, a coroutine function that must not raise, for every message.

        Raises LogUnavailable.
        """
        try:
            return await self._client.subscribe(
                subject,
                cb=handle,
                pending_msgs_limit=PENDING_MESSAGES_MAX,
                pending_bytes_limit=PENDING_BYTES_MAX,
            )
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailable(f"could not subscribe at {self.url}: {error}") from error

    async def unsubscribe(self, subscription: NatsSubscription) -> None:
        """End a subscription. What it still held is dropped. Safe to call twice."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()

    async def api(
        self,
        verb: str,
        request: object,
        answer: type[Answer],
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Answer:
        """Ask the JetStream API: `$JS.API.<verb>` with `request` as JSON (None: empty).

        Raises NoResponders if the server has no JetStream, JetStreamRefused if it says no, and
        LogUnavailable if it says nothing in time.
        """
        if not self.connected:
            why = f": {self.last_error}" if self.last_error else ""
            raise LogUnavailable(f"not connected to NATS at {self.url}{why}")
        payload = b"" if request is None else msgspec.json.encode(request)
        try:
            reply = await self._client.request(f"$JS.API.{verb}", payload, timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise NoResponders(
                f"JetStream is not enabled on {self.url}", "start nats-server with -js"
            ) from error
        except nats.errors.TimeoutError as error:
            raise LogUnavailable(
                f"JetStream on {self.url} did not answer {verb} within {timeout_s:g} s"
            ) from error
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailable(f"could not ask {self.url} for {verb}: {error}") from error
        try:
            failure = _failure.decode(reply.data)
            if failure.error is not None:
                raise JetStreamRefused(f"JetStream refused {verb}", failure.error)
            return msgspec.json.decode(reply.data, type=answer)
        except msgspec.MsgspecError as error:
            raise LogUnavailable(f"{self.url} gave an unknown answer to {verb}") from error

    def _not_connected(self, why: str) -> LogUnavailable:
        return LogUnavailable(
            f"could not connect to NATS at {self._where}: {why}",
            "start a server (nats-server -js), or name another (--nats-url, NATS_SERVER)",
        )

    async def _on_error(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = str(error) or type(error).__name__
        _log.debug("nats error=%s", self.last_error)

    async def _on_disconnected(self) -> None:
        self._up.clear()
        if not self._closing:
            self.disconnects += 1
            _log.warning("nats connection lost url=%s", self.url)
        for notify in tuple(self.on_disconnected):
            notify()

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._up.set()
        _log.info("nats connection is back url=%s", self.url)
        for notify in tuple(self.on_connected):
            notify()


def without_secrets(url: str) -> str:
    """`url` as it may be shown: without user, password and token."""
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
