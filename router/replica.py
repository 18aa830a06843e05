"""Keeps one `RouterState` at the head of the log.

Recovery, restart and normal running are one path: load the newest usable snapshot, read on from its
position, apply, go on for ever. A following that breaks is taken up again after the last applied
record. One that shows missing records, or another log, makes the replica begin again; until that
has caught up, decisions are made from what it believed before.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from eventstore.errors import LogGap, LogUnavailable
from eventstore.events import AnyEvent, Event
from eventstore.log import EventLog, Extent, Following, Record
from eventstore.relayed import WAITING_BYTES_MAX, FollowsApart, RelayedFollowing, RelayFailed
from eventstore.tasks import end_all
from router.fold import apply
from router.loading import LoadReport, SnapshotLoader
from router.progress import Progress
from router.reading import ReadingMark
from router.state import RouterState
from router.steps import applying

HEAD_POLL_S = 1.0
RETRY_MAX_S = 5.0
SHORT_LOOKS = 2

_log = logging.getLogger(__name__)


class ReplicaPhase(StrEnum):
    STARTING = "starting"
    """The log has not been reached yet."""
    CATCHING_UP = "catching_up"
    """Reading towards the head seen at the start; decisions would lack facts."""
    READY = "ready"
    DEGRADED = "degraded"
    """Ready, but serving from the state at hand: the log can't be reached, or is another one."""


class EventPipeline(Struct, frozen=True):
    """How the records come to a replica. process: the pid of the one that receives them; None while
    there is none, and always with `threads` 1: then the event loop receives them itself.
    waiting_bytes, waiting_bytes_max: received by the loop from that process and not applied yet."""

    threads: int
    process: int | None
    waiting_bytes: int
    waiting_bytes_max: int = WAITING_BYTES_MAX


class ReplicaStatus(Struct, frozen=True):
    """Where a replica stands. `lag_s`: age of the last applied record while behind, else 0; also 0
    while none is applied.
    `snapshot`: what the last start found; None if it looks for none."""

    phase: ReplicaPhase
    why: str | None
    cursor: int
    head: int
    lag_records: int
    lag_s: float
    digest: str
    snapshot: LoadReport | None = None
    events: EventPipeline | None = None


