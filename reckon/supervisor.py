"""Keeps the processes of a deployment running, and ends them in order.

One task per child runs it again and again as `restart.RestartPolicy` says. The supervisor decides
nothing else: what a death means for the service is the children's own affair.
"""

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from msgspec import Struct

from reckon.child import Child, ChildSpec, ChildState, run_once
from reckon.restart import RestartPolicy, how_it_ended


class BecameReady(Struct, frozen=True):
    name: str
    pid: int
    starts: int
    """How many there have been, this one included."""


class Died(Struct, frozen=True):
    name: str
    pid: int
    how: str
    """As in `was killed by SIGKILL`."""
    delay_s: float
    """Until its next start."""


class GivenUp(Exception):
    """A child keeps dying at its start."""

    def __init__(self, child: Child, how: str) -> None:
        super().__init__(child.name, how)
        self.child = child
        self.how = how

    def __str__(self) -> str:
        times = self.child.failed_starts
        return f"{self.child.name} {self.how}" + (f", {times} times in a row" if times > 1 else "")


class Supervisor:
    """Runs children for as long as its `async with` block lasts."""

    def __init__(
        self,
        specs: Iterable[ChildSpec],
        *,
        notice: Callable[[BecameReady | Died], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """specs: names are distinct; `needs` names one that comes before.

        Raises OSError if a log file cannot be opened.
        """
        self.children: dict[str, Child] = {}
        self._notice = notice
        self._policy = policy or RestartPolicy()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._hurry = asyncio.Event()
        for spec in specs:
            self.children[spec.name] = Child(spec)

    async def __aenter__(self) -> Self:
        for child in self.children.values():
            self._keepers[child.name] = asyncio.create_task(
                self._keep(child), name=f"keep {child.name}"
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the children, turn by turn. Takes at most the graces of the turns together."""
        turns = sorted({child.spec.stop_turn for child in self.children.values()})
        for turn in turns:
            await self._end([c for c in self.children.values() if c.spec.stop_turn == turn])
        for child in self.children.values():
            child.log.close()
        failures = [
            keeper.exception() for keeper in self._keepers.values() if not keeper.cancelled()
        ]
        for failure in failures:
            if error is None and failure is not None and not isinstance(failure, GivenUp):
                raise failure

    def hurry(self) -> None:
        """From now on, whoever is asked to end is killed at once."""
        self._hurry.set()

    async def until_ready(self) -> None:
        """Return when every child is or has been ready; wait for ever otherwise."""
        for child in self.children.values():
            await child.ready.wait()

    async def until_given_up(self) -> None:
        """Raise GivenUp once a child keeps dying at its start; never return before the end."""
        # A keeper returns only when it is asked to end its child.
        done, _ = await asyncio.wait(self._keepers.values(), return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def _keep(self, child: Child) -> None:
        while True:
            if child.spec.needs is not None:
                await self.children[child.spec.needs].ready.wait()
            try:
                life = await run_once(child, self._hurry, lambda: self._became_ready(child))
            except OSError as error:
                raise GivenUp(child, f"cannot be started: {error.strerror}") from error
            if child.stop_asked.is_set():
                return
            how = how_it_ended(life.returncode)
            child.log.note(how)
            verdict = self._policy.after(life, child.failed_starts)
            child.failed_starts = verdict.failed_starts
            if verdict.delay_s is None:
                raise GivenUp(child, how)
            self._notice(Died(child.name, child.pid, how, verdict.delay_s))
            await asyncio.sleep(verdict.delay_s)

    def _became_ready(self, child: Child) -> None:
        self._notice(BecameReady(child.name, child.pid, child.starts))

    async def _end(self, children: list[Child]) -> None:
        keepers = [self._keepers[child.name] for child in children]
        for child, keeper in zip(children, keepers, strict=True):
            child.stop_asked.set()
            if child.state is ChildState.WAITING:
                # There is no process, and none comes: the state changes before one is made.
                keeper.cancel()
        await asyncio.wait(keepers)
