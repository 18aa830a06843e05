"""One NATS connection for everything that a process does with NATS: the log, discovery, objects.

With `eventstore.client` the only module of the log that imports `nats`. It connects within a
bounded time, reconnects for ever afterwards, and turns the library's errors into
`eventstore.errors`. `client` and `jetstream` are the library's own objects for those who need a KV
bucket or an object store.
"""

import asyncio
import contextlib
import logging
import random
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

from eventstore.access import GUIDE, Access, explain
from eventstore.client import MendedClient
from eventstore.errors import LogUnavailable, MessageTooLarge

DEFAULT_URL = "nats://127.0.0.1:4222"
REQUEST_TIMEOUT_S = 5.0
RECONNECT_WAIT_S = (0.1, 1.0)
"""Between two attempts at a server, the first and the longest; the latter well below a lease."""
"""Between two attempts to reconnect. Drawn once a connection: clients should not march in step."""
PING_INTERVAL_S = 2
"""Two unanswered pings end a connection, so a silent one is noticed within 6 s."""
PENDING_MESSAGES_MAX = 1_000_000
PENDING_BYTES_MAX = 128 * 1024 * 1024
"""Received and not yet handled. Flow control keeps a consumer below the server's 32 MiB."""
DENIALS_TOLD_MAX = 32
"""Different ones that are logged as warnings; what a server denies later is only counted."""

NatsMessage = Msg
NatsSubscription = Subscription
Answer = TypeVar("Answer", bound=Struct)

_log = logging.getLogger(__name__)


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


class NotPermitted(LogUnavailable):
    """The server answers nothing because the user may not ask. denial: in the server's words."""

    def __init__(self, what: str, denial: str) -> None:
        super().__init__(
            f"{what}: {denial}", f"give the user that permission, or take another user ({GUIDE})"
        )


class _Failure(Struct, frozen=True):
    error: ApiError | None = None


_failure = msgspec.json.Decoder(_Failure)


