"""Snapshots of what a log folds to: what one is, where they are kept, which of them are usable.

A snapshot is one immutable object, named after the log and the record that it is of, so that the
list of names is the index:

    state-<8 hex digits: which life of the log>-<seq, 20 digits>

    magic 8 | format u16 | header size u32 | BLAKE2b-16 of the header | header | body

The header is MessagePack; the body belongs to `router.snapshot`. Reading is all or nothing:
whatever is wrong with the bytes is a `BadSnapshot`, and what comes out is what was written.
"""

import re
import struct
from collections.abc import Generator, Iterable
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec
from msgspec import Struct

from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.log import EventLog, Extent

FORMAT = 2
KEPT_MIN = 2
"""So many snapshots always stay: who is loading the newest keeps the records that follow it."""
KEPT_DEFAULT = 3
SNAPSHOT_BYTES_MAX = 4 * 1024**3
"""About 400 million (block, rank) pairs."""
HEAD_BYTES_MAX = 64 * 1024
"""The head of a snapshot, all before its body, is within so many bytes."""
CHECK_BYTES = 1024 * 1024
"""Hashed at a time: about 1 ms."""

_MAGIC = b"RECKONSS"
_PREFIX = struct.Struct("<8sHI16s")
_NAME = re.compile(r"state-([0-9a-f]{8})-([0-9]{20})\Z")


class BadSnapshot(EventStoreError):
    """The object is not a snapshot that this version can use."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.why = why

    def __str__(self) -> str:
        return f"snapshot {self.name} {self.why}"


class UnknownFormat(BadSnapshot):
    """It was written by a version with another format."""


class SnapshotGone(EventStoreError):
    """The store has no such object, or not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"snapshot {self.name} is not in the store any more"


class HistoryLost(LogUnavailable):
    """The log's beginning is gone, and no usable snapshot stands for it."""

    def __init__(self, first_seq: int) -> None:
        super().__init__(
            f"the log begins with record {first_seq}, and no usable snapshot covers those before",
            "python -m eventstore snapshot --accept-loss, which goes on with what is left; then "
            "start those workers again that registered before",
        )
        self.first_seq = first_seq


class SnapshotHeader(Struct, frozen=True, kw_only=True):
    """What a snapshot is of. New fields have a default, or the format gets a new number."""

    identity: str
    """Of the log's life, as in `Extent`."""
    seq: int
    """The last record that went into it."""
    time_ns: int
    """That record's time: it tells whether the log still holds the same record there."""
    digest: str
    """Of the state."""
    version: str
    """Of the code that wrote it."""
    size: int
    """Of the body, in bytes."""
    checksum: bytes
    """BLAKE2b-32 of the body."""
    from_seq: int = 1
    """From this record on, all that there were went into it. Above 1, some before had been lost."""


class Snapshot(NamedTuple):
    """An object taken apart. The body is not checked yet: see `checking`."""

    name: str
    header: SnapshotHeader
    body: memoryview


class SnapshotRef(NamedTuple):
    """What the name of a snapshot says. `life`: the part of the name that stands for a log."""

    name: str
    life: str
    seq: int


class SnapshotStore(Protocol):
    """The snapshots of one namespace. Every method raises LogUnavailable."""

    async def refs(self) -> list[SnapshotRef]:
        """All there are, by seq, the newest last. Objects of other names are left out."""

    async def read(self, name: str, first_bytes: int = SNAPSHOT_BYTES_MAX) -> bytes:
        """The object, or at least its first bytes. Raises SnapshotGone, BadSnapshot."""

    async def write(self, name: str, data: bytes) -> None:
        """Store an object, all of it or nothing; one of the same name is replaced."""

    async def delete(self, name: str) -> None:
        """Remove an object, if it is there."""

    async def sweep(self) -> int:
        """Remove what writes that never ended have left; returns how many. It would hit a write
        that is going on too, so only the holder of the claim may call it."""


class MemorySnapshots(SnapshotStore):
    """The store in memory, for tests and simulations."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def refs(self) -> list[SnapshotRef]:
        return refs_of(self.objects)

    async def read(self, name: str, first_bytes: int = SNAPSHOT_BYTES_MAX) -> bytes:
        try:
            return self.objects[name][:first_bytes]
        except KeyError:
            raise SnapshotGone(name) from None

    async def write(self, name: str, data: bytes) -> None:
        self.objects[name] = data

    async def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    async def sweep(self) -> int:
        return 0


# --- names ----------------------------------------------------------------------------------------


def life_of(identity: str) -> str:
    """What stands for a log's identity in names."""
    return blake2b(identity.encode(), digest_size=4).hexdigest()


def name_of(identity: str, seq: int) -> str:
    return f"state-{life_of(identity)}-{seq:020d}"


def refs_of(names: Iterable[str]) -> list[SnapshotRef]:
    """The names that are of snapshots, by seq."""
    matches = (_NAME.match(name) for name in names)
    found = [SnapshotRef(match[0], match[1], int(match[2])) for match in matches if match]
    return sorted(found, key=lambda ref: (ref.seq, ref.name))


def unusable(ref: SnapshotRef, extent: Extent) -> str | None:
    """Why a replica cannot go on from this snapshot along this log; None if it can."""
    if ref.life != life_of(extent.identity):
        return "is of another life of the log"
    if ref.seq > extent.last_seq:
        return f"is of record {ref.seq}, and the log ends at {extent.last_seq}"
    if ref.seq < extent.first_seq - 1:
        return f"is of record {ref.seq}, and the log begins at {extent.first_seq}"
    return None


