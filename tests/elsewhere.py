"""What else may go on in the process of a simulation, and must not matter to it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

TASKS = 500


@contextmanager
def tasks_elsewhere() -> Iterator[None]:
    """Another event loop has started tasks, and none of them ends before the block does."""
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(asyncio.sleep(3600)) for _ in range(TASKS)]
    loop.run_until_complete(asyncio.sleep(0))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