class Replica:
    """`state`, and the task that moves it. `observe` sees every applied record's events."""

    def __init__(
        self,
        log: EventLog,
        now_ns: Callable[[], int],
        observe: Callable[[list[AnyEvent]], None] = lambda events: None,
        restarted: Callable[[], None] = lambda: None,
        snapshots: SnapshotLoader | None = None,
        jitter: Callable[[], float] = random.random,
        event_threads: int = 1,
        reading: ReadingMark | None = None,
    ) -> None:
        """now_ns: UTC nanoseconds, for the lag only. restarted: the state is another one.
        snapshots: where a start looks for one; None: it reads all that the log holds.
        jitter: uniform in [0, 1), for retries.
        reading: held while it catches up; None: the log may be trimmed then.
        event_threads: 1 receives and applies on the event loop. With more, a process of its own
        receives, where the log can be followed so, and the loop only applies: threads would share
        one interpreter lock with it, and more processes have nothing to do in one order of events.
        """
        self.state = RouterState()
        """What decisions are made from."""
        self._building: RouterState | None = None
        """After the log was found to be another one: its state, until it has caught up."""
        self.applied: Counter[type[Event]] = Counter()
        self.restarts = 0
        self._log = log
        self._now_ns = now_ns
        self._observe = observe
        self._restarted = restarted
        self._snapshots = snapshots
        self._reading = reading
        self._jitter = jitter
        self._unfinished: Iterator[None] = iter(())
        """Steps that are left of the record that is being applied."""
        self._event_threads = event_threads
        self._head = 0
        self._identity: str | None = None
        self._following: Following | None = None
        self._rewound = False
        self._gap = (0, 0)
        """Where records were missing last: expected, got."""
        self._short = 0
        self._target: int | None = None
        self._awaited = "waiting for the log"
        self._trouble: str | None = None
        self._ready = asyncio.Event()
        self._progress: Progress | None = None

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
        self._finish_record()  # a digest belongs to whole records
        cursor, head = self.state.cursor, self.head
        behind = head > cursor and self.state.time_ns > 0
        lag_s = max(0, self._now_ns() - self.state.time_ns) / 1e9 if behind else 0.0
        why = self._trouble
        if self._building is not None:
            phase, why = ReplicaPhase.DEGRADED, "the log is another one; reading it again"
        elif self._target is None:
            phase, why = ReplicaPhase.STARTING, why or self._awaited
        elif not self.is_ready:
            phase = ReplicaPhase.CATCHING_UP
        else:
            phase = ReplicaPhase.READY if why is None else ReplicaPhase.DEGRADED
        report = None if self._snapshots is None else self._snapshots.report
        return ReplicaStatus(
            phase,
            why,
            cursor,
            head,
            head - cursor,
            lag_s,
            self.state.digest(),
            report,
            self.events,
        )

    @property
    def events(self) -> EventPipeline:
        """How the records come."""
        following = self._following
        if not isinstance(following, RelayedFollowing):
            return EventPipeline(self._event_threads, None, 0)
        return EventPipeline(self._event_threads, following.pid, following.waiting_bytes)

    def applied_by_tag(self) -> dict[str, int]:
        return {str(kind.__struct_config__.tag): n for kind, n in self.applied.items()}

    async def run(self) -> None:
        """Follow the log until cancelled."""
        tasks = [
            asyncio.create_task(self._follow_for_ever(), name="replica-follow"),
            asyncio.create_task(self._watch_head(), name="replica-head"),
        ]
        if self._reading is not None:
            tasks.append(asyncio.create_task(self._reading.run(), name="replica-reading"))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await end_all(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _follow_for_ever(self) -> None:
        delay_s = 0.1
        while True:
            try:
                await self._follow_once()
                return
            except LogGap as gap:
                self._meet(gap)
            except LogUnavailable as error:
                self._trouble = str(error)
                _log.warning("log not readable, trying again: %s", error)
            await asyncio.sleep(delay_s * (0.5 + self._jitter() / 2))
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    async def _follow_once(self) -> None:
        if self._reading is not None and self._folded.cursor == 0:
            # Before the log is looked at: what is seen from here on stays.
            await self._reading.hold(lambda: self._folded.follow_from)
        extent = await self._log.extent()
        self._head = extent.last_seq
        self._identity = extent.identity
        if self._folded.cursor == 0:
            await self._begin(extent.first_seq)
        if self._target is None:
            self._target = extent.last_seq
        self._trouble = None
        self._check_ready()
        following = self._following = await self._follow()
        try:
            await following.wait()
            if self._rewound:
                self._rewound = False
                raise LogGap(self._folded.cursor + 1, self._head + 1)
        finally:
            await following.close()

    async def _follow(self) -> Following:
        start_seq = self._folded.follow_from
        if self._event_threads > 1 and isinstance(self._log, FollowsApart):
            try:
                return await self._log.follow_apart(start_seq, self._handle_in_steps)
            except RelayFailed as failed:
                _log.warning("events are received on the event loop: %s", failed)
                start_seq = self._folded.follow_from
        return await self._log.follow(start_seq, self._handle)

    async def _begin(self, first_seq: int) -> None:
        """Take the state of the newest usable snapshot; without one, begin where the log does."""
        self._awaited = "looking for a snapshot"
        loaded = None if self._snapshots is None else await self._snapshots.load()
        if loaded is None:
            self._folded.cursor = first_seq - 1
        elif self._building is not None:
            self._building = loaded.state
        else:
            self._become(loaded.state)
        self._progress = Progress(asyncio.get_running_loop().time(), self._folded.cursor)

    @property
    def _folded(self) -> RouterState:
        """The state that records are applied to."""
        return self.state if self._building is None else self._building

    def _become(self, state: RouterState) -> None:
        self.state = state
        self._restarted()

    def _handle(self, record: Record) -> None:
        self._applied(apply(self._folded, record))

    def _handle_in_steps(self, record: Record) -> Iterator[None]:
        self._unfinished = steps = self._steps(record)
        return steps

    def _steps(self, record: Record) -> Generator[None, None, None]:
        events = yield from applying(self._folded, record)
        self._unfinished = iter(())
        self._applied(events)

    def _finish_record(self) -> None:
        for _ in self._unfinished:
            pass

    def _applied(self, events: list[AnyEvent]) -> None:
        for event in events:
            self.applied[type(event)] += 1
        if self._building is None:
            self._observe(events)
        if self._building is not None or not self._ready.is_set():
            self._check_ready()

    def _check_ready(self) -> None:
        if self._target is None or self._folded.cursor < self._target:
            return
        if self._reading is not None:
            self._reading.release()
        if self._building is not None:
            building, self._building = self._building, None
            self._become(building)
        elif self._ready.is_set():
            return
        _log.info("replica ready at record %d", self.state.cursor)
        self._ready.set()

    def _meet(self, gap: LogGap) -> None:
        """Read the log anew; if the same records are missing then, go on behind them.

        Whoever reads the log from now on lacks the same records, and comes to the same state. What
        they said is missing as if its producer had never got it to the log: the fold doubts it.
        """
        if gap.got > gap.expected and (gap.expected, gap.got) == self._gap:
            _log.error("records %d to %d are missing for good", gap.expected, gap.got - 1)
            self._folded.cursor = gap.got - 1
            if self._snapshots is not None:
                self._snapshots.report = replace(self._snapshots.report, incomplete=True)
        else:
            _log.warning("state thrown away, reading the log again: %s", gap)
            self._gap = gap.expected, gap.got
            self._start_again()

    def _start_again(self) -> None:
        """Read the log anew. A replica that was ready goes on deciding from what it believed."""
        self.restarts += 1
        self._target = None
        if self._ready.is_set():
            self._building = RouterState()
        else:
            self._become(RouterState())

    def _tell_progress(self) -> None:
        if self._progress is not None and not self.is_ready:
            now_s = asyncio.get_running_loop().time()
            line = self._progress.line(now_s, self.state.cursor, self.head)
            if line is not None:
                _log.info("reading the log: %s", line)

    async def _watch_head(self) -> None:
        while True:
            await asyncio.sleep(HEAD_POLL_S)
            self._tell_progress()
            cursor = self._folded.cursor
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
            if self._target is not None and extent.last_seq < self._target:
                # The log lost its end after the start, and this much is all that there is to read.
                self._target = extent.last_seq
                self._check_ready()
            await self._check_history(extent, cursor)

    async def _check_history(self, extent: Extent, cursor: int) -> None:
        """End a following whose log is not the one that was read: made anew, or without its end.

        The following finds that out too, but only once it has been silent for a while. cursor: from
        before the extent was asked for. A new leader may need a moment until it knows all that the
        last one had, so a log that ends too early has to be seen twice.
        """
        anew = self._identity is not None and extent.identity != self._identity
        self._short = self._short + 1 if extent.last_seq < cursor else 0
        if self._following is not None and (anew or self._short >= SHORT_LOOKS):
            self._rewound = True
            await self._following.close()
