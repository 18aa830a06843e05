"""What goes wrong in a run, and when: faults of its mix, at random moments, to random victims."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import TYPE_CHECKING, Final

from eventstore.control import record_reset
from eventstore.errors import EventStoreError
from eventstore.snapshots import SnapshotRef, refs_of, unpack_header, unusable
from eventstore.subjects import subject
from simulations.hosts import Host
from simulations.processes import NAMESPACE, snapshot_taker
from simulations.swarm import Mix

if TYPE_CHECKING:
    from simulations.cluster import Cluster, Slot

STEPS_MAX = 20
"""Rounds of the loop that a fault waits at its moment, so that it also falls between two steps
that take no time."""
RESTART_S = 2.0
"""Mean time until a process that has ended is started again."""
CLOCK_SHIFT_S = 3600.0


class Nemesis:
    """Does one fault after another to `cluster`, until cancelled; `done` counts them."""

    def __init__(self, cluster: "Cluster", mix: Mix, rng: Random) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._shared = cluster.shared
        self._mix = mix
        self._rng = rng
        self._damaged: set[str] = set()

    async def run(self) -> None:
        names, weights = list(self._mix.faults), list(self._mix.faults.values())
        if not names:
            return
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._mix.fault_every_s * self._rng.expovariate(1))
                for _ in range(self._rng.randrange(STEPS_MAX)):
                    await asyncio.sleep(0)
                name = self._rng.choices(names, weights)[0]
                self.done[name] += 1
                tasks.create_task(self._do(FAULTS[name]), name=name)

    async def _do(self, fault: "Fault") -> None:
        await fault(self)

    def _outage_s(self) -> float:
        return self._mix.outage_s * self._rng.expovariate(1)

    def _slot(self, kind: str | None = None) -> "Slot | None":
        """One that runs now."""
        slots = [s for s in self._cluster.slots if s.process and kind in (None, s.kind)]
        return self._rng.choice(slots) if slots else None

    def _host(self, kind: str | None = None) -> Host | None:
        slot = self._slot(kind)
        return None if slot is None or slot.process is None else slot.process.host

    # --- processes --------------------------------------------------------------------------------

    async def kill(self, kind: str) -> None:
        slot = self._slot(kind)
        if slot is not None:
            await slot.kill()
            await self._start(slot)

    async def stop(self, kind: str) -> None:
        slot = self._slot(kind)
        if slot is not None:
            await slot.stop()
            await self._start(slot)

    async def _start(self, slot: "Slot") -> None:
        await asyncio.sleep(RESTART_S * self._rng.expovariate(1))
        slot.start()

    async def cut_host(self) -> None:
        """Nobody reaches it."""
        host = self._host()
        if host is not None:
            host.cut()
            await asyncio.sleep(self._outage_s())
            host.heal()

    async def cut_log(self) -> None:
        """It does not reach the server, and all else."""
        host = self._host()
        if host is not None:
            host.cut_log()
            await asyncio.sleep(self._outage_s())
            host.heal()

    async def slow_reader(self) -> None:
        host = self._host("frontend")
        if host is not None:
            host.log.slow_s = self._rng.choice([0.1, 1.0, 10.0])
            await asyncio.sleep(self._outage_s())
            host.log.slow_s = 0.0

    async def shift_clock(self) -> None:
        host = self._host()
        if host is not None:
            host.clock_offset_ns = int(CLOCK_SHIFT_S * self._rng.uniform(-1, 1) * 1e9)

    # --- the server -------------------------------------------------------------------------------

    async def restart_server(self) -> None:
        await self._crash_server(0)

    async def lose_tail(self) -> None:
        """The server comes back without its log's last records, those of the last moments."""
        head = self._shared.log.life.head
        lost = min(self._rng.randint(1, self._mix.lost_tail), head - self._rollback_floor())
        await self._crash_server(max(0, lost))

    def _rollback_floor(self) -> int:
        """What is trimmed must be in a snapshot that stays good: snapshots are older than what a
        crash can lose."""
        extent = self._shared.log.life.extent()
        if extent.first_seq == 1:
            return 0
        good = [seq for seq in self._good_snapshots().values() if seq >= extent.first_seq]
        return min(good, default=extent.last_seq)

    async def _crash_server(self, lost_tail: int) -> None:
        if self._shared.log.is_up:
            self._shared.server_down(lost_tail)
            await asyncio.sleep(self._outage_s())
            self._shared.server_up()

    async def recreate_stream(self) -> None:
        # Not while a snapshot is taken: its trim may hit the new stream. NATS cannot trim on the
        # condition that a stream is still the same one.
        if self._shared.log.is_up and await self._shared.claims.holder() is None:
            self._shared.log.recreate()

    async def write_garbage(self) -> None:
        """A record that nobody can read."""
        if self._shared.log.is_up:
            data = self._rng.randbytes(self._rng.choice([0, 1, 40]))
            msg_id = f"garbage.{self._rng.getrandbits(64)}"
            self._shared.log.append(subject(NAMESPACE, "control"), data, msg_id, None)

    async def damage_snapshot(self) -> None:
        """One of them, and one at a time: those that are kept make up for one, not for two."""
        good = list(self._good_snapshots())
        if len(good) > 1 and len(good) == len(self._named_snapshots()):
            name = self._rng.choice(good)
            data = bytearray(self._shared.snapshots.objects[name])
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            self._shared.snapshots.objects[name] = bytes(data)
            self._damaged.add(name)

    def _good_snapshots(self) -> dict[str, int]:
        """Name → seq of those that a replica could start from."""
        life, objects = self._shared.log.life, self._shared.snapshots.objects
        return {
            ref.name: ref.seq
            for ref in self._named_snapshots()
            if ref.name not in self._damaged
            and unpack_header(ref.name, objects[ref.name]).time_ns
            == life.records[ref.seq - 1].time_ns
        }

    def _named_snapshots(self) -> list[SnapshotRef]:
        """Those that fit to the log by their names: also damaged ones, and of lost records."""
        extent = self._shared.log.life.extent()
        refs = refs_of(self._shared.snapshots.objects)
        return [ref for ref in refs if unusable(ref, extent) is None]

    # --- operators --------------------------------------------------------------------------------

    async def reset_states(self) -> None:
        log, number = self._cluster.operator.log, self._rng.getrandbits(64)
        with contextlib.suppress(EventStoreError):
            await record_reset(log, NAMESPACE, "simulated", number)

    async def take_snapshot(self) -> None:
        """At any moment, due or not."""
        name = f"operator {self._rng.getrandbits(64)}"
        with contextlib.suppress(EventStoreError):
            await snapshot_taker(self._cluster.operator).run(name)


Fault = Callable[[Nemesis], Awaitable[None]]

FAULTS: Final[Mapping[str, Fault]] = {
    "kill_frontend": lambda nemesis: nemesis.kill("frontend"),
    "kill_worker": lambda nemesis: nemesis.kill("worker"),
    "stop_frontend": lambda nemesis: nemesis.stop("frontend"),
    "stop_worker": lambda nemesis: nemesis.stop("worker"),
    "cut_host": Nemesis.cut_host,
    "cut_log": Nemesis.cut_log,
    "slow_reader": Nemesis.slow_reader,
    "shift_clock": Nemesis.shift_clock,
    "restart_server": Nemesis.restart_server,
    "lose_tail": Nemesis.lose_tail,
    "recreate_stream": Nemesis.recreate_stream,
    "write_garbage": Nemesis.write_garbage,
    "damage_snapshot": Nemesis.damage_snapshot,
    "reset_states": Nemesis.reset_states,
    "take_snapshot": Nemesis.take_snapshot,
}
"""All that there are; a mix draws from them."""
