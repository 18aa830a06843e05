"""Processes die and sleep under load, the log's server too; afterwards the log adds up.

What is done to whom, and when, is drawn from a seed; `log_audit` judges.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Final, NamedTuple

import aiohttp
import pytest

from eventstore import events
from eventstore.server import EmbeddedServer
from tests.integration.log_audit import Answer, Ended
from tests.integration.processes import Child, Deployment, ask, deployment
from tests.waiting import eventually

SEED = 20
REQUESTS_MIN = 3000
CLIENTS = 40
ABORTED = 0.3
"""Share of the clients that give up."""
FIRST_MARK = 1000
RETRY_S = 0.5
"""How long a client waits after an error."""
NATS_WAIT = ("--nats-wait-secs", "60")
"""Whoever starts while the server is down or asleep waits for it."""
QUIET_S = 60.0
"""Leases end, and what nobody watched is found by comparing after 15 s."""

pytestmark = pytest.mark.timeout(240)


class Fault(NamedTuple):
    """at_s: from the start of the load. for_s: until the victim goes on, or another one starts."""

    at_s: float
    number: signal.Signals
    victim: str
    for_s: float


SHORT: Final = (0.3, 1.5)
PAST_LEASE: Final = (6.0, 7.5)
FAULTS: Final = (
    (signal.SIGKILL, "nats", SHORT),
    (signal.SIGSTOP, "nats", SHORT),
    (signal.SIGKILL, "worker", SHORT),
    (signal.SIGKILL, "worker", SHORT),
    (signal.SIGSTOP, "worker", SHORT),
    (signal.SIGSTOP, "worker", PAST_LEASE),
    (signal.SIGKILL, "frontend", SHORT),
    (signal.SIGSTOP, "frontend", SHORT),
    (signal.SIGSTOP, "frontend", PAST_LEASE),
)


def schedule(rng: Random, within_s: float = 8.0) -> list[Fault]:
    """Each of FAULTS once, at any time."""
    return sorted(
        Fault(rng.uniform(0.5, within_s), number, victim, rng.uniform(*span))
        for number, victim, span in FAULTS
    )


class Load:
    """Clients that ask, wait for the answer or give up, and ask again; each has its frontend."""

    def __init__(self, here: Deployment, rng: Random) -> None:
        self.answers: list[Answer] = []
        self.stopped = False
        self._here = here
        self._rng = rng
        self._sent = 0

    async def run(self) -> None:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._client(session, number))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        rng = self._rng
        while not self.stopped or self._sent < REQUESTS_MIN:
            mark = FIRST_MARK + self._sent
            self._sent += 1
            running = [frontend for frontend in self._here.frontends if frontend.running]
            prompt = f"prefix {rng.randrange(7)} " * 60 + str(mark)
            answer = await ask(
                session,
                running[number % len(running)],
                prompt,
                mark,
                streaming=rng.random() < 0.7,
                patience_s=rng.uniform(0.0, 0.3) if rng.random() < ABORTED else None,
            )
            self.answers.append(answer)
            await asyncio.sleep(RETRY_S if answer.code else rng.uniform(0.0, 0.1))


class Faults:
    """Does to a deployment what a schedule says. One fault at a time for each victim."""

    def __init__(self, here: Deployment, server: EmbeddedServer, rng: Random) -> None:
        self._here = here
        self._server = server
        self._rng = rng
        self._server_free = asyncio.Lock()
        self._spared: set[Child] = set()

    async def run(self, faults: list[Fault]) -> None:
        """Return when all is healed: everybody goes on, and who was killed has a successor."""
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                tasks.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        if fault.victim == "nats":
            async with self._server_free:
                await self._strike_server(fault)
            return
        here = self._here
        is_worker = fault.victim == "worker"
        async with self._victim(here.workers if is_worker else here.frontends) as child:
            child.signal(fault.number)
            if fault.number == signal.SIGKILL:
                await child.process.wait()
            await asyncio.sleep(fault.for_s)
            child.signal(signal.SIGCONT)
        if fault.number == signal.SIGKILL:
            await (add_worker(here) if is_worker else here.add_frontend(*NATS_WAIT))

    async def _strike_server(self, fault: Fault) -> None:
        pid = self._server.pid
        assert pid is not None
        os.kill(pid, fault.number)
        await asyncio.sleep(fault.for_s)
        os.kill(pid, signal.SIGCONT)  # does nothing to one that is dead and not yet reaped
        if fault.number == signal.SIGKILL:
            await self._server.stop()
            await self._server.start()

    @asynccontextmanager
    async def _victim(self, among: list[Child]) -> AsyncIterator[Child]:
        """One that runs and that no other fault has, once there is one."""

        def free() -> list[Child]:
            return [child for child in among if child.running and child not in self._spared]

        await eventually(lambda: bool(free()), QUIET_S)
        child = self._rng.choice(free())
        self._spared.add(child)
        try:
            yield child
        finally:
            self._spared.remove(child)


async def add_worker(here: Deployment) -> None:
    await here.add_worker("--speedup-ratio", "10", "--output-tokens-mean", "30", *NATS_WAIT)


async def test_every_answer_and_every_fact_is_accounted_for(
    own_server: EmbeddedServer, namespace: str
) -> None:
    rng = Random(SEED)
    async with deployment(own_server.url, namespace) as here:
        for _ in range(3):
            await add_worker(here)
        for _ in range(2):
            await here.add_frontend(*NATS_WAIT)
        await here.until_serving(3)
        load = Load(here, rng)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await Faults(here, own_server, rng).run(schedule(rng))
            load.stopped = True
        await here.until_serving(3)
        applied = here.observer.applied
        await eventually(lambda: applied[events.FrontendRemoved] >= 1, QUIET_S)
        await eventually(lambda: applied[events.WorkerRemoved] >= 2, QUIET_S)
        await here.until_quiet(QUIET_S)
        assert await here.audit(load.answers) == []
        ended = Counter(answer.ended for answer in load.answers)
        assert ended[Ended.WHOLE] > ended.total() / 2
        assert ended[Ended.ABORTED] > ended.total() / 5
        assert ended[Ended.ERROR] and ended[Ended.BROKEN]
