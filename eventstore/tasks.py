"""Ending a task that talks to NATS."""

import asyncio

ASK_AGAIN_S = 0.25


async def end(task: asyncio.Task[None]) -> None:
    """Cancel `task` and return once it has ended, however it did. Safe to call twice.

    Asks again for as long as it runs: the client library waits for answers with
    `asyncio.wait_for`, which in Python 3.11 loses a cancellation that arrives with the answer.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=ASK_AGAIN_S)