class Nats:
    """A connection that mends itself. Made by `connect`; whoever connects also closes."""

    def __init__(self) -> None:
        self._client = MendedClient()
        self.disconnects = 0
        self.reconnects = 0
        self.errors = 0
        """Reported by the client library, each failed attempt to reconnect included."""
        self.last_error = ""
        self.denials = 0
        """Messages and subscriptions that the server did not permit."""
        self.on_connected: set[Callable[[], None]] = set()
        """Called after every reconnect; must not raise."""
        self.on_disconnected: set[Callable[[], None]] = set()
        """Called when the connection is lost or closed; must not raise."""
        self.addresses: tuple[str, ...] = ()
        """Those that `connect` was given."""
        self.access = Access()
        self._where = ""
        self._why_not: tuple[str, str] | None = None
        self._told: set[str] = set()
        self._last_denial = (-1.0, "")
        self._up = asyncio.Event()
        self._closing = False
        self._attempts = 0
        """Failed ones since the connection stood last."""

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
        access: Access | None = None,
        wait_s: float = 10.0,
    ) -> Self:
        """Connect to the first of `urls` that answers, trying for `wait_s` seconds.

        name: shown in the server's monitoring. access: None where the server asks for nothing.
        Raises LogUnavailable.
        """
        self = cls()
        self.addresses = tuple(urls)
        self.access = access = (access or Access()).or_from_url(urls)
        access.check()
        tls = access.tls_context()
        self._client.insists_on_tls = tls is not None
        self._where = ", ".join(without_secrets(url) for url in urls)
        try:
            async with asyncio.timeout(wait_s):
                await self._client.connect(
                    servers=list(urls),
                    name=name,
                    user=access.user,
                    password=access.read_password if access.user is not None else None,
                    token=access.token,
                    nkeys_seed_str=access.nkey,
                    user_jwt_cb=access.read_jwt if access.credentials_file is not None else None,
                    signature_cb=access.sign if access.credentials_file is not None else None,
                    inbox_prefix=access.inbox_prefix,
                    tls=tls,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=self._back_off(),  # type: ignore[arg-type]
                    ping_interval=PING_INTERVAL_S,
                )
        except TimeoutError as error:
            await self.close()
            why = f"no answer within {wait_s:g} s"
            raise self._not_connected(
                f"{why} ({self.last_error})" if self.last_error else why, self._why_not
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
    def clustered(self) -> bool:
        """Whether the server that is connected, or was last, is one of a cluster."""
        return self._client.clustered

    @property
    def server_id(self) -> str:
        """Names one run of the server that is connected, or was last."""
        return self._client.server_id

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
        asked_at = time.monotonic()
        payload = b"" if request is None else msgspec.json.encode(request)
        try:
            reply = await self._client.request(f"$JS.API.{verb}", payload, timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise NoResponders(
                f"JetStream is not enabled on {self.url}", "start nats-server with -js"
            ) from error
        except nats.errors.TimeoutError as error:
            what = f"JetStream on {self.url} did not answer {verb} within {timeout_s:g} s"
            raise self.denied(what, asked_at) or LogUnavailable(what) from error
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailable(f"could not ask {self.url} for {verb}: {error}") from error
        try:
            failure = _failure.decode(reply.data)
            if failure.error is not None:
                raise JetStreamRefused(f"JetStream refused {verb}", failure.error)
            return msgspec.json.decode(reply.data, type=answer)
        except msgspec.MsgspecError as error:
            raise LogUnavailable(f"{self.url} gave an unknown answer to {verb}") from error

    def denied(self, what: str, since_s: float) -> NotPermitted | None:
        """The error for `what` going unanswered, if the server denied anything after `since_s`.

        since_s: of `time.monotonic`. The server does not say which request it denied.
        """
        at_s, denial = self._last_denial
        return NotPermitted(what, denial) if at_s >= since_s else None

    def _not_connected(self, why: str, refusal: tuple[str, str] | None = None) -> LogUnavailable:
        try_this = "start a server (nats-server -js), or name another (--nats-url, NATS_SERVER)"
        if refusal is not None:
            why, try_this = refusal
        return LogUnavailable(f"could not connect to NATS at {self._where}: {why}", try_this)

    def _back_off(self) -> float:
        """Seconds until a server is tried again: doubling, and never the same for two clients."""
        first_s, longest_s = RECONNECT_WAIT_S
        wait_s: float = min(longest_s, first_s * 2**self._attempts)
        return wait_s * random.uniform(0.5, 1.5)

    async def _on_error(self, error: Exception) -> None:
        self.errors += 1
        if not self._up.is_set():
            self._attempts = min(self._attempts + 1, 16)
            self._client.options["reconnect_time_wait"] = self._back_off()
        self.last_error = str(error) or type(error).__name__
        text = self.last_error.removeprefix("nats: ")
        if "permissions violation" in text:
            self.denials += 1
            self._last_denial = (time.monotonic(), text)
            self._warn_once(f"NATS denies {self.access.who}: {text}")
            return
        refusal = explain(error, self.access)
        if refusal is not None:
            self._why_not = refusal  # what else goes wrong, such as a reset, follows from it
            self._warn_once(f"NATS at {self._where} refuses the connection: {refusal[0]}")
        else:
            _log.debug("nats error=%s", self.last_error)

    def _warn_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < DENIALS_TOLD_MAX:
            self._told.add(text)
            _log.warning("%s", text)

    async def _on_disconnected(self) -> None:
        self._up.clear()
        if not self._closing:
            self.disconnects += 1
            _log.warning("nats connection lost url=%s", self.url)
        for notify in tuple(self.on_disconnected):
            notify()

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._attempts = 0
        self._client.options["reconnect_time_wait"] = self._back_off()
        self._up.set()
        _log.info("nats connection is back url=%s", self.url)
        for notify in tuple(self.on_connected):
            notify()


def without_secrets(url: str) -> str:
    """`url` as it may be shown: without user, password and token."""
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
