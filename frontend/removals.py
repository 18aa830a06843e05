"""Writing down that somebody is gone: a worker or a frontend whose lease ended."""

import asyncio
import logging
from typing import NamedTuple, TypeAlias

from eventstore.errors import LogUnavailable
from eventstore.log import EventLog
from eventstore.subjects import hex_id
from workers.registry import LEASE_EXPIRED, record_frontend_removed, record_removed

QUEUE_MAX = 10_000

_log = logging.getLogger(__name__)


class WorkerGone(NamedTuple):
    """registered_seq: as in `Instance`; 0: not known."""

    worker_id: int
    registered_seq: int


class FrontendGone(NamedTuple):
    """lease, removed_seq: as in `FrontendInstance`; removed_seq None: not known."""

    frontend_id: int
    lease: int
    removed_seq: int | None


Gone: TypeAlias = WorkerGone | FrontendGone


class Removals:
    """Records removals one after another, for as long as the log takes to answer.

    Every frontend tries; the log takes one. With QUEUE_MAX unwritten, further ones are left to the
    other frontends, and to the caretaker's next look.
    """

    def __init__(self, log: EventLog, namespace: str) -> None:
        self._log = log
        self._namespace = namespace
        self._queue: asyncio.Queue[Gone] = asyncio.Queue(QUEUE_MAX)

    def record(self, gone: Gone) -> None:
        if self._queue.full():
            _log.error("removal of %s is left to others", hex_id(gone[0]))
            return
        self._queue.put_nowait(gone)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            gone = await self._queue.get()
            try:
                await self._write(gone)
            except LogUnavailable as error:
                _log.warning("removal not written, will try again: %s", error)
                self.record(gone)

    async def _write(self, gone: Gone) -> None:
        log, namespace = self._log, self._namespace
        match gone:
            case WorkerGone(worker_id, registered_seq):
                cause = LEASE_EXPIRED
                if await record_removed(log, namespace, worker_id, cause, registered_seq):
                    _log.info("worker %s removed: its lease ended", hex_id(worker_id))
            case FrontendGone(frontend_id, lease, removed_seq):
                await record_frontend_removed(log, namespace, frontend_id, lease, removed_seq)
                _log.info("frontend %s removed: its lease ended", hex_id(frontend_id))
