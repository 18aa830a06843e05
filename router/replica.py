"""Keeps one `RouterState` at the head of the log.

Recovery, restart and normal running are one path: read from a position, apply, go on for ever. A
following that breaks is taken up again after the last applied record; one that shows missing
records throws the state away and reads again from where the log now begins.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct

from eventstore.errors import LogGap, LogUnavailable
from eventstore.events import AnyEvent, Event
from eventstore.log import EventLog, Record
from router.fold import apply
from router.state import RouterState

HEAD_POLL_S = 1.0
RETRY_MAX_S = 5.0

_log = logging.getLogger(__name__)


class ReplicaPhase(StrEnum):
    STARTING = "starting"
    """The log has not been reached yet."""
    CATCHING_UP = "catching_up"
    """Reading towards the head seen at the start; decisions would lack facts."""
    READY = "ready"
    DEGRADED = "degraded"
    """Ready, but the log can't be reached: serving from the state at hand."""


class ReplicaStatus(Struct, frozen=True):
    """Where a replica stands. `lag_s`: age of the last applied record while behind, else 0."""

    phase: ReplicaPhase
    why: str | None
    cursor: int
    head: int
    lag_records: int
    lag_s: float
    digest: str


class Replica:
    """`state`, and the task that moves it. `observe` sees every applied record's events."""

    def __init__(
        self,
        log: EventLog,
        now_ns: Callable[[], int],
        observe: Callable[[list[AnyEvent]], None] = lambda events: None,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        """now_ns: UTC nanoseconds, for the lag only. restarted: the state was thrown away."""
        self.state = RouterState()
        self.applied: Counter[type[Event]] = Counter()
        self.restarts = 0
        self._log = log
        self._now_ns = now_ns
        self._observe = observe
        self._restarted = restarted
        self._head = 0
        self._target: int | None = None
        self._trouble: str | None = None
        self._ready = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether the state has passed the head seen at the start."""
        return self._ready.is_set()

    @property
    def head(self) -> int:
        """The last known end of the log."""
        return max(self._head, self.state.cursor)

    async def wait_ready(self) -> None:
        await self._ready.wait()

    def status(self) -> ReplicaStatus:
        cursor, head = self.state.cursor, self.head
        lag_s = 0.0 if head <= cursor else max(0, self._now_ns() - self.state.time_ns) / 1e9
        why = self._trouble
        if self._target is None:
            phase, why = ReplicaPhase.STARTING, why or "waiting for the log"
        elif not self.is_ready:
            phase = ReplicaPhase.CATCHING_UP
        else:
            phase = ReplicaPhase.READY if why is None else ReplicaPhase.DEGRADED
        return ReplicaStatus(phase, why, cursor, head, head - cursor, lag_s, self.state.digest())

    def applied_by_tag(self) -> dict[str, int]:
        return {str(kind.__struct_config__.tag): n for kind, n in self.applied.items()}

    async def run(self) -> None:
        """Follow the log until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_for_ever(), name="replica-follow")
            tasks.create_task(self._watch_head(), name="replica-head")

    async def _follow_for_ever(self) -> None:
        delay_s = 0.1
        while True:
            try:
                await self._follow_once()
                return
            except LogGap as gap:
                _log.warning("state thrown away, reading the log again: %s", gap)
                self._start_again()
            except LogUnavailable as error:
                self._trouble = str(error)
                _log.warning("log not readable, trying again: %s", error)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    async def _follow_once(self) -> None:
        extent = await self._log.extent()
        self._head = extent.last_seq
        if self.state.cursor == 0:
            # Nothing older exists, so nothing older can be known.
            self.state.cursor = extent.first_seq - 1
        if self._target is None:
            self._target = extent.last_seq
        self._trouble = None
        self._check_ready()
        following = await self._log.follow(self.state.cursor + 1, self._handle)
        try:
            await following.wait()
        finally:
            await following.close()

    def _handle(self, record: Record) -> None:
        events = apply(self.state, record)
        for event in events:
            self.applied[type(event)] += 1
        self._observe(events)
        if not self._ready.is_set():
            self._check_ready()

    def _check_ready(self) -> None:
        if self._target is not None and self.state.cursor >= self._target:
            if not self._ready.is_set():
                _log.info("replica ready at record %d", self.state.cursor)
            self._ready.set()

    def _start_again(self) -> None:
        self.state = RouterState()
        self.restarts += 1
        self._target = None
        self._ready.clear()
        self._restarted()

    async def _watch_head(self) -> None:
        while True:
            await asyncio.sleep(HEAD_POLL_S)
            try:
                extent = await self._log.extent()
            except LogUnavailable as error:
                if self._trouble is None:
                    _log.warning("log not reachable: %s", error)
                self._trouble = str(error)
                continue
            if self._trouble is not None:
                _log.info("log reachable again at record %d", extent.last_seq)
            self._trouble = None
            self._head = extent.last_seq
