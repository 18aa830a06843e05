"""A log as one file: a snapshot (or the log's beginning) and the records that follow it.

    magic 8 | part | part | …

    part: kind u8 | compressed u8 | size u32 | stored size u32 | BLAKE2b-16 of all these | stored

The parts are a head, the snapshot in pieces, the records in batches of about a megabyte, and an
end, which counts them all: a file without it is truncated. Writing and reading hold one part at a
time. Records keep their seq and their time.
"""

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from hashlib import blake2b
from typing import BinaryIO, TypeVar

import msgspec
from msgspec import Struct

from eventstore.errors import EventStoreError
from eventstore.log import Record
from eventstore.subjects import producer_of, subject

FORMAT = 1
PART_BYTES = 1024 * 1024
PART_BYTES_MAX = 64 * 1024 * 1024
"""A record is at most as large as the server's max_payload, which may be 64 MiB."""
LEVEL = 3
"""Of zlib: hashes do not shrink, the rest is small at once."""

_MAGIC = b"RECKONAR"
_PART = struct.Struct("<BBII16s")


class BadArchive(EventStoreError):
    """The file is not a whole archive that this version can read."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the archive {self.why}"


class ArchiveHead(Struct, frozen=True, kw_only=True):
    """Where the archive comes from.

    first_seq: of the first record in it. With a snapshot that is the one after the snapshot's.
    last_seq: of the last one; first_seq - 1 if there is none.
    """

    format: int = FORMAT
    namespace: str
    identity: str
    first_seq: int
    last_seq: int
    snapshot: str | None
    """Its name; None: the archive begins with the log's first record."""
    snapshot_bytes: int
    time_ns: int
    """When it was written."""


class _End(Struct, frozen=True):
    parts: int
    records: int


class _Kind(IntEnum):
    HEAD = 1
    SNAPSHOT = 2
    RECORDS = 3
    END = 4


S = TypeVar("S", bound=Struct)

_Row = tuple[int, int, str, bytes]
"""seq, time in ns, producer, data."""
_rows = msgspec.msgpack.Decoder(list[_Row])


class ArchiveWriter:
    """Writes one archive to `file`, in order: the head, then the snapshot, the records, the end."""

    def __init__(self, file: BinaryIO, head: ArchiveHead) -> None:
        self.bytes = 0
        self.records = 0
        self._file = file
        self._parts = 0
        self._rows: list[_Row] = []
        self._rows_bytes = 0
        self._write(_MAGIC)
        self._part(_Kind.HEAD, msgspec.msgpack.encode(head))

    def snapshot(self, data: bytes) -> None:
        for start in range(0, len(data), PART_BYTES):
            self._part(_Kind.SNAPSHOT, data[start : start + PART_BYTES], compress=False)

    def add(self, record: Record) -> None:
        """Raises BadSubject for a record that is none of ours."""
        seq, time_ns, name, data = record
        self._rows.append((seq, time_ns, producer_of(name), data))
        self._rows_bytes += len(data)
        self.records += 1
        if self._rows_bytes >= PART_BYTES:
            self._flush()

    def end(self) -> None:
        """Without this the archive is not one."""
        self._flush()
        self._part(_Kind.END, msgspec.msgpack.encode(_End(self._parts, self.records)))

    def _flush(self) -> None:
        if self._rows:
            self._part(_Kind.RECORDS, msgspec.msgpack.encode(self._rows))
        self._rows, self._rows_bytes = [], 0

    def _part(self, kind: _Kind, data: bytes, compress: bool = True) -> None:
        stored = zlib.compress(data, LEVEL) if compress else data
        checksum = _checksum(kind, compress, len(data), stored)
        self._write(_PART.pack(kind, compress, len(data), len(stored), checksum))
        self._write(stored)
        self._parts += 1

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)


class ArchiveReader:
    """Reads an archive from `file`. Everything raises BadArchive for what is damaged or cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._parts = 0
        if file.read(len(_MAGIC)) != _MAGIC:
            raise BadArchive("is none: it begins in another way")
        kind, data = self._part()
        if kind is not _Kind.HEAD:
            raise BadArchive("has no head")
        self.head = _decode(data, ArchiveHead)
        if self.head.format != FORMAT:
            raise BadArchive(f"has format {self.head.format}; this version knows {FORMAT}")

    def snapshot(self) -> bytes | None:
        """The snapshot, if there is one. Call it before `records`."""
        if self.head.snapshot is None:
            return None
        pieces: list[bytes] = []
        size = 0
        while size < self.head.snapshot_bytes:
            kind, data = self._part()
            if kind is not _Kind.SNAPSHOT:
                break
            pieces.append(data)
            size += len(data)
        if size != self.head.snapshot_bytes:
            raise BadArchive("does not have the whole snapshot")
        return b"".join(pieces)

    def records(self, namespace: str) -> Iterator[Record]:
        """The records, on the subjects of `namespace`; each follows the one before. The end of the
        file is checked once the last one is read, so nothing is certain before that."""
        expected = self.head.first_seq
        while True:
            kind, data = self._part()
            if kind is _Kind.END:
                break
            if kind is not _Kind.RECORDS:
                raise BadArchive("has its parts in another order")
            try:
                rows = _rows.decode(data)
            except msgspec.MsgspecError as error:
                raise BadArchive(f"has records that cannot be read: {error}") from error
            for seq, time_ns, producer, payload in rows:
                if seq != expected:
                    raise BadArchive(f"goes on with record {seq} where {expected} should be")
                expected += 1
                yield Record(seq, time_ns, subject(namespace, producer), payload)
        end = _decode(data, _End)
        told = (end.parts, end.records, self.head.last_seq)
        if told != (self._parts - 1, expected - self.head.first_seq, expected - 1):
            raise BadArchive("lacks some of its parts")
        if self._file.read(1):
            raise BadArchive("goes on after its end")

    def _part(self) -> tuple[_Kind, bytes]:
        number, self._parts = self._parts, self._parts + 1
        head = self._file.read(_PART.size)
        if len(head) < _PART.size:
            raise BadArchive(f"is truncated before part {number}")
        kind, compressed, size, stored_size, checksum = _PART.unpack(head)
        if max(size, stored_size) > PART_BYTES_MAX or compressed > 1:
            raise BadArchive(f"is damaged at part {number}")
        stored = self._file.read(stored_size)
        if len(stored) < stored_size:
            raise BadArchive(f"is truncated in part {number}")
        if _checksum(kind, compressed, size, stored) != checksum:
            raise BadArchive(f"is damaged in part {number}: its checksum does not fit")
        try:
            data = zlib.decompressobj().decompress(stored, size) if compressed else stored
            known = _Kind(kind)
        except (zlib.error, ValueError) as error:
            raise BadArchive(f"cannot be read in part {number}: {error}") from error
        if len(data) != size:
            raise BadArchive(f"is damaged in part {number}: its size does not fit")
        return known, data


def check_archive(file: BinaryIO) -> None:
    """Read all of `file`, a part at a time. Raises BadArchive if it is not whole."""
    reader = ArchiveReader(file)
    reader.snapshot()
    for _ in reader.records(reader.head.namespace):
        pass


def _checksum(kind: int, compressed: int, size: int, stored: bytes) -> bytes:
    found = blake2b(_PART.pack(kind, compressed, size, len(stored), b""), digest_size=16)
    found.update(stored)
    return found.digest()


def _decode(data: bytes, kind: type[S]) -> S:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise BadArchive(f"has a part that cannot be read: {error}") from error
