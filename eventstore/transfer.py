"""A log to an archive and back: `export` and `import`.

What comes back is the same log but for two things: its identity, and the times of its records,
which the server gives anew. Order and numbering stay, so snapshots and decisions that name a seq
still mean the same record. A fold of both differs in what begins or ends by the log's clock:
sessions, pins, beliefs, and when thresholds were set. The archive itself has the times: `verify
FILE` tells the digest of the log that it came from.
"""

import asyncio
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from eventstore.archive import ArchiveHead, ArchiveReader, ArchiveWriter
from eventstore.connect import Nats
from eventstore.errors import EventStoreError, LogGap
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog, Extent
from eventstore.snapshots import (
    BadSnapshot,
    HistoryLost,
    Snapshot,
    SnapshotGone,
    SnapshotStore,
    check_body,
    name_of,
    pack_header,
    read_snapshot,
    unpack,
    unusable,
)
from eventstore.subjects import stream_name

WINDOW = 256
"""Records on their way to the log at a time."""


class NotEmpty(EventStoreError):
    """An archive goes into an empty namespace only."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.namespace = namespace

    def __str__(self) -> str:
        return f"the namespace {self.namespace} has a log already; import into a new one"


class ImportStopped(EventStoreError):
    """The log did not take the records as they are."""

    def __init__(self, namespace: str, seq: int, got: int) -> None:
        super().__init__(namespace, seq, got)
        self.namespace = namespace
        self.seq = seq
        self.got = got

    def __str__(self) -> str:
        return (
            f"record {self.seq} came to be {self.got} in {self.namespace}: somebody else writes "
            "there; import into a new one"
        )


class Transferred(Struct, frozen=True):
    """bytes: of the file. snapshot: the name it has in the log; None if there is none."""

    snapshot: str | None
    first_seq: int
    last_seq: int
    records: int
    bytes: int


async def export_log(
    log: EventLog,
    store: SnapshotStore,
    namespace: str,
    path: Path,
    *,
    whole: bool,
    now_ns: int,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Transferred:
    """Write the newest usable snapshot, or the log's beginning, and all records after it.

    whole: begin as early as the log and its snapshots allow. progress: told of records, now and
    then. The file appears under its name once it is complete. Raises HistoryLost, LogGap if the log
    is trimmed meanwhile, LogUnavailable, OSError.
    """
    extent = await log.extent()
    base = await _base(log, store, extent, whole)
    first_seq = extent.first_seq if base is None else base.header.seq + 1
    data = b"" if base is None else pack_header(base.header) + base.body
    head = ArchiveHead(
        namespace=namespace,
        identity=extent.identity,
        first_seq=first_seq,
        last_seq=extent.last_seq,
        snapshot=None if base is None else base.name,
        snapshot_bytes=len(data),
        time_ns=now_ns,
    )
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            writer = ArchiveWriter(file, head)
            writer.snapshot(data)
            del data
            seq = first_seq
            async for record in log.read(first_seq, extent.last_seq):
                if record.seq != seq:
                    raise LogGap(seq, record.seq)
                seq += 1
                writer.add(record)
                if writer.records % 1000 == 0:
                    progress(writer.records, extent.last_seq - first_seq + 1)
            if seq != extent.last_seq + 1:
                raise LogGap(seq, extent.last_seq + 1)
            writer.end()
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return Transferred(head.snapshot, first_seq, extent.last_seq, writer.records, writer.bytes)


async def _base(
    log: EventLog, store: SnapshotStore, extent: Extent, whole: bool
) -> Snapshot | None:
    """What an archive begins with; None: the log's first record. Raises HistoryLost."""
    if whole and extent.first_seq == 1:
        return None
    usable = [ref for ref in await store.refs() if unusable(ref, extent) is None]
    for ref in usable if whole else reversed(usable):
        try:
            snapshot = await read_snapshot(log, store, ref, extent)
            check_body(snapshot)
        except (BadSnapshot, SnapshotGone):
            continue
        return snapshot
    if extent.first_seq > 1:
        raise HistoryLost(extent.first_seq)
    return None


async def import_archive(
    nats: Nats,
    store: SnapshotStore,
    namespace: str,
    reader: ArchiveReader,
    *,
    replicas: int | None = None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Transferred:
    """Make the log of `namespace` from an archive. replicas: see `eventstore.replicas`.

    If it fails in between, the namespace holds the beginning of the archive, and nothing else.
    Raises NotEmpty, ImportStopped, BadArchive, BadSnapshot, MessageTooLarge, LogUnavailable.
    """
    head = reader.head
    log = await JetStreamLog.open(nats, namespace, replicas=replicas)
    try:
        extent = await log.extent()
        if (extent.first_seq, extent.last_seq) != (1, 0):
            raise NotEmpty(namespace)
        data = reader.snapshot()
        if head.first_seq > 1:
            await _begin_at(nats, namespace, head.first_seq)
        name = None
        if data is not None:
            name = await _store_snapshot(store, head.snapshot or "", data, extent.identity)
            del data
        count = await _append_all(log, namespace, reader, progress)
    finally:
        await log.close()
    return Transferred(name, head.first_seq, head.last_seq, count, 0)


class _Purged(Struct, frozen=True):
    success: bool


async def _begin_at(nats: Nats, namespace: str, seq: int) -> None:
    """Let an empty stream go on with `seq`: purging beyond the end moves its numbering."""
    await nats.api(f"STREAM.PURGE.{stream_name(namespace)}", {"seq": seq}, _Purged)


async def _store_snapshot(store: SnapshotStore, name: str, data: bytes, identity: str) -> str:
    """The same snapshot as one of the log `identity`; returns its name there."""
    snapshot = unpack(name, data)
    check_body(snapshot)
    header = replace(snapshot.header, identity=identity)
    moved = name_of(identity, header.seq)
    await store.write(moved, pack_header(header) + snapshot.body)
    return moved


async def _append_all(
    log: EventLog, namespace: str, reader: ArchiveReader, progress: Callable[[int, int], object]
) -> int:
    done, total = 0, reader.head.last_seq - reader.head.first_seq + 1
    records = reader.records(namespace)
    while window := list(islice(records, WINDOW)):
        # Sent in order over one connection, so the log has them in order; the seqs prove it.
        appended = await asyncio.gather(
            *(log.append(r.subject, r.data, msg_id=f"import.{r.seq}") for r in window)
        )
        for record, each in zip(window, appended, strict=True):
            if each.seq != record.seq:
                raise ImportStopped(namespace, record.seq, each.seq)
        done += len(window)
        progress(done, total)
    return done
