"""A whole deployment in one process, in virtual time, under one seed.

    clients ─▶ frontends ═ network ═ workers           faults: simulations.nemesis
                   ║                    ║              checks: simulations.checkers
                   ╚═ links ═▶ log, leases ◀═ links ═══╝

A run has two parts. With traffic and faults, safety is watched. Then everything is healed, traffic
stops, and within a bound of virtual seconds the deployment must have come to rest. Equal seeds and
sizes make equal runs, down to the bytes of the log.
"""

import asyncio
import hashlib
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import Struct

from eventstore.errors import EventStoreError
from simulations.checkers import Checkers, Failure
from simulations.clock import Stuck
from simulations.faults import LinkRates, LogServer
from simulations.hosts import Host, Process, Shared
from simulations.nemesis import FAULTS, Nemesis
from simulations.network import Network, NetworkLoop
from simulations.processes import SimulatedFrontend, SimulatedWorker
from simulations.swarm import Mix, RngFor, Sizes, draw_mix, rng_for
from simulations.workload import Workload
from workers.errors import WorkerError

DIGEST_EVERY = 16
END_S = 30.0
"""How long an orderly end may take."""
REST_S = 120.0
"""How long the deployment may take to come to rest: several times the longest grace of a frontend's
caretaker, 15 s, as one correction may be what another waits for."""
PATIENCE_S = 30.0
"""How long clients then wait for answers: workers may be overloaded."""
LOOK_S = 0.5
STAYS_S = 5.0
"""It must stay at rest for so long, so that nobody corrects what is right."""
AGAIN_S = 1.0
"""How long after it could not go on a process is started again."""

P = TypeVar("P", bound=Process)


class Slot:
    """A place of the deployment: one process at a time, each a new life with a new identity."""

    def __init__(
        self, cluster: "Cluster", kind: str, number: int, make: Callable[[Host], Process]
    ) -> None:
        self.kind = kind
        self.name = f"{kind}-{number}"
        self.process: Process | None = None
        self._cluster = cluster
        self._make = make
        self._task: asyncio.Task[None] | None = None
        self._lives = 0

    def start(self) -> None:
        """Start the process. Nothing happens if it runs."""
        if self.process is not None:
            return
        host = self._cluster.new_host(f"{self.name}.{self._lives}")
        self._lives += 1
        process = self.process = self._make(host)
        self._task = host.spawn(process)
        self._task.add_done_callback(lambda task: self._ended(process, task))
        self._cluster.on_start(process)

    async def kill(self) -> None:
        """End the process wherever it is."""
        process, self.process = self.process, None
        if process is not None:
            await process.host.kill()

    async def stop(self) -> None:
        """End the process in order."""
        process, task = self.process, self._task
        if process is None or task is None:
            return
        process.stop()
        done, _ = await asyncio.wait([task], timeout=END_S)
        if not done and not process.host.is_dead:
            self._cluster.fail("an orderly end ends", f"{process.host.name} is still there")

    def _ended(self, process: Process, task: asyncio.Task[None]) -> None:
        if process.host.is_dead:
            return
        error = None if task.cancelled() else task.exception()
        name = process.host.name
        if task.cancelled():
            self._cluster.fail("nothing fails", f"{name} was cancelled from within")
        elif error is not None and not _is_expected(error):
            text = "".join(traceback.format_exception(error))
            self._cluster.fail("nothing fails", f"{name} ended with\n{text}")
        elif error is None and len(process.host.tasks) > 1:  # this one counts until we return
            left = ", ".join(process.host.tasks.names())
            self._cluster.fail("an orderly end leaves no task behind", f"{name} left {left}")
        if self.process is process:
            self.process = None
        self._cluster.bury(process.host)
        if error is not None or self._cluster.is_healed:
            asyncio.get_running_loop().call_later(AGAIN_S, self.start)


def _is_expected(error: BaseException) -> bool:
    """Whether a process may end with it, to be started again."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_expected, error.exceptions))
    return isinstance(error, EventStoreError | WorkerError)


class Cluster:
    """All slots, and what they share."""

    def __init__(self, mix: Mix, sizes: Sizes, rng: RngFor, checkers: Checkers) -> None:
        """To be made on a running `NetworkLoop`."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, NetworkLoop)
        self._loop = loop
        self._mix = mix
        self._ids = rng("ids")
        self._checkers = checkers
        self._burials: list[asyncio.Task[None]] = []
        self.fail = checkers.fail
        loop.network = Network(rng("network"), mix.rates.latency_s)
        log = LogServer(loop.now_ns, mix.rates, checkers.appended, checkers.new_life)
        self.shared = Shared(rng, loop.now_ns, loop.time, loop.network, log)
        self.operator = self.new_host("operator")
        """For commands; no process runs there."""
        self.is_healed = False
        """From then on a process that ends is started again."""
        self.slots = [
            *(Slot(self, "worker", n, self._worker) for n in range(sizes.workers)),
            *(Slot(self, "frontend", n, self._frontend) for n in range(sizes.replicas)),
        ]

    # One function for each kind of process; `slots` says how many there are.

    def _worker(self, host: Host) -> Process:
        return SimulatedWorker(host, self._mix, lambda: self._ids.getrandbits(64))

    def _frontend(self, host: Host) -> Process:
        return SimulatedFrontend(host, self._mix, self._ids.getrandbits(64), self._checkers)

    def running(self, kind: type[P]) -> list[P]:
        """The processes of a kind that run now."""
        return [slot.process for slot in self.slots if isinstance(slot.process, kind)]

    def new_host(self, name: str) -> Host:
        return Host(name, self.shared, self._checkers.acknowledged)

    def on_start(self, process: Process) -> None:
        if isinstance(process, SimulatedFrontend):
            self._checkers.started(process)

    def bury(self, host: Host) -> None:
        """Take away what is left of a process that has ended."""
        self._burials.append(self._loop.create_task(host.kill(), name=f"bury {host.name}"))

    def start(self) -> None:
        for slot in self.slots:
            slot.start()

    def heal(self) -> None:
        """Everything works from here on."""
        self.is_healed = True
        if not self.shared.log.is_up:
            self.shared.server_up()
        self.shared.log.rates = LinkRates(latency_s=self._mix.rates.latency_s)
        for slot in self.slots:
            if slot.process is not None:
                slot.process.host.heal()
            slot.start()

    async def end(self) -> None:
        for slot in self.slots:
            await slot.kill()
        await self.operator.kill()
        await asyncio.gather(*self._burials)


