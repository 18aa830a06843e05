"""Waiting for something to become true, with a deadline, for tests of what runs on its own."""

import asyncio
from collections.abc import Awaitable, Callable

POLL_S = 0.002


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], within_s: float = 10.0
) -> None:
    """Return once `condition()` holds; AssertionError if it does not within the deadline."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                held = condition()
                if held if isinstance(held, bool) else await held:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"still not true after {within_s} s") from None
