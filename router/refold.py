"""Folds a stretch of the log into a state, as fast as the log can be read."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from eventstore.errors import LogGap, LogUnavailable
from eventstore.events import AnyEvent
from eventstore.log import EventLog, Record
from router.fold import apply
from router.state import RouterState

LOOK_S = 0.2
"""How often `every` is called."""
SILENT_LOOKS = 10
"""After so many looks without a record the log is asked whether it has one."""


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
    Raises LogGap if records are missing, also the last ones; LogUnavailable.
    """
    if state.cursor >= end_seq:
        return
    complete = asyncio.Event()
    silent = 0

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
            reached = state.cursor
            await asyncio.wait(
                (ended, finished), timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done() and not finished.done():
                ended.result()
                raise LogUnavailable("the log was closed while it was read")
            every()
            silent = silent + 1 if state.cursor == reached else 0
            if silent == SILENT_LOOKS and not finished.done():
                silent = 0
                if not await _holds_any(log, state.cursor + 1, end_seq):
                    raise LogGap(state.cursor + 1, end_seq + 1)
    finally:
        for task in (ended, finished):
            task.cancel()
        await asyncio.gather(ended, finished, return_exceptions=True)
        await following.close()


async def fold_over_holes(
    log: EventLog,
    state: RouterState,
    end_seq: int,
    *,
    every: Callable[[], None] = lambda: None,
    applied: Callable[[Record, list[AnyEvent]], None] = lambda record, events: None,
) -> list[LogGap]:
    """`fold_to` that passes over records that are missing, and returns where they are.

    The state then lacks what they said, as if their producers had never got it to the log. Raises
    LogGap if the log lost its end or was made anew, LogUnavailable.
    """
    holes: list[LogGap] = []
    while True:
        try:
            await fold_to(log, state, end_seq, every=every, applied=applied)
        except LogGap as gap:
            if gap.got <= state.cursor + 1:
                raise
            holes.append(gap)
            state.cursor = gap.got - 1
        else:
            return holes


async def _holds_any(log: EventLog, start_seq: int, end_seq: int) -> bool:
    """Whether records are still to come; true as well while nobody can tell."""
    try:
        async with aclosing(log.read(start_seq, end_seq)) as records:  # type: ignore[type-var]
            async for _ in records:
                return True
    except LogUnavailable:
        return True
    return False
