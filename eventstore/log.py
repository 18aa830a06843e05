"""The log as its users see it: append, read, follow, extent, trim.

Two implementations pass one contract suite (`tests/log_contract.py`): `jetstream.py`, the real one,
and `memory.py`, the model of it that tests and simulations use. A record is stored bytes with the
position and time that the log gave it; `eventstore.codec` reads the bytes.
"""

from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """One message of the log. `time_ns`: the log's own clock, UTC nanoseconds."""

    seq: int
    time_ns: int
    subject: str
    data: bytes


class Appended(NamedTuple):
    """`seq` of the record; `duplicate` if the log already had this `msg_id` there."""

    seq: int
    duplicate: bool


class Extent(NamedTuple):
    """What the log holds now: records `first_seq … last_seq` (last = first - 1: none).

    identity: tells one life of the stream from another, so that a re-created one is noticed.
    """

    identity: str
    first_seq: int
    last_seq: int
    bytes: int


class Following(Protocol):
    """A running `follow`."""

    async def wait(self) -> None:
        """Return after `close`; raise what ended the following otherwise."""

    async def close(self) -> None:
        """Stop; `handle` is not called again. Safe to call twice."""


class EventLog(Protocol):
    """One append-only stream per namespace, totally ordered by `seq` from 1."""

    @property
    def max_message_bytes(self) -> int:
        """The largest `data` that `append` takes."""

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        """Add one record and return once the log has it.

        msg_id: a repeat within the log's window (2 minutes) adds nothing and returns the first seq.
        expected_subject_seq: append only if the last record on `subject` has this seq (0: none).
        Raises LogUnavailable (unknown whether appended: retry with the same msg_id), SeqConflict,
        MessageTooLarge.
        """

    def read(self, start_seq: int, end_seq: int | None = None) -> AsyncIterator[Record]:
        """Records `start_seq … end_seq` in order, then stop (None: to the last one at the call).

        What was trimmed is left out silently: compare `seq`. Raises LogUnavailable.
        """

    async def follow(self, start_seq: int, handle: Callable[[Record], None]) -> Following:
        """Call `handle` for every record from `start_seq` on, in order, for as long as it runs.

        Trimmed records are left out silently: compare `seq`. `handle` runs on the event loop in
        slices of a few milliseconds; what it raises ends the following and comes out of `wait`.
        Raises LogGap for a start beyond the end of the log plus one; so does `wait` when the log
        was made anew or lost its tail, and what was read is not its history any more.
        """

    async def extent(self) -> Extent:
        """Where the log begins and ends now. Raises LogUnavailable."""

    async def trim(self, before_seq: int) -> None:
        """Remove all records below `before_seq`; that record itself stays."""

    async def close(self) -> None:
        """Release what the log holds open. Safe to call twice."""
