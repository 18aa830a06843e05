"""Reading marks: what the replicas that are catching up still need of the log.

A replica keeps one from before it chooses its snapshot until it has passed the head that it saw
then. Whoever trims the log deletes old snapshots first, then looks at the marks, and cuts no
further than the lowest. So a replica whose mark came too late to be seen, but before its choice,
cannot choose a snapshot that the cut leaves behind: none of those is in the list any more.

A mark saves the work of beginning again and is not what safety rests on: a replica notices a gap,
and loads a newer snapshot. So a mark that is not written, or not soon, stops nobody, and what marks
hold back is bounded, however many replicas start and die.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from eventstore.claims import CLAIM_TTL_S
from eventstore.errors import LogUnavailable
from eventstore.log import Extent

MARK_TTL_S = CLAIM_TTL_S
"""How long a mark holds the log back after its holder died."""
MARKS_MAX = 256
"""So many are looked at; where there are more, they count as unreadable."""
HELD_BYTES_MAX = 1024**3
"""What the log keeps for the marks, at most, beyond what its snapshots keep. Past that it is
trimmed all the same, also where the marks cannot be read."""


class ReadingMarks(Protocol):
    """The marks of one namespace. Every method raises LogUnavailable."""

    async def put(self, reader: str, seq: int) -> None:
        """Needs the log from `seq` on, for MARK_TTL_S from now. In the place of the reader's last.

        reader: a name that nobody else uses, of letters, digits and `-`.
        """

    async def remove(self, reader: str) -> None:
        """The reader needs nothing any more."""

    async def lowest(self) -> int | None:
        """The lowest seq of all; None if there are no marks. LogUnavailable also if there are more
        than MARKS_MAX."""


class MemoryMarks(ReadingMarks):
    """Marks in memory, for tests and simulations."""

    def __init__(self, now_s: Callable[[], float], ttl_s: float = MARK_TTL_S) -> None:
        self._now_s = now_s
        self._ttl_s = ttl_s
        self._held: dict[str, tuple[int, float]] = {}
        """Reader → seq, and when the mark ends."""

    async def put(self, reader: str, seq: int) -> None:
        self._held[reader] = seq, self._now_s() + self._ttl_s

    async def remove(self, reader: str) -> None:
        self._held.pop(reader, None)

    async def lowest(self) -> int | None:
        seqs = [seq for seq, ends_s in self._held.values() if ends_s > self._now_s()]
        if len(seqs) > MARKS_MAX:
            raise too_many(len(seqs))
        return min(seqs, default=None)


def too_many(count: int) -> LogUnavailable:
    return LogUnavailable(f"{count} reading marks, and no more than {MARKS_MAX} are looked at")


class Cut(NamedTuple):
    """Where to trim. held_back: why not as far as asked for; empty if so far."""

    before_seq: int
    held_back: str = ""


async def cut_at(marks: ReadingMarks, extent: Extent, before_seq: int) -> Cut:
    """Where the log may be cut by the marks, if its snapshots let it be cut at `before_seq`.

    Never beyond `before_seq`, nor before the log's beginning. Not at all where the marks cannot be
    read: trimming is not urgent. Either only up to HELD_BYTES_MAX, by the mean size of all records.
    """
    try:
        lowest = await marks.lowest()
    except LogUnavailable as error:
        cut = Cut(extent.first_seq, f"the reading marks cannot be read: {error}")
    else:
        if lowest is None or lowest >= before_seq:
            return Cut(before_seq)
        cut = Cut(max(extent.first_seq, lowest), f"a replica still reads at record {lowest}")
    records = extent.last_seq - extent.first_seq + 1
    held = before_seq - cut.before_seq
    if held <= 0 or extent.bytes * held > HELD_BYTES_MAX * records:
        return Cut(before_seq)
    return cut
