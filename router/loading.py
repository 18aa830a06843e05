"""Loads the newest usable snapshot: the beginning of every start and recovery.

What a replica does with it is the rest: follow the log from the next record on. Its reading mark
keeps that record from being trimmed meanwhile. Without one the replica finds a gap and loads again,
and then there is a newer snapshot: the log is only ever trimmed up to one. So every repetition
begins further on than the last.
"""

import asyncio
import logging

from msgspec import Struct

from eventstore.errors import LogUnavailable
from eventstore.log import EventLog, Extent
from eventstore.snapshots import (
    BadSnapshot,
    HistoryLost,
    SnapshotGone,
    SnapshotHeader,
    SnapshotRef,
    SnapshotStore,
    read_snapshot,
    unusable,
)
from router.snapshot import restoring
from router.state import RouterState

LISTS_MAX = 3
"""How often the list is read again because all snapshots of the last one were deleted meanwhile."""

_log = logging.getLogger(__name__)


class Loaded(Struct, frozen=True):
    """A snapshot and what it restored to. bytes: of the object."""

    name: str
    header: SnapshotHeader
    bytes: int
    state: RouterState


class LoadReport(Struct, frozen=True):
    """What the last loading came to.

    name, seq, bytes: of the snapshot that was used; None and 0 if there was none.
    skipped: name → why it could not be used, the newest first.
    incomplete: the state lacks the log's beginning, which is gone and was in no usable snapshot.
    """

    name: str | None = None
    seq: int = 0
    bytes: int = 0
    skipped: dict[str, str] = {}
    incomplete: bool = False


class SnapshotLoader:
    """Loads from `store` what fits to `log`. May be used again and again."""

    def __init__(self, log: EventLog, store: SnapshotStore) -> None:
        self._log = log
        self._store = store
        self.report = LoadReport()
        """Of the last `load`, also while it is going on."""

    async def load(self) -> Loaded | None:
        """The newest usable snapshot, restored; None if there is none.

        Raises LogUnavailable. Others on the event loop get their turn every few milliseconds.
        """
        for _ in range(LISTS_MAX):
            extent = await self._log.extent()
            skipped: dict[str, str] = {}
            gone = False
            for ref in reversed(await self._store.refs()):
                try:
                    loaded = await self._load(ref, extent)
                except SnapshotGone:
                    gone = True
                except BadSnapshot as bad:
                    _log.warning("snapshot skipped name=%s: %s", bad.name, bad.why)
                    skipped[bad.name] = bad.why
                else:
                    incomplete = loaded.header.from_seq > 1
                    self.report = LoadReport(
                        loaded.name, ref.seq, loaded.bytes, skipped, incomplete
                    )
                    return loaded
                self.report = LoadReport(skipped=skipped)
            if not gone:
                incomplete = extent.first_seq > 1
                if incomplete:
                    _log.error("%s", HistoryLost(extent.first_seq))
                self.report = LoadReport(skipped=skipped, incomplete=incomplete)
                return None
        raise LogUnavailable("snapshots are deleted faster than they can be read")

    async def _load(self, ref: SnapshotRef, extent: Extent) -> Loaded:
        """Raises SnapshotGone, BadSnapshot."""
        why = unusable(ref, extent)
        if why is not None:
            raise BadSnapshot(ref.name, why)
        snapshot = await read_snapshot(self._log, self._store, ref, extent)
        steps = restoring(snapshot)
        while True:
            try:
                next(steps)
            except StopIteration as restored:
                state: RouterState = restored.value
                break
            # By steps and not by time, so that a simulation gives the same run every time.
            await asyncio.sleep(0)
        _log.info("snapshot loaded name=%s pairs=%d", ref.name, state.tree.pair_count)
        return Loaded(ref.name, snapshot.header, len(snapshot.body), state)
