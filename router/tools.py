"""The tools of `python -m eventstore` that need the fold: verify, and take a snapshot now.

To verify is to fold everything again and compare: from the log's beginning to the first snapshot,
from each snapshot to the next one, and from the last one to the head. Each stretch begins with what
a snapshot restores to, and has to end with what the next one says.
"""

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct, field

from eventstore import codec
from eventstore.archive import ArchiveReader
from eventstore.claims import Claims
from eventstore.errors import LogGap
from eventstore.events import AnyEvent, SnapshotTaken
from eventstore.log import EventLog, Extent, Record
from eventstore.marks import ReadingMarks
from eventstore.settings import VERSION
from eventstore.snapshots import (
    BadSnapshot,
    SnapshotGone,
    SnapshotRef,
    SnapshotStore,
    read_snapshot,
    unusable,
)
from eventstore.subjects import CONTROL_PRODUCER, subject
from router.fold import apply
from router.refold import fold_over_holes
from router.snapshot import restored, restoring, run_through
from router.snapshot_steps import Outcome, SnapshotTaker
from router.snapshotter import holder_name, in_thread
from router.state import RouterState

LISTED_MAX = 100
"""Unreadable records that are listed one by one; all of them are counted."""
TELL_EVERY = 1000
BEGINNING = "the beginning"

Progress = Callable[[int, int], object]
"""Told the seq reached and the one to reach, now and then."""


class Stretch(Struct, frozen=True, kw_only=True):
    """A part of the log that was folded in one go.

    begun_from: a snapshot's name, or BEGINNING. until: the snapshot at its end; None: the head.
    digest: that the fold gave. expected: that the snapshot says; None: nothing says.
    """

    begun_from: str
    until: str | None
    last_seq: int
    digest: str
    expected: str | None = None


class Verdict(Struct):
    """What was found. problems: everything that should not be, in words; empty if all is well.

    unreadable: how many events and messages; the first are in `problems`. anomalies: those that the
    fold counted up to the head, by kind. digest: of the state at the head, empty if unknown.
    """

    first_seq: int
    last_seq: int
    records: int = 0
    events: int = 0
    unreadable: int = 0
    digest: str = ""
    anomalies: dict[str, int] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note_stretch(self, stretch: Stretch) -> None:
        self.stretches.append(stretch)
        if stretch.expected not in (None, stretch.digest):
            self.problems.append(
                f"the fold from {stretch.begun_from} to record {stretch.last_seq} gives "
                f"{stretch.digest}, {stretch.until} says {stretch.expected}"
            )

    def note_record(self, record: Record, events: list[AnyEvent], readable: bool) -> None:
        self.records += 1
        self.events += len(events)
        if readable:
            return
        for each in codec.decode(record.data).unreadable:
            self.unreadable += 1
            if self.unreadable <= LISTED_MAX:
                where = "" if each.index < 0 else f", event {each.index}"
                self.problems.append(f"record {record.seq}{where} cannot be read: {each.reason}")

    def conclude(self, state: RouterState | None) -> None:
        if state is None:
            self.problems.append("there is nothing to fold the end of the log from")
        else:
            self.digest = state.digest()
            kinds = state.anomalies.__struct_fields__
            self.anomalies = {kind: getattr(state.anomalies, kind) for kind in kinds}


async def verify(
    log: EventLog, store: SnapshotStore, progress: Progress = lambda seq, of: None
) -> Verdict:
    """Fold the log again from everywhere that it can be folded from. Changes nothing.

    Raises LogUnavailable.
    """
    extent = await log.extent()
    verdict = Verdict(extent.first_seq, extent.last_seq)
    state = RouterState() if extent.first_seq == 1 else None
    whole = state is not None
    begun_from = BEGINNING
    for stop in (*await _usable(store, extent, verdict), None):
        end_seq = extent.last_seq if stop is None else stop.seq
        if state is not None and not await _fold(log, state, end_seq, verdict, progress):
            whole = False
        there = None if stop is None else await _restored(log, store, stop, extent, verdict)
        if state is not None and whole:
            verdict.note_stretch(
                Stretch(
                    begun_from=begun_from,
                    until=None if stop is None else stop.name,
                    last_seq=end_seq,
                    digest=state.digest(),
                    expected=None if there is None else there.digest(),
                )
            )
        if there is not None and stop is not None:
            state, whole, begun_from = there, True, stop.name
    verdict.conclude(state if whole else None)
    return verdict


