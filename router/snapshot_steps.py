"""The steps of taking a snapshot, in the only order in which a crash between any two loses nothing.

    claim → load the newest one → fold the log up to its head → write → read back and verify
          → announce → delete those beyond the ones kept → trim the log to the oldest one kept,
            or to what a replica that is catching up still needs

Nothing is removed before what replaces it has been read back. What a crash leaves behind is either
complete, and then the next run finishes it, or not there for anyone. The claim saves work: two runs
at once would write the same bytes under the same names, and remove no more than one would.
"""

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from eventstore.claims import Claim, Claims
from eventstore.control import record_snapshot
from eventstore.errors import LogGap
from eventstore.log import EventLog, Extent
from eventstore.marks import Cut, ReadingMarks, cut_at
from eventstore.snapshots import (
    KEPT_MIN,
    BadSnapshot,
    HistoryLost,
    SnapshotGone,
    SnapshotRef,
    SnapshotStore,
    check_body,
    is_of_lost_records,
    life_of,
    name_of,
    read_header,
    read_snapshot,
    sort_out,
    trim_before,
    unpack,
    unusable,
)
from router.loading import SnapshotLoader
from router.refold import fold_over_holes, fold_to
from router.snapshot import restored, snapshot_of
from router.state import RouterState

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Offload(Protocol):
    """Does `work` and returns what it returns."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


async def do_here(work: Callable[[], T]) -> T:
    return work()


class Step(StrEnum):
    """What has just been done."""

    CLAIMED = "claimed"
    LOADED = "loaded"
    FOLDED = "folded"
    WRITTEN = "written"
    VERIFIED = "verified"
    ANNOUNCED = "announced"
    DELETED = "deleted"
    TRIMMED = "trimmed"


class Due(Struct, frozen=True):
    """When the next snapshot is due: the log holds more than so much after the newest one."""

    messages: int | None = None
    bytes: int | None = None

    def why(self, extent: Extent, newest_seq: int) -> str | None:
        """What it is due for; None if it is not due. newest_seq: 0 if there is no snapshot.

        The bytes after the newest are reckoned by the mean size of all messages in the log.
        """
        held = extent.last_seq - extent.first_seq + 1
        since = min(extent.last_seq - newest_seq, held)
        if since <= 0:
            return None
        if self.messages is not None and since > self.messages:
            return f"{since} messages since the last one"
        size = extent.bytes * since // held
        if self.bytes is not None and size > self.bytes:
            return f"{size} bytes since the last one"
        return None


class Bounds(Protocol):
    """The options that `due_of` looks at."""

    @property
    def router_snapshot_threshold(self) -> int | None: ...
    @property
    def router_snapshot_bytes(self) -> int | None: ...


def due_of(settings: Bounds) -> Due:
    return Due(settings.router_snapshot_threshold, settings.router_snapshot_bytes)


class Outcome(Struct, frozen=True):
    """What a run came to.

    taken: whether a new snapshot was made; else the newest was recent enough, and what had been
    left undone for it is done. name: empty if the log is empty and there is none. bytes: of the
    object, 0 if it was not made. first_seq: where the log begins now. held_back: why it was not
    trimmed to the oldest snapshot kept; empty if it was. The next run makes up for it.
    """

    taken: bool
    name: str = ""
    seq: int = 0
    digest: str = ""
    bytes: int = 0
    pairs: int = 0
    deleted: int = 0
    first_seq: int = 1
    held_back: str = ""


class SnapshotTaker:
    """Takes snapshots of one namespace. Its runs hold the claim one at a time."""

    def __init__(
        self,
        log: EventLog,
        namespace: str,
        store: SnapshotStore,
        claims: Claims,
        *,
        kept: int,
        version: str,
        marks: ReadingMarks | None = None,
        reached: Callable[[Step], None] = lambda step: None,
        progress: Callable[[int, int], object] = lambda cursor, end: None,
        offload: Offload = do_here,
    ) -> None:
        """kept: snapshots that stay, at least KEPT_MIN. version: of the code. marks: of
        the replicas; None: they have none.

        reached: called after each step. progress: called now and then while the log is folded, with
        the seq reached and the one to reach. offload: does a work of many seconds elsewhere, so
        that the claim is renewed meanwhile.
        """
        if kept < KEPT_MIN:
            raise ValueError(f"at least {KEPT_MIN} snapshots must be kept, not {kept}")
        self._log = log
        self._namespace = namespace
        self._store = store
        self._claims = claims
        self._kept = kept
        self._version = version
        self._marks = marks
        self._reached = reached
        self._progress = progress
        self._offload = offload

    async def run(
        self, holder: str, *, due: Due | None = None, accept_loss: bool = False
    ) -> Outcome:
        """Take a snapshot of the log as it is now.

        holder: who takes it; a name of its own for each run. due: do it only if it is due; None:
        whenever there are new records. accept_loss: also if records are lost, at the
        log's beginning or in its middle.
        Raises ClaimTaken, ClaimLost, HistoryLost, LogGap, LogUnavailable, and BadSnapshot if what
        is read back is not what was written; nothing is removed then.
        """
        claim = await self._claims.take(holder)
        try:
            self._reached(Step.CLAIMED)
            return await self._run(claim, due, accept_loss)
        finally:
            await claim.release()

    async def _run(self, claim: Claim, due: Due | None, accept_loss: bool) -> Outcome:
        extent = await self._log.extent()
        left = await self._store.sweep()
        if left:
            _log.info("removed what %d unfinished snapshots had left", left)
        outcome = await self._recent_enough(extent, due)
        if outcome is None:
            outcome = await self._take(claim, extent, accept_loss)
        if not outcome.name:
            return outcome
        ref = SnapshotRef(outcome.name, life_of(extent.identity), outcome.seq)
        claim.check()
        await self._check_same_log(extent, outcome.seq)
        await record_snapshot(self._log, self._namespace, ref, outcome.digest)
        self._reached(Step.ANNOUNCED)
        return await self._clean(claim, extent, outcome)

    async def _recent_enough(self, extent: Extent, due: Due | None) -> Outcome | None:
        """The newest snapshot, if there is any, where no new one is due; None where one is."""
        usable = [ref for ref in await self._store.refs() if unusable(ref, extent) is None]
        for ref in reversed(usable):
            if _is_due(due, extent, ref.seq):
                return None
            try:
                snapshot = await read_snapshot(self._log, self._store, ref, extent)
                check_body(snapshot)
            except (BadSnapshot, SnapshotGone):
                continue
            return Outcome(taken=False, name=ref.name, seq=ref.seq, digest=snapshot.header.digest)
        return None if _is_due(due, extent, 0) else Outcome(taken=False)

    async def _take(self, claim: Claim, extent: Extent, accept_loss: bool) -> Outcome:
        outcome, data = await self._fold(claim, extent, accept_loss)
        claim.check()
        await self._store.write(outcome.name, data)
        self._reached(Step.WRITTEN)
        await self._verify(outcome.name, outcome.digest)
        self._reached(Step.VERIFIED)
        return outcome

    async def _fold(self, claim: Claim, extent: Extent, accept_loss: bool) -> tuple[Outcome, bytes]:
        """The snapshot of the log up to the end of `extent`. The state does not outlive this call:
        verifying makes another one."""
        loaded = await SnapshotLoader(self._log, self._store).load()
        if loaded is not None:
            state, from_seq = loaded.state, loaded.header.from_seq
        elif extent.first_seq > 1 and not accept_loss:
            raise HistoryLost(extent.first_seq)
        else:
            state, from_seq = RouterState(extent.first_seq - 1), extent.first_seq
        self._reached(Step.LOADED)

        def every() -> None:
            claim.check()
            self._progress(state.cursor, extent.last_seq)

        if accept_loss:
            holes = await fold_over_holes(self._log, state, extent.last_seq, every=every)
            if holes:
                from_seq = holes[-1].got
        else:
            await fold_to(self._log, state, extent.last_seq, every=every)
        self._reached(Step.FOLDED)
        data = await self._offload(
            lambda: snapshot_of(
                state, identity=extent.identity, version=self._version, from_seq=from_seq
            )
        )
        outcome = Outcome(
            taken=True,
            name=name_of(extent.identity, extent.last_seq),
            seq=extent.last_seq,
            digest=state.digest(),
            bytes=len(data),
            pairs=state.tree.pair_count,
        )
        return outcome, data

    async def _verify(self, name: str, digest: str) -> None:
        """Read the snapshot back. One that cannot be restored is removed, and BadSnapshot raised.

        Restoring compares the state with the header, which is compared with `digest` here.
        """
        try:
            data = await self._store.read(name)
            if unpack(name, data).header.digest != digest:
                raise BadSnapshot(name, "came back as another")
            await self._offload(lambda: restored(name, data))
        except BadSnapshot:
            await self._store.delete(name)
            raise

    async def _clean(self, claim: Claim, extent: Extent, outcome: Outcome) -> Outcome:
        """Delete what is beyond the snapshots kept, then trim the log to the oldest of those."""
        claim.check()
        now = await self._check_same_log(extent, outcome.seq)
        refs = await self._store.refs()
        lost = await self._of_lost_records(refs, now)
        kept, dropped = sort_out([ref for ref in refs if ref not in lost], now, self._kept)
        dropped += lost
        for ref in dropped:
            await self._store.delete(ref.name)
        self._reached(Step.DELETED)
        cut = Cut(now.first_seq)
        if outcome.name in {ref.name for ref in kept}:
            cut = await self._cut(now, trim_before(kept))
        if cut.before_seq > now.first_seq:
            claim.check()
            await self._check_same_log(extent, outcome.seq)
            await self._log.trim(cut.before_seq)
        self._reached(Step.TRIMMED)
        return replace(
            outcome,
            deleted=len(dropped),
            first_seq=max(now.first_seq, cut.before_seq),
            held_back=cut.held_back,
        )

    async def _cut(self, now: Extent, before_seq: int) -> Cut:
        """Only after the deletions: see `eventstore.marks`."""
        if self._marks is None or before_seq <= now.first_seq:
            return Cut(before_seq)
        return await cut_at(self._marks, now, before_seq)

    async def _of_lost_records(self, refs: list[SnapshotRef], extent: Extent) -> list[SnapshotRef]:
        """Those that no replica can start from, though their names fit: they must not be counted
        among the kept ones. Our own may be one of them: the log may have lost its tail, and grown
        again, while we worked."""
        lost = []
        for ref in refs:
            if unusable(ref, extent) is None:
                try:
                    header = await read_header(self._store, ref)
                except (BadSnapshot, SnapshotGone):
                    continue
                if await is_of_lost_records(self._log, header):
                    lost.append(ref)
        return lost

    async def _check_same_log(self, extent: Extent, seq: int) -> Extent:
        """The log's extent now. LogGap if it was made anew, or cut short, while we worked: what we
        know then is of another log."""
        now = await self._log.extent()
        if now.identity != extent.identity or now.last_seq < seq:
            raise LogGap(seq + 1, now.last_seq + 1)
        return now


def _is_due(due: Due | None, extent: Extent, newest_seq: int) -> bool:
    if due is None:
        return newest_seq < extent.last_seq
    return due.why(extent, newest_seq) is not None
