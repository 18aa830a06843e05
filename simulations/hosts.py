"""Where simulated processes run, and what they reach from there.

A `Host` is one life of one process: its links to what all share, its clock, its tasks. A `Process`
is what runs on it. A further kind of process is one more class, made in `simulations.cluster`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from eventstore.claims import MemoryClaims
from eventstore.marks import MemoryMarks
from eventstore.snapshots import MemorySnapshots
from simulations.clock import TaskOwner
from simulations.faults import FaultyLog, LogServer
from simulations.leases import LeaseLink, LeaseStore
from simulations.network import Network
from simulations.stores import ClaimsLink, MarksLink, StoreLink
from simulations.swarm import RngFor
from workers.card import FrontendInstance, Instance


class Shared:
    """What all hosts reach: the network, and the server with the log and everything kept there."""

    def __init__(
        self,
        rng_for: RngFor,
        clock_ns: Callable[[], int],
        clock_s: Callable[[], float],
        network: Network,
        log: LogServer,
    ) -> None:
        self.rng_for = rng_for
        self.clock_ns = clock_ns
        self.network = network
        self.log = log
        self.workers = LeaseStore[Instance]()
        self.frontends = LeaseStore[FrontendInstance]()
        self.snapshots = MemorySnapshots()
        self.claims = MemoryClaims(clock_s)
        self.marks = MemoryMarks(clock_s)

    def server_down(self, lost_tail: int) -> None:
        """The server crashes, and its log loses as many records of its end."""
        self.log.crash(lost_tail)
        self.workers.is_up = self.frontends.is_up = False

    def server_up(self) -> None:
        self.log.start()
        for store in (self.workers, self.frontends):
            store.is_up = True
            store.tell()


class Host:
    """One life of one process: what it reaches others by, and what can be done to it."""

    def __init__(self, name: str, shared: Shared, on_acknowledged: Callable[[bytes], None]) -> None:
        self.name = name
        self.rng_for: RngFor = lambda part: shared.rng_for(f"{name}/{part}")
        self.clock_offset_ns = 0
        self.tasks = TaskOwner(name)
        self.is_dead = False
        latency_s = shared.log.rates.latency_s
        self.log = FaultyLog(shared.log, self.rng_for("log"), on_acknowledged)
        self.workers = LeaseLink(shared.workers, self.rng_for("workers"), latency_s)
        self.frontends = LeaseLink(shared.frontends, self.rng_for("frontends"), latency_s)
        self.snapshots = StoreLink(shared.snapshots, self.log)
        self.claims = ClaimsLink(shared.claims, self.log)
        self.marks = MarksLink(shared.marks, self.log)
        self._shared = shared

    def now_ns(self) -> int:
        """What this host takes for the time."""
        return self._shared.clock_ns() + self.clock_offset_ns

    def spawn(self, process: "Process") -> asyncio.Task[None]:
        return self.tasks.spawn(process.run())

    def cut_log(self) -> None:
        """The server cannot be reached; the other hosts can."""
        self.log.cut()
        self.workers.is_cut = self.frontends.is_cut = True

    def cut(self) -> None:
        """Nobody can be reached."""
        self.cut_log()
        self._shared.network.cut(self.name)

    def heal(self) -> None:
        self.log.heal()
        self.log.slow_s = 0.0
        for link in (self.workers, self.frontends):
            link.is_cut = False
            link.wake()
        self._shared.network.heal(self.name)

    async def kill(self) -> None:
        """End the process wherever it is. Nothing it does from here on is seen by anybody."""
        self.is_dead = True
        self.log.kill()
        self.workers.kill()
        self.frontends.kill()
        self._shared.network.kill(self.name)
        await self.tasks.kill()


class Process(ABC):
    """Runs on `host` until it is stopped; or killed, which it does not notice."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin the orderly end."""
        self._stopping.set()

    @abstractmethod
    async def run(self) -> None:
        """Returns after the orderly end. Raises EventStoreError or WorkerError if it cannot go on,
        and is then started again."""