class Outcome(Struct, frozen=True, kw_only=True):
    """What a run came to. fingerprint: of every record of every life of the log."""

    seed: int
    failure: Failure | None
    fingerprint: str
    records: int
    lives: int
    virtual_s: float
    real_s: float
    digests_checked: int
    decisions: int
    answers: dict[str, int]
    faults: dict[str, int]


def simulate(seed: int, sizes: Sizes, *, digest_every: int = DIGEST_EVERY) -> Outcome:
    """Run one seed. digest_every: see `Checkers`; it changes what is noticed, not what happens."""
    started_s = time.perf_counter()
    loop = NetworkLoop()
    run = _Run(seed, sizes, Checkers(digest_every, loop.time))
    loop.set_exception_handler(run.callback_failed)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        try:
            runner.run(run.main())
        except Stuck as stuck:
            run.checkers.fail("time goes on", str(stuck))
        # What ends with the runner, in no particular order, is no part of the run.
        return run.outcome(loop.time(), time.perf_counter() - started_s)


def mix_of(seed: int) -> Mix:
    """The options that a seed draws."""
    return draw_mix(rng_for(seed), FAULTS)


class _Run:
    def __init__(self, seed: int, sizes: Sizes, checkers: Checkers) -> None:
        self.checkers = checkers
        self._seed = seed
        self._sizes = sizes

    async def main(self) -> None:
        rng, mix = rng_for(self._seed), mix_of(self._seed)
        self._cluster = Cluster(mix, self._sizes, rng, self.checkers)
        self._nemesis = Nemesis(self._cluster, mix, rng("nemesis"))
        self._workload = Workload(self._cluster, mix, self._sizes, rng("workload"))
        story = asyncio.create_task(self._story(), name="story")
        failed = asyncio.create_task(self.checkers.failed.wait(), name="failed")
        await asyncio.wait([story, failed], return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        story.cancel()
        await asyncio.wait([story])
        await self._cluster.end()
        if not story.cancelled():
            story.result()

    async def _story(self) -> None:
        cluster = self._cluster
        cluster.start()
        async with asyncio.TaskGroup() as tasks:
            going = [
                tasks.create_task(self._nemesis.run(), name="nemesis"),
                tasks.create_task(self._workload.run(), name="clients"),
            ]
            await asyncio.sleep(self._sizes.seconds)
            for task in going:
                task.cancel()
        cluster.heal()
        await self._come_to_rest()

    async def _come_to_rest(self) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(PATIENCE_S, self._workload.give_up)
        deadline_s = loop.time() + REST_S
        rests_since_s: float | None = None
        while rests_since_s is None or loop.time() - rests_since_s < STAYS_S:
            unsettled = self._unsettled()
            if unsettled is None:
                rests_since_s = rests_since_s or loop.time()
            elif loop.time() > deadline_s:
                self.checkers.fail(f"the deployment comes to rest within {REST_S:g} s", unsettled)
                return
            else:
                rests_since_s = None
            await asyncio.sleep(LOOK_S)

    def _unsettled(self) -> str | None:
        cluster = self._cluster
        missing = [slot.name for slot in cluster.slots if slot.process is None]
        if missing:
            return f"{missing[0]} is not running"
        return self.checkers.unsettled(
            cluster.running(SimulatedFrontend), cluster.running(SimulatedWorker)
        )

    def callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = "".join(traceback.format_exception(error)) if error else ""
        self.checkers.fail("nothing fails", f"{context['message']}\n{text}")

    def outcome(self, virtual_s: float, real_s: float) -> Outcome:
        lives = self._cluster.shared.log.lives
        digest = hashlib.blake2b(digest_size=16)
        for record in (record for life in lives for record in life.records):
            digest.update(repr(record[:3]).encode())
            digest.update(record.data)
        return Outcome(
            seed=self._seed,
            failure=self.checkers.failure,
            fingerprint=digest.hexdigest(),
            records=sum(life.head for life in lives),
            lives=len(lives),
            virtual_s=virtual_s,
            real_s=real_s,
            digests_checked=self.checkers.digests_checked,
            decisions=self.checkers.decisions,
            answers=dict(self._workload.answers),
            faults=dict(self._nemesis.done),
        )