def sort_out(
    refs: list[SnapshotRef], extent: Extent, kept: int
) -> tuple[list[SnapshotRef], list[SnapshotRef]]:
    """Which snapshots stay and which go, by seq. Without effect on those beyond the log's end: a
    server that has just taken over may not know the end yet."""
    usable = [ref for ref in refs if unusable(ref, extent) is None]
    stay = usable[-kept:]
    beyond = [
        ref for ref in refs if ref.life == life_of(extent.identity) and ref.seq > extent.last_seq
    ]
    gone = {ref.name for ref in refs} - {ref.name for ref in (*stay, *beyond)}
    return stay, refs_of(gone)


def trim_before(kept: list[SnapshotRef]) -> int:
    """Up to where the log may be trimmed if these snapshots are kept; 0: not at all.

    The record of the oldest one stays too: by its time a snapshot is told from one of a log that
    lost its tail. With one snapshot alone nothing is trimmed: somebody may be reading the log from
    its beginning because there was none a moment ago.
    """
    return kept[0].seq if len(kept) >= KEPT_MIN else 0


# --- bytes ----------------------------------------------------------------------------------------


def pack(
    body: bytes,
    *,
    identity: str,
    seq: int,
    time_ns: int,
    digest: str,
    version: str,
    from_seq: int = 1,
) -> bytes:
    """The object of a body. The other arguments: see `SnapshotHeader`."""
    header = SnapshotHeader(
        identity=identity,
        seq=seq,
        time_ns=time_ns,
        digest=digest,
        version=version,
        size=len(body),
        checksum=blake2b(body, digest_size=32).digest(),
        from_seq=from_seq,
    )
    return pack_header(header) + body


def pack_header(header: SnapshotHeader) -> bytes:
    """All of an object but its body."""
    data = msgspec.msgpack.encode(header)
    return _PREFIX.pack(_MAGIC, FORMAT, len(data), _short_hash(data)) + data


def unpack_header(name: str, data: bytes) -> SnapshotHeader:
    """The header at the beginning of `data`. Raises BadSnapshot."""
    return _split(name, data)[0]


def unpack(name: str, data: bytes) -> Snapshot:
    """Take an object apart, without a copy. Raises BadSnapshot, UnknownFormat."""
    header, start = _split(name, data)
    if len(data) - start != header.size:
        raise BadSnapshot(name, f"has {len(data) - start} bytes where {header.size} should be")
    return Snapshot(name, header, memoryview(data)[start:])


def checking(snapshot: Snapshot) -> Generator[None, None, None]:
    """Compare the body with its checksum, a millisecond of work a step. Raises BadSnapshot."""
    found = blake2b(digest_size=32)
    for start in range(0, len(snapshot.body), CHECK_BYTES):
        found.update(snapshot.body[start : start + CHECK_BYTES])
        yield
    if found.digest() != snapshot.header.checksum:
        raise BadSnapshot(snapshot.name, "is damaged: its checksum does not fit")


def check_body(snapshot: Snapshot) -> None:
    """`checking`, all at once. Raises BadSnapshot."""
    for _ in checking(snapshot):
        pass


def _split(name: str, data: bytes) -> tuple[SnapshotHeader, int]:
    """The header, and where the body begins."""
    if len(data) < _PREFIX.size:
        raise BadSnapshot(name, "is damaged: it ends too early")
    magic, version, size, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise BadSnapshot(name, "is not a snapshot")
    if version != FORMAT:
        raise UnknownFormat(name, f"has format {version}; this version knows {FORMAT}")
    end = _PREFIX.size + size
    encoded = data[_PREFIX.size : end]
    if len(encoded) != size or _short_hash(encoded) != checksum:
        raise BadSnapshot(name, "is damaged: its header's checksum does not fit")
    try:
        return msgspec.msgpack.decode(encoded, type=SnapshotHeader), end
    except msgspec.MsgspecError as error:
        raise BadSnapshot(name, f"has a header that cannot be read: {error}") from error


def _short_hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


# --- a snapshot and its log -----------------------------------------------------------------------


async def read_snapshot(
    log: EventLog, store: SnapshotStore, ref: SnapshotRef, extent: Extent
) -> Snapshot:
    """Read a snapshot that `unusable` has nothing against, and make sure that it is of this log.

    Its body is not checked. Raises SnapshotGone, BadSnapshot, LogUnavailable.
    """
    snapshot = unpack(ref.name, await store.read(ref.name))
    header = snapshot.header
    if (header.identity, header.seq) != (extent.identity, ref.seq):
        raise BadSnapshot(ref.name, "is not of the log and the record that its name says")
    if await is_of_lost_records(log, header):
        raise BadSnapshot(ref.name, "is of records that the log has lost since")
    return snapshot


async def is_of_lost_records(log: EventLog, header: SnapshotHeader) -> bool:
    """Whether the log has another record now where the snapshot ends.

    A log that lost its tail goes on with other records under the same numbers. Raises
    LogUnavailable.
    """
    return any(
        [record.time_ns != header.time_ns async for record in log.read(header.seq, header.seq)]
    )


async def read_header(store: SnapshotStore, ref: SnapshotRef) -> SnapshotHeader:
    """The header alone. Raises SnapshotGone, BadSnapshot, LogUnavailable."""
    return unpack_header(ref.name, await store.read(ref.name, HEAD_BYTES_MAX))
