"""Snapshots in the JetStream object store `reckon_<namespace>_snapshots`.

Objects have the library's form, so `nats object ls` and `get` show them. Three things are done in
another way than the library's: listing is one request for the names, reading joins the chunks once,
and deleting leaves no marker behind.
"""

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import Iterable

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.js import api

from eventstore.connect import JetStreamRefused, Nats
from eventstore.errors import LogUnavailable
from eventstore.replicas import hold_replicas, replicas_of_new
from eventstore.snapshots import (
    SNAPSHOT_BYTES_MAX,
    BadSnapshot,
    SnapshotGone,
    SnapshotRef,
    SnapshotStore,
    refs_of,
)
from eventstore.stream import STREAM_NOT_FOUND
from eventstore.subjects import check_namespace

CHUNK_BYTES = 512 * 1024
"""Reading costs a round trip a chunk: 90 MB take 0.25 s."""
HEADERS_BYTES = 1024
"""Kept free of the server's max_payload, which counts the headers."""
READ_ATTEMPTS = 5
READ_PAUSE_S = 0.2
"""A server of a cluster that is asked for a chunk may not have it yet."""

_CONFIG_DIFFERS = 10058
_NO_MESSAGE = 10037
_UNREACHABLE = (nats.errors.Error, OSError, TimeoutError)


class _State(Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _Listing(Struct, frozen=True):
    state: _State


class _Found(Struct, frozen=True):
    data: bytes


class _Message(Struct, frozen=True):
    message: _Found


class _Meta(Struct, frozen=True):
    """What the object store says of an object."""

    nuid: str
    size: int = 0
    chunks: int = 0
    deleted: bool = False


class _Purged(Struct, frozen=True):
    success: bool


class NatsSnapshots(SnapshotStore):
    """The store of one namespace. Does not own the connection."""

    def __init__(self, connection: Nats, namespace: str, *, replicas: int | None = None) -> None:
        """replicas: see `eventstore.replicas`. The bucket is made by the first write."""
        self._nats = connection
        self._js = connection.jetstream
        self._bucket = f"reckon_{check_namespace(namespace)}_snapshots"
        self._stream = f"OBJ_{self._bucket}"
        self._replicas = replicas

    async def refs(self) -> list[SnapshotRef]:
        return refs_of(await self._names())

    async def read(self, name: str, first_bytes: int = SNAPSHOT_BYTES_MAX) -> bytes:
        meta = await self._meta(name)
        if meta.size > SNAPSHOT_BYTES_MAX:
            raise BadSnapshot(name, f"has {meta.size} bytes, more than any snapshot")
        chunks: list[bytes] = []
        room, seq = min(first_bytes, meta.size), 0
        while room > 0 and len(chunks) < meta.chunks:
            seq, chunk = await self._chunk(name, meta, seq + 1)
            chunks.append(chunk)
            room -= len(chunk)
        return b"".join(chunks)

    async def write(self, name: str, data: bytes) -> None:
        chunk_bytes = min(CHUNK_BYTES, self._nats.max_payload - HEADERS_BYTES)
        options = api.ObjectMetaOptions(max_chunk_size=chunk_bytes)
        began_at = time.monotonic()
        try:
            await self._open()
            store = await self._js.object_store(self._bucket)
            await store.put(name, data, api.ObjectMeta(options=options))
        except _UNREACHABLE as error:
            what = f"cannot store {name} in {self._bucket}"
            raise (
                self._nats.denied(what, began_at) or LogUnavailable(f"{what}: {error!r}")
            ) from error

    async def delete(self, name: str) -> None:
        try:
            meta = await self._meta(name)
        except SnapshotGone:
            return
        # Its name first: nobody should find an object whose chunks are not all there.
        await self._purge(self._meta_subject(name))
        await self._purge(self._chunks_subject(meta.nuid))

    async def sweep(self) -> int:
        named = set()
        for name in await self._names():
            with contextlib.suppress(SnapshotGone):
                named.add(self._chunks_subject((await self._description(name)).nuid))
        remains = sorted(await self._subjects("C") - named)
        for subject in remains:
            await self._purge(subject)
        return len(remains)

    # --- requests ---------------------------------------------------------------------------------

    async def _open(self) -> None:
        config = api.ObjectStoreConfig(replicas=replicas_of_new(self._nats, self._replicas))
        try:
            await self._js.create_object_store(self._bucket, config)
        except nats.js.errors.APIError as error:
            if error.err_code != _CONFIG_DIFFERS:
                raise
        await hold_replicas(self._nats, self._stream, self._replicas)

    async def _subjects(self, kind: str) -> set[str]:
        """Of all messages: M the objects' descriptions, C their chunks."""
        request = {"subjects_filter": f"$O.{self._bucket}.{kind}.>"}
        try:
            listing = await self._nats.api(f"STREAM.INFO.{self._stream}", request, _Listing)
        except JetStreamRefused as refused:
            if refused.error.err_code != STREAM_NOT_FOUND:
                raise
            return set()
        return set(listing.state.subjects or ())

    async def _names(self) -> list[str]:
        return list(_decoded(await self._subjects("M")))

    async def _meta(self, name: str) -> _Meta:
        """Of an object that is there. Raises SnapshotGone, BadSnapshot, LogUnavailable."""
        meta = await self._description(name)
        if meta.deleted:
            raise BadSnapshot(name, "was deleted from the object store by hand")
        return meta

    async def _description(self, name: str) -> _Meta:
        request = {"last_by_subj": self._meta_subject(name)}
        try:
            found = await self._nats.api(f"STREAM.MSG.GET.{self._stream}", request, _Message)
        except JetStreamRefused as refused:
            if refused.error.err_code not in (_NO_MESSAGE, STREAM_NOT_FOUND):
                raise
            raise SnapshotGone(name) from refused
        try:
            return msgspec.json.decode(found.message.data, type=_Meta)
        except msgspec.MsgspecError as error:
            raise BadSnapshot(name, f"has a description that cannot be read: {error}") from error

    async def _chunk(self, name: str, meta: _Meta, from_seq: int) -> tuple[int, bytes]:
        """The next chunk at or after `from_seq`, and its seq."""
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                await asyncio.sleep(READ_PAUSE_S)
                if await self._meta(name) != meta:
                    raise SnapshotGone(name)  # another of the same name is in its place
            try:
                message = await self._js.get_msg(
                    self._stream,
                    seq=from_seq,
                    subject=self._chunks_subject(meta.nuid),
                    direct=True,
                    next=True,
                )
                return int(message.seq or 0), message.data or b""
            except nats.js.errors.NotFoundError:
                continue
            except _UNREACHABLE as error:
                raise LogUnavailable(f"cannot read {name} of {self._bucket}: {error!r}") from error
        raise BadSnapshot(name, f"lacks chunks in {self._bucket}")

    async def _purge(self, subject: str) -> None:
        await self._nats.api(f"STREAM.PURGE.{self._stream}", {"filter": subject}, _Purged)

    def _meta_subject(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    def _chunks_subject(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"


def _decoded(subjects: Iterable[str]) -> Iterable[str]:
    """The names of objects in the subjects of their descriptions; what is none is left out."""
    for subject in sorted(subjects):
        try:
            yield base64.urlsafe_b64decode(subject.rpartition(".")[2]).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
