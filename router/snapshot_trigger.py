"""Has a snapshot taken when one is due: every frontend looks, now and then, and one of them acts.

What there is, is read from the log and the store each time and not remembered, so a log made anew,
a snapshot deleted by hand or one taken by somebody else need no thought.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from msgspec import Struct

from eventstore.claims import Claims, ClaimTaken
from eventstore.errors import EventStoreError, LogUnavailable
from eventstore.log import EventLog
from eventstore.snapshots import (
    BadSnapshot,
    SnapshotGone,
    SnapshotHeader,
    SnapshotRef,
    SnapshotStore,
    read_header,
    unusable,
)
from router.snapshot_steps import Due, Outcome

LOOK_S = 5.0
BACK_OFF_MIN_S = 10.0
BACK_OFF_MAX_S = 600.0

_log = logging.getLogger(__name__)


class Snapshots(Struct, frozen=True):
    """What a frontend needs for snapshots. take: takes one, in a process of its own.

    take raises ClaimTaken, or another EventStoreError for whatever went wrong.
    """

    store: SnapshotStore
    claims: Claims
    take: Callable[[], Awaitable[Outcome]]


class SnapshotTrigger:
    """One frontend's. Runs until cancelled; a failure is followed by a pause, doubled each time."""

    def __init__(
        self,
        log: EventLog,
        snapshots: Snapshots,
        due: Due,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """jitter: uniform in [0, 1)."""
        self.newest: SnapshotHeader | None = None
        """The newest usable snapshot, as far as its header can be read."""
        self.outcomes: Counter[str] = Counter()
        """Runs that this frontend started: taken, finished (what another had left), elsewhere (the
        claim was held) and failed."""
        self.trouble: str | None = None
        """Why the last run failed; None after one that did not."""
        self._log = log
        self._snapshots = snapshots
        self._due = due
        self._jitter = jitter
        self._failures = 0
        self._not_before_s = 0.0
        self._read: SnapshotRef | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S * (0.8 + 0.4 * self._jitter()))
            try:
                await self.look(loop.time())
            except LogUnavailable as error:
                _log.debug("cannot tell whether a snapshot is due: %s", error)

    async def look(self, now_s: float) -> None:
        """Have a snapshot taken if it is due, nobody is at it and the last failure is long ago.

        now_s: by a clock that does not go back. Raises LogUnavailable.
        """
        extent = await self._log.extent()
        refs = await self._snapshots.store.refs()
        usable = [ref for ref in refs if unusable(ref, extent) is None]
        await self._note_newest(usable[-1] if usable else None)
        why = self._due.why(extent, usable[-1].seq if usable else 0)
        if why is None or now_s < self._not_before_s:
            return
        if await self._snapshots.claims.holder() is None:
            _log.info("a snapshot is due: %s", why)
            await self._take(now_s)

    async def _take(self, now_s: float) -> None:
        try:
            outcome = await self._snapshots.take()
        except ClaimTaken as taken:
            self.outcomes["elsewhere"] += 1
            _log.info("the snapshot is taken by %s", taken.holder)
        except EventStoreError as error:
            self.outcomes["failed"] += 1
            self.trouble = str(error)
            pause_s = min(BACK_OFF_MAX_S, BACK_OFF_MIN_S * 2**self._failures)
            self._failures += 1
            self._not_before_s = now_s + pause_s * (0.5 + self._jitter() / 2)
            _log.error("snapshot failed, next attempt in %.0f s at most: %s", pause_s, error)
        else:
            self.outcomes["taken" if outcome.taken else "finished"] += 1
            self.trouble = None
            self._failures = 0
            _log.info(
                "snapshot %s name=%s pairs=%d bytes=%d digest=%s; the log begins at record %d",
                "taken" if outcome.taken else "finished",
                outcome.name,
                outcome.pairs,
                outcome.bytes,
                outcome.digest,
                outcome.first_seq,
            )
            if outcome.held_back:
                _log.info("the log is trimmed later: %s", outcome.held_back)

    async def _note_newest(self, ref: SnapshotRef | None) -> None:
        if ref == self._read:
            return
        header = None
        if ref is not None:
            try:
                header = await read_header(self._snapshots.store, ref)
            except (BadSnapshot, SnapshotGone) as error:
                _log.warning("%s", error)
        self.newest, self._read = header, ref
