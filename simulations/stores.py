"""Snapshots, claims and reading marks as processes meet them: over the same link as the log."""

from collections.abc import Callable

from eventstore.claims import CLAIM_TTL_S, Claim, ClaimLost, Claims, MemoryClaims
from eventstore.marks import MemoryMarks, ReadingMarks
from eventstore.snapshots import (
    SNAPSHOT_BYTES_MAX,
    MemorySnapshots,
    SnapshotRef,
    SnapshotStore,
)
from simulations.faults import FaultyLog, at_once


class StoreLink(SnapshotStore):
    """One process's way to the snapshots."""

    def __init__(self, store: MemorySnapshots, link: FaultyLog) -> None:
        self._store = store
        self._link = link

    async def refs(self) -> list[SnapshotRef]:
        return await self._link.ask("a list", lambda: at_once(self._store.refs()))

    async def read(self, name: str, first_bytes: int = SNAPSHOT_BYTES_MAX) -> bytes:
        return await self._link.ask("a read", lambda: at_once(self._store.read(name, first_bytes)))

    async def write(self, name: str, data: bytes) -> None:
        await self._link.ask("a write", lambda: at_once(self._store.write(name, data)), lossy=True)

    async def delete(self, name: str) -> None:
        await self._link.ask("a delete", lambda: at_once(self._store.delete(name)), lossy=True)

    async def sweep(self) -> int:
        return await self._link.ask("a sweep", lambda: at_once(self._store.sweep()))


class ClaimsLink(Claims):
    """One process's way to a claim."""

    def __init__(self, claims: MemoryClaims, link: FaultyLog) -> None:
        self._claims = claims
        self._link = link

    async def holder(self) -> str | None:
        return await self._link.ask("a claim's holder", lambda: at_once(self._claims.holder()))

    async def take(self, holder: str) -> Claim:
        claim = await self._link.ask("a claim", lambda: at_once(self._claims.take(holder)))
        return _LinkedClaim(claim, self._link, self._claims.now_s)


class _LinkedClaim(Claim):
    """Is renewed at every check that finds the link open, and ends by itself without."""

    def __init__(self, claim: Claim, link: FaultyLog, now_s: Callable[[], float]) -> None:
        self._claim = claim
        self._link = link
        self._now_s = now_s
        self._ends_s = now_s() + CLAIM_TTL_S

    def check(self) -> None:
        if self._link.is_open:
            self._claim.check()
            self._ends_s = self._now_s() + CLAIM_TTL_S
        elif self._now_s() >= self._ends_s:
            raise ClaimLost("in memory")

    async def release(self) -> None:
        if self._link.is_open:
            await self._claim.release()


class MarksLink(ReadingMarks):
    """One process's way to the reading marks."""

    def __init__(self, marks: MemoryMarks, link: FaultyLog) -> None:
        self._marks = marks
        self._link = link

    async def put(self, reader: str, seq: int) -> None:
        await self._link.ask("a mark", lambda: at_once(self._marks.put(reader, seq)), lossy=True)

    async def remove(self, reader: str) -> None:
        await self._link.ask("an unmark", lambda: at_once(self._marks.remove(reader)), lossy=True)

    async def lowest(self) -> int | None:
        return await self._link.ask("the marks", lambda: at_once(self._marks.lowest()))
