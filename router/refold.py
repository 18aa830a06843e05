"""Folds a stretch of the log into a state, as fast as the log can be read."""

import asyncio
from collections.abc import Callable

from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent
from eventstore.log import EventLog, Record
from router.fold import apply
from router.state import RouterState

LOOK_S = 0.2
"""How often `every` is called."""


async def fold_to(
    log: EventLog,
    state: RouterState,
    end_seq: int,
    *,
    every: Callable[[], None] = lambda: None,
    applied: Callable[[Record, list[AnyEvent]], None] = lambda record, events: None,
) -> None:
    """Move `state` on to record `end_seq`, which the log must hold.

    every: called now and then; what it raises ends the fold, as does what `applied` raises.
    Raises LogGap if records are missing, LogUnavailable.
    """
    if state.cursor >= end_seq:
        return
    complete = asyncio.Event()

    def handle(record: Record) -> None:
        before = state.cursor
        if before >= end_seq:
            return
        events = apply(state, record)
        if state.cursor > before:
            applied(record, events)
        if state.cursor >= end_seq:
            complete.set()

    following = await log.follow(state.follow_from, handle)
    ended = asyncio.create_task(following.wait(), name="refold")
    finished = asyncio.create_task(complete.wait(), name="refold complete")
    try:
        while not finished.done():
            await asyncio.wait(
                (ended, finished), timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done() and not finished.done():
                ended.result()
                raise LogUnavailable("the log was closed while it was read")
            every()
    finally:
        for task in (ended, finished):
            task.cancel()
        await asyncio.gather(ended, finished, return_exceptions=True)
        await following.close()
