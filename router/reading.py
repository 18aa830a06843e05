"""The reading mark of one replica: held while it catches up, renewed with its progress.

Nothing here stops the replica. Without its mark it can be overtaken by the trim, which it notices.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from eventstore.errors import LogUnavailable
from eventstore.marks import MARK_TTL_S, ReadingMarks

RENEW_S = MARK_TTL_S / 5
WRITE_S = 2.0
"""How long one attempt to write it may take."""
START_WAIT_S = 0.25
"""How long a start waits for its mark. A bucket that has to be made first may take longer, but then
nobody has taken a snapshot yet."""
HOLD_MAX_S = 600.0
"""So long, and no longer, somebody who is catching up holds the trim back."""

_log = logging.getLogger(__name__)


class ReadingMark:
    """Held from `hold` to `release`, for HOLD_MAX_S at most. `run` does all the writing."""

    def __init__(self, marks: ReadingMarks, reader: str) -> None:
        """reader: see `ReadingMarks.put`."""
        self._marks = marks
        self._reader = reader
        self._needed: Callable[[], int] | None = None
        """None while it is not held."""
        self._ends_s = 0.0
        self._is_written = False
        self._failing = False
        self._changed = asyncio.Event()
        self._tried = asyncio.Event()

    async def hold(self, needed: Callable[[], int]) -> None:
        """Have the mark written; who holds it already goes on holding it, no longer than before.

        needed: the seq from which on the log is needed, asked now and at every renewal. Returns
        once it is written, or could not be, and after START_WAIT_S at the latest.
        """
        if self._needed is None:
            self._ends_s = asyncio.get_running_loop().time() + HOLD_MAX_S
        self._needed = needed
        self._tried.clear()
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                await self._tried.wait()

    def release(self) -> None:
        """Nothing is needed any more. Safe to call twice."""
        if self._needed is not None:
            self._needed = None
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled. A mark that is held then expires."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._changed.wait()
            self._changed.clear()
            if self._needed is None:
                await self._remove()
            elif asyncio.get_running_loop().time() < self._ends_s:
                await self._write(self._needed())
            elif self._is_written:
                _log.warning("reading for %g s: the log may be trimmed from now on", HOLD_MAX_S)
                await self._remove()
            if not self._changed.is_set():
                self._tried.set()

    async def _write(self, seq: int) -> None:
        # Even without an answer it may be there.
        self._is_written = True
        try:
            async with asyncio.timeout(WRITE_S):
                await self._marks.put(self._reader, seq)
        except (LogUnavailable, TimeoutError) as error:
            if not self._failing:
                _log.warning("no reading mark, the log may be trimmed meanwhile: %r", error)
            self._failing = True
        else:
            self._failing = False

    async def _remove(self) -> None:
        if not self._is_written:
            return
        self._is_written = False
        # What cannot be removed expires.
        with contextlib.suppress(LogUnavailable, TimeoutError):
            async with asyncio.timeout(WRITE_S):
                await self._marks.remove(self._reader)
