"""Ending a task that talks to NATS."""

import asyncio
import contextlib
from collections.abc import Sequence

ASK_AGAIN_S = 0.25


async def end(task: asyncio.Task[None]) -> None:
    """Cancel `task` and return once it has ended, however it did. Safe to call twice.

    Asks again for as long as it runs: the client library waits for answers with
    `asyncio.wait_for`, which in Python 3.11 loses a cancellation that arrives with the answer.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=ASK_AGAIN_S)


async def end_all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """As `end`, for tasks that somebody started and has to see ended, in a `finally`.

    It goes on where it is cancelled itself. A TaskGroup would not do: it asks its tasks only once.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(running, timeout=ASK_AGAIN_S)
