"""An event loop whose time is a number.

Nothing ever sleeps: when no callback is ready, time jumps to the next timer, so a minute of a quiet
cluster costs a moment, and equal programs run in equal order. Whatever asks the loop for the time
(`asyncio.sleep`, `asyncio.timeout`, `call_later`) lives in it without knowing. There are no threads
and no sockets.

Tasks have numbers, from 1 in every loop. They are their hashes: asyncio keeps tasks in sets, whose
order would otherwise follow from memory addresses, and a task group would cancel its tasks in
another order in every run. And they name the tasks that nobody names, for which asyncio counts
through all loops of the process.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, NoReturn, TypeVar

START_NS = 1_767_225_600 * 1_000_000_000
"""UTC at loop time 0: the beginning of 2026."""
SPINS_MAX = 100_000
"""Rounds of the loop in one instant. A process that does not sleep at all is stuck."""
KILL_ROUNDS_MAX = 100
"""How many cancellations in a row a task may outlive."""

T = TypeVar("T")


class Stuck(Exception):
    """Virtual time cannot go on."""


class TaskOwner:
    """The tasks of one simulated process: all that were made while it, or one of them, ran."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._live: dict[asyncio.Task[Any], None] = {}

    def __len__(self) -> int:
        return len(self._live)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that belongs to this owner, with all that it will start itself."""
        context = copy_context()
        context.run(OWNER.set, self)
        return asyncio.get_running_loop().create_task(coroutine, name=self.name, context=context)

    def names(self) -> list[str]:
        """Of the tasks that run."""
        return [task.get_name() for task in self._live]

    def add(self, task: asyncio.Task[Any]) -> None:
        self._live[task] = None
        task.add_done_callback(self._live.pop)

    async def kill(self) -> None:
        """End all tasks wherever they are.

        `finally` blocks run, as Python has no other way to stop a coroutine; each `await` in one is
        cancelled too. The owner sees to it that nothing they do is seen outside.
        """
        for _ in range(KILL_ROUNDS_MAX):
            if not self._live:
                return
            for task in list(self._live):
                task.cancel()
                task.add_done_callback(_retrieve)
            await asyncio.sleep(0)
        names = ", ".join(task.get_name() for task in self._live)
        raise Stuck(f"still running after {KILL_ROUNDS_MAX} cancellations: {names}")


def _retrieve(task: asyncio.Task[Any]) -> None:
    """What a killed task fails with is nobody's concern."""
    if not task.cancelled():
        task.exception()


OWNER: ContextVar[TaskOwner | None] = ContextVar("owner", default=None)


class _NumberedTask(asyncio.Task[T]):
    def __init__(self, number: int, coroutine: Coroutine[Any, Any, T], **options: Any) -> None:
        self._number = number  # before the rest, which puts the task into a set
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self._number


class _Timers:
    """What the loop takes for its selector: waiting for events is where time passes."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop
        self._spins = 0

    def select(self, timeout: float | None) -> list[Any]:
        """Raises Stuck if there is nothing to wait for, or if waiting never comes to it."""
        if timeout is None:
            raise Stuck("nothing is ready and no timer is set: this would sleep for ever")
        if timeout > 0:
            self._loop.jump(timeout)
            self._spins = 0
        elif self._spins >= SPINS_MAX:
            raise Stuck(f"{SPINS_MAX} rounds of the loop at second {self._loop.time():.6f}")
        self._spins += 1
        return []

    def close(self) -> None:
        """Nothing is held open."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs `asyncio` programs in virtual time, from 0 seconds on."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Timers(self)
        self._seconds = 0.0
        self._numbers = itertools.count(1)

    def time(self) -> float:
        return self._seconds

    def now_ns(self) -> int:
        """UTC nanoseconds, which follow `time`."""
        return START_NS + round(self._seconds * 1e9)

    def jump(self, seconds: float) -> None:
        self._seconds += seconds

    def create_task(  # type: ignore[override]
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        number = next(self._numbers)
        task = _NumberedTask(
            number, coroutine, loop=self, name=name or f"task {number}", context=context
        )
        owner = OWNER.get() if context is None else context.get(OWNER)
        if owner is not None:
            owner.add(task)
        return task

    def close(self) -> None:
        if not self.is_closed():
            self._selector.close()
        super().close()

    def run_in_executor(self, *args: Any) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("there are no threads in virtual time")

    # What the base class leaves to those that know of sockets and threads:

    def _process_events(self, event_list: list[Any]) -> None:
        """`select` returns none."""

    def _write_to_self(self) -> None:
        """Wakes a sleeping loop; this one never sleeps."""
