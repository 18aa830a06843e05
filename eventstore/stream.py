"""The JetStream stream of a namespace: what it must be like, its state, its making."""

import asyncio
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

from eventstore.connect import (
    REQUEST_TIMEOUT_S,
    JetStreamRefused,
    Nats,
    NoResponders,
    NotPermitted,
)
from eventstore.errors import LogUnavailable
from eventstore.log import Record
from eventstore.replicas import (
    ASK_TIMEOUT_S,
    MoreReplicas,
    hold_replicas,
    replicas_of_new,
    too_few_servers,
)
from eventstore.subjects import stream_name, stream_subjects

DUPLICATE_WINDOW_S: Final = 120
ENSURE_EVERY_S = 1.0
RETRY_S = 0.2
_NS = 1_000_000_000

STREAM_NOT_FOUND = 10059
_NAME_IN_USE = 10058
_NO_MESSAGE = 10037
_NOT_ENABLED = (10039, 10076)

_REQUIRED: Final[Mapping[str, object]] = {
    "retention": "limits",
    "storage": "file",
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "duplicate_window": DUPLICATE_WINDOW_S * _NS,
    "sealed": False,
    "deny_purge": False,
    "no_ack": False,
}
"""Without these the log would forget, refuse or repeat records on its own."""


class StreamState(Struct, frozen=True):
    """messages: how many are stored. An empty new stream has first_seq = last_seq = 0."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int


class StreamInfo(Struct, frozen=True):
    """What the server says of a stream. `created` tells one life of it from another."""

    created: str
    state: StreamState
    config: dict[str, object]


class _Message(Struct, frozen=True):
    seq: int
    subject: str
    time: str
    data: bytes = b""
    hdrs: bytes = b""

    @property
    def time_ns(self) -> int:
        """RFC 3339 in UTC with up to nine decimals, which `datetime` would cut to six."""
        whole, _, decimals = self.time.removesuffix("Z").partition(".")
        seconds = int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp())
        return seconds * _NS + int(decimals.ljust(9, "0"))


class _TimedMessage(Struct, frozen=True):
    time: str


class _Timed(Struct, frozen=True):
    message: _TimedMessage


class _Found(Struct, frozen=True):
    message: _Message


class _Purged(Struct, frozen=True):
    success: bool


class _Names(Struct, frozen=True):
    """One page of names, of `total` in all."""

    total: int = 0
    streams: list[str] | None = None


async def find_namespaces(nats: Nats, prefix: str = "") -> list[str]:
    """The namespaces that have a log and whose names begin with `prefix`, in order.

    Raises LogUnavailable.
    """
    root = stream_name("_").removesuffix("_")
    found: list[str] = []
    asked = 0
    while True:
        request = {"subject": "reckon.>", "offset": asked}
        page = await nats.api("STREAM.NAMES", request, _Names)
        names = page.streams or []
        found += [name.removeprefix(root) for name in names if name.startswith(root + prefix)]
        asked += len(names)
        if not names or asked >= page.total:
            return sorted(found)


class Stream:
    """The stream of `namespace`, `RECKON_<namespace>`, over `reckon.<namespace>.>`."""

    def __init__(self, nats: Nats, namespace: str, *, replicas: int | None = None) -> None:
        """replicas: see `eventstore.replicas`."""
        self.name = stream_name(namespace)
        self.subjects = stream_subjects(namespace)
        self._nats = nats
        self._replicas = replicas
        self._ensured_at: float | None = None
        self._ensuring = asyncio.Lock()

    async def open(self, *, create: bool, wait_s: float) -> StreamInfo:
        """Find the stream, or make it if `create`, and check that it fits.

        A cluster that still elects its leaders is given `wait_s` seconds. Raises LogUnavailable.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            try:
                info = await self._find_or_create() if create else await self._find_or_tell()
                await hold_replicas(self._nats, self.name, self._replicas)
                return info
            except (NoResponders, NotPermitted, NoSuchStream, UnfitStream, MoreReplicas):
                raise
            except JetStreamRefused as refused:
                if refused.error.err_code in _NOT_ENABLED:
                    raise LogUnavailable(
                        f"JetStream is not enabled for this account on {self._nats.url}",
                        "enable it for the account, or connect as another user",
                    ) from refused
                if refused.final or asyncio.get_running_loop().time() >= deadline:
                    raise
            except LogUnavailable:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1))

    async def ensure(self) -> None:
        """Make the stream again if it is gone. Asks the server at most once a second.

        Raises LogUnavailable.
        """
        async with self._ensuring:
            now = asyncio.get_running_loop().time()
            if self._ensured_at is not None and now - self._ensured_at < ENSURE_EVERY_S:
                return
            self._ensured_at = now
            try:
                await self.info(ASK_TIMEOUT_S)
            except JetStreamRefused as refused:
                if refused.error.err_code != STREAM_NOT_FOUND:
                    raise
                await self._find_or_create()

    async def info(self, timeout_s: float = REQUEST_TIMEOUT_S) -> StreamInfo:
        """The stream's present state, from its leader. Raises LogUnavailable."""
        return await self._nats.api(f"STREAM.INFO.{self.name}", None, StreamInfo, timeout_s)

    async def last_with_id(self, subject: str, msg_id: str) -> int | None:
        """The seq of the last message on `subject` if `msg_id` is its id. Raises LogUnavailable."""
        found = await self._message({"last_by_subj": subject})
        lines = found.hdrs.split(b"\r\n") if found is not None else []
        return found.seq if found and b"Nats-Msg-Id: " + msg_id.encode() in lines else None

    async def record(self, seq: int) -> Record | None:
        """The record at `seq`, if it is there. Raises LogUnavailable."""
        found = await self._message({"seq": seq})
        if found is None:
            return None
        return Record(found.seq, found.time_ns, found.subject, found.data)

    async def _message(self, which: dict[str, object]) -> _Message | None:
        try:
            answer = await self._nats.api(f"STREAM.MSG.GET.{self.name}", which, _Found)
        except JetStreamRefused as refused:
            if refused.error.err_code != _NO_MESSAGE:
                raise
            return None
        return answer.message

    async def time_of(self, seq: int) -> str | None:
        """When the record was stored, as the server writes times (RFC 3339, nanoseconds); None if
        it is not there. Raises LogUnavailable."""
        try:
            found = await self._nats.api(f"STREAM.MSG.GET.{self.name}", {"seq": seq}, _Timed)
        except JetStreamRefused as refused:
            if refused.error.err_code != _NO_MESSAGE:
                raise
            return None
        return found.message.time

    async def purge(self, before_seq: int) -> None:
        """Remove the messages below `before_seq`, which is 1 or more. Raises LogUnavailable."""
        # Seq 0 would mean all of it, and one beyond the head would move the numbering.
        state = (await self.info()).state
        seq = min(before_seq, state.last_seq + 1)
        if seq > max(state.first_seq, 1):
            await self._nats.api(f"STREAM.PURGE.{self.name}", {"seq": seq}, _Purged)

    async def _find(self) -> StreamInfo:
        info = await self.info(ASK_TIMEOUT_S)
        self._check(info)
        return info

    async def _find_or_tell(self) -> StreamInfo:
        try:
            return await self._find()
        except JetStreamRefused as refused:
            if refused.error.err_code != STREAM_NOT_FOUND:
                raise
            raise NoSuchStream(self.name, self._nats.url, await self._others()) from refused

    async def _find_or_create(self) -> StreamInfo:
        try:
            return await self._find()
        except JetStreamRefused as refused:
            if refused.error.err_code != STREAM_NOT_FOUND:
                raise
        try:
            info = await self._nats.api(
                f"STREAM.CREATE.{self.name}", self._config(), StreamInfo, ASK_TIMEOUT_S
            )
        except JetStreamRefused as refused:
            if refused.error.err_code != _NAME_IN_USE:
                raise too_few_servers(refused) from refused
            return await self._find()  # somebody else was quicker, with other replicas
        self._check(info)
        return info

    async def _others(self) -> list[str]:
        try:
            return await find_namespaces(self._nats)
        except LogUnavailable:
            return []  # only a hint, and not everybody may ask

    def _config(self) -> dict[str, object]:
        return {
            "name": self.name,
            "subjects": [self.subjects],
            "num_replicas": replicas_of_new(self._nats, self._replicas),
            "allow_direct": True,
            **_REQUIRED,
        }

    def _check(self, info: StreamInfo) -> None:
        required = {"subjects": [self.subjects], **_REQUIRED}
        for option, value in required.items():
            found = info.config.get(option, False if isinstance(value, bool) else None)
            if found != value:
                raise UnfitStream(self.name, option, found, value)


class UnfitStream(LogUnavailable):
    """A stream of the name exists and cannot be the log."""

    def __init__(self, stream: str, option: str, found: object, needed: object) -> None:
        super().__init__(
            f"stream {stream} has {option}={found}; the log needs {needed}",
            "use another namespace, or correct the stream with `nats stream edit`",
        )


class NoSuchStream(LogUnavailable):
    """The namespace has no log on this server. others: the namespaces that have."""

    def __init__(self, stream: str, url: str, others: list[str]) -> None:
        super().__init__(
            f"there is no stream {stream} on {url}",
            f"another --namespace: {', '.join(others)}" if others else "start a worker or frontend",
        )
