"""`python -m eventstore tail`: the events of the log, one a line."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from msgspec import Struct

from eventstore.log import EventLog, Extent, Record
from eventstore.show import Selection, entries, formatter


class Range(Struct, frozen=True):
    """Which part of the log. Ends are included; None is open."""

    from_seq: int | None = None
    to_seq: int | None = None
    since_ns: int | None = None
    until_ns: int | None = None


class Printer:
    """Writes the lines of the wanted entries, and knows when there will be no more."""

    def __init__(
        self,
        write: Callable[[str], object],
        selection: Selection,
        within: Range,
        *,
        as_json: bool = False,
        limit: int | None = None,
    ) -> None:
        self.complete = limit == 0
        self._write = write
        self._selection = selection
        self._within = within
        self._format = formatter(as_json)
        self._left = limit

    def print(self, record: Record) -> None:
        within = self._within
        beyond_seq = within.to_seq is not None and record.seq > within.to_seq
        beyond_time = within.until_ns is not None and record.time_ns > within.until_ns
        if self.complete or beyond_seq or beyond_time:
            self.complete = True
            return
        if within.since_ns is not None and record.time_ns < within.since_ns:
            return
        if self._selection.takes_record(record):
            for entry in entries(record):
                if self._selection.takes(entry):
                    self._write(self._format(entry) + "\n")
                    if self._left is not None:
                        self._left -= 1
                        if self._left == 0:
                            self.complete = True
                            return
        self.complete = record.seq == within.to_seq


async def tail(log: EventLog, printer: Printer, within: Range, *, follow: bool) -> None:
    """Print what the log holds within `within`, and, if `follow`, what comes to it.

    Raises LogUnavailable, LogGap, and what writing raises.
    """
    start = await start_of(log, within)
    if not follow:
        async with aclosing(log.read(start, within.to_seq)) as records:  # type: ignore[type-var]
            async for record in records:
                printer.print(record)
                if printer.complete:
                    return
        return
    done = asyncio.Event()

    def handle(record: Record) -> None:
        printer.print(record)
        if printer.complete:
            done.set()

    if printer.complete:
        return
    following = await log.follow(start, handle)
    ended = asyncio.create_task(following.wait(), name="tail")
    finished = asyncio.create_task(done.wait(), name="tail limit")
    try:
        await asyncio.wait((ended, finished), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
    finally:
        for task in (ended, finished):
            task.cancel()
        await asyncio.gather(ended, finished, return_exceptions=True)
        await following.close()


async def start_of(log: EventLog, within: Range) -> int:
    """The seq to begin at. Raises LogUnavailable."""
    start = within.from_seq or 1
    if within.since_ns is None:
        return start
    return max(start, await seq_at(log, await log.extent(), within.since_ns))


async def seq_at(log: EventLog, extent: Extent, time_ns: int) -> int:
    """The first seq whose time is `time_ns` or later, one past the last if there is none.

    By bisection, so exact only as far as the log's clock never went back. Raises LogUnavailable.
    """
    low, high = extent.first_seq, extent.last_seq + 1
    while low < high:
        middle = (low + high) // 2
        found = [record async for record in log.read(middle, middle)]
        if found and found[0].time_ns >= time_ns:
            high = middle
        else:
            low = middle + 1
    return low