async def _usable(store: SnapshotStore, extent: Extent, verdict: Verdict) -> list[SnapshotRef]:
    usable = []
    for ref in await store.refs():
        why = unusable(ref, extent)
        if why is None:
            usable.append(ref)
        else:
            verdict.problems.append(f"snapshot {ref.name} {why}")
    return usable


async def _fold(
    log: EventLog, state: RouterState, end_seq: int, verdict: Verdict, progress: Progress
) -> bool:
    """Whether no record was missing. Those that follow a hole are read all the same."""
    unreadable = state.anomalies.unreadable

    def applied(record: Record, events: list[AnyEvent]) -> None:
        nonlocal unreadable
        # A reset begins the count anew.
        verdict.note_record(record, events, state.anomalies.unreadable <= unreadable)
        unreadable = state.anomalies.unreadable

    def every() -> None:
        progress(state.cursor, verdict.last_seq)

    try:
        holes = await fold_over_holes(log, state, end_seq, every=every, applied=applied)
    except LogGap as gap:
        verdict.problems.append(f"the log is another one meanwhile: {gap}")
        return False
    verdict.problems += [f"records are missing: {hole}" for hole in holes]
    return not holes


async def _restored(
    log: EventLog, store: SnapshotStore, ref: SnapshotRef, extent: Extent, verdict: Verdict
) -> RouterState | None:
    """What the snapshot restores to; None, noted, if it cannot be used."""
    try:
        return run_through(restoring(await read_snapshot(log, store, ref, extent)))
    except (BadSnapshot, SnapshotGone) as error:
        verdict.problems.append(str(error))
        return None


def verify_archive(path: Path, progress: Progress = lambda seq, of: None) -> Verdict:
    """Read an archive twice: for the digests that were announced in it, and to fold it.

    Blocks. Raises BadArchive for a damaged one, OSError.
    """
    announced: dict[int, SnapshotTaken] = {}
    with path.open("rb") as file:
        reader = ArchiveReader(file)
        reader.snapshot()
        control = subject(reader.head.namespace, CONTROL_PRODUCER)
        for record in reader.records(reader.head.namespace):
            if record.subject == control:
                decoded = codec.decode(record.data)
                for event in decoded.batch.events if decoded.batch else ():
                    if isinstance(event, SnapshotTaken):
                        announced[event.seq] = event
    with path.open("rb") as file:
        return _fold_archive(ArchiveReader(file), announced, progress)


def _fold_archive(
    reader: ArchiveReader, announced: dict[int, SnapshotTaken], progress: Progress
) -> Verdict:
    head = reader.head
    verdict = Verdict(head.first_seq, head.last_seq)
    data = reader.snapshot()
    begun_from = BEGINNING
    state = RouterState(head.first_seq - 1)
    if data is not None and head.snapshot is not None:
        begun_from = head.snapshot
        try:
            state = restored(begun_from, data)
        except BadSnapshot as error:
            verdict.problems.append(str(error))
            return verdict
    for record in reader.records(head.namespace):
        unreadable = state.anomalies.unreadable
        events = apply(state, record)
        verdict.note_record(record, events, state.anomalies.unreadable <= unreadable)
        if record.seq in announced:
            taken = announced[record.seq]
            verdict.note_stretch(
                Stretch(
                    begun_from=begun_from,
                    until=taken.name,
                    last_seq=record.seq,
                    digest=state.digest(),
                    expected=taken.digest,
                )
            )
        if record.seq % TELL_EVERY == 0:
            progress(record.seq, head.last_seq)
    verdict.note_stretch(
        Stretch(begun_from=begun_from, until=None, last_seq=head.last_seq, digest=state.digest())
    )
    verdict.conclude(state)
    return verdict


async def take_snapshot(
    log: EventLog,
    namespace: str,
    store: SnapshotStore,
    claims: Claims,
    marks: ReadingMarks,
    *,
    kept: int,
    accept_loss: bool,
    progress: Progress = lambda seq, of: None,
) -> Outcome:
    """Take a snapshot now, whether or not one is due. Raises as `SnapshotTaker.run`."""
    taker = SnapshotTaker(
        log,
        namespace,
        store,
        claims,
        kept=kept,
        version=VERSION,
        marks=marks,
        progress=progress,
        offload=in_thread,
    )
    return await taker.run(holder_name(), accept_loss=accept_loss)
