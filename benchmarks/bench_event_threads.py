"""How long does the event loop that serves HTTP stall while it takes in 50,000 blocks a second?

    python -m benchmarks.bench_event_threads [--seconds N] [--rounds N] [--out FILE]

An embedded nats-server on a temporary file store, the feeds of the workers in this process, and one
replica in another, as `--router-event-threads` makes it, and in a thread for comparison, without
the lock that it would need: who asks the index finds it half changed. All on this machine. About a
minute.

steady: 64 full caches of 8,192 blocks, events of 16 blocks, as many stored as removed.
announced: half of that from 8 caches of 16,384, and every 0.66 s one of these announces itself
anew, in records of up to 256 KiB.

late: how long after it was written a heartbeat is handled, one each millisecond, written by another
process. of it computing: how much of that the loop's own thread was at work, which others on the
machine do not change.
"""

import asyncio
import itertools
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec

from benchmarks.bench_lag import register, told
from benchmarks.event_threads_replica import Measured
from benchmarks.processes import main_of_rounds, row, running
from eventstore.connect import Nats
from eventstore.events import BlockRemoved, BlockStored
from eventstore.jetstream import JetStreamLog
from eventstore.server import EmbeddedServer
from workers.kv_cache import KvEvent
from workers.kv_feed import KvFeed

BLOCKS = 16
HOWS = {
    "no events at all": "none",
    "--router-event-threads 1": "1",
    "--router-event-threads 2": "2",
    "a thread, switching after 5 ms": "thread-5",
    "a thread, switching after 0.5 ms": "thread-0.5",
}
WITHIN_S = 20.0


class Load(NamedTuple):
    """blocks_per_s: of changes, stored and removed. step_s: of an engine, which tells then what it
    changed. announce_every_s: 0 for never."""

    name: str
    workers: int
    cache_blocks: int
    blocks_per_s: int
    step_s: float
    announce_every_s: float


LOADS = (
    Load("steady", 64, 8_192, 50_000, 0.041, 0.0),
    Load("announced", 8, 16_384, 25_000, 0.02, 0.66),
)


class Worker:
    """A full cache, and its feed."""

    def __init__(self, log: JetStreamLog, namespace: str, number: int, cache_blocks: int) -> None:
        self.worker_id = Random(number).getrandbits(64)
        self._rng = Random(number)
        self._chains = deque(self._chain() for _ in range(cache_blocks // BLOCKS))
        self.feed = KvFeed(
            log,
            namespace,
            self.worker_id,
            0,
            lambda: [BlockStored(self.worker_id, 0, None, chain) for chain in self._chains],
            contents_max=len(self._chains) + 1,
            on_log_rewound=lambda: None,
        )

    def change(self, chains: int) -> int:
        """Publish what a step brings about; how many blocks that concerns."""
        changes: list[KvEvent] = []
        for _ in range(chains):
            self._chains.append(self._chain())
            changes.append(BlockStored(self.worker_id, 0, None, self._chains[-1]))
            changes.append(BlockRemoved(self.worker_id, 0, self._chains.popleft()))
        self.feed.publish(changes)
        return len(changes) * BLOCKS

    def _chain(self) -> list[int]:
        return [self._rng.getrandbits(64) for _ in range(BLOCKS)]


async def publish(load: Load, workers: list[Worker], seconds: float) -> float:
    """Publish for so long; returns the blocks a second."""
    began_s = time.monotonic()
    chains = max(1, round(load.blocks_per_s * load.step_s / load.workers / BLOCKS / 2))
    announced_s, announcing = began_s, itertools.cycle(workers)
    blocks = 0
    for step in itertools.count():
        for place, worker in enumerate(workers):
            due_s = began_s + (step + place / len(workers)) * load.step_s
            if due_s - began_s >= seconds:
                return blocks / seconds
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            blocks += worker.change(chains)
            if load.announce_every_s and due_s - announced_s >= load.announce_every_s:
                announced_s = due_s
                one = next(announcing)
                one.feed.announce_after(one.feed.epoch)
                blocks += load.cache_blocks
    raise AssertionError  # it counts for ever


async def measure(
    server: EmbeddedServer, log: JetStreamLog, namespace: str, load: Load, how: str, seconds: float
) -> tuple[float, Measured]:
    workers = [Worker(log, namespace, n, load.cache_blocks) for n in range(load.workers)]
    await register(log, namespace, [worker.worker_id for worker in workers])
    for worker in workers:
        worker.feed.start()
    for worker in workers:
        await worker.feed.flush(WITHIN_S)
    argv = [sys.executable, "-m", "benchmarks.event_threads_replica", server.url, namespace]
    output = server.store_dir / "replicas.log"
    with ExitStack() as stack:
        replica = stack.enter_context(running([*argv, how, str(seconds)], log=output, pipes=True))
        await told(replica)
        assert replica.stdin is not None
        print(file=replica.stdin, flush=True)
        rate = 0.0 if how == "none" else await publish(load, workers, seconds)
        measured = msgspec.json.decode(await told(replica), type=Measured)
    for worker in workers:
        await worker.feed.close(WITHIN_S)
    return rate, measured


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def run(seconds: float, rounds: int) -> list[str]:
    table: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory)) as server:
            nats = await Nats.connect([server.url], name="bench_event_threads")
            for load in LOADS:
                found: dict[str, list[tuple[float, Measured]]] = {name: [] for name in HOWS}
                for number in range(rounds):
                    for name, how in HOWS.items():
                        namespace = f"{load.name}-{how.replace('.', '_')}-{number}"
                        log = await JetStreamLog.open(nats, namespace)
                        found[name].append(
                            await measure(server, log, namespace, load, how, seconds)
                        )
                        await log.close()
                for name, results in found.items():
                    table += [f"{load.name}: {name}", *lines(results)]
            await nats.close()
    return table


def lines(results: list[tuple[float, Measured]]) -> list[str]:
    all_of = [measured for _, measured in results]
    table = [row("  blocks", [rate / 1e3 for rate, _ in results], "k/s")]
    for what, beats in (
        ("late", [one.late_ms for one in all_of]),
        ("of it computing", [one.busy_ms for one in all_of]),
    ):
        for name, share in (("p99", 0.99), ("p99.9", 0.999), ("longest", 1.0)):
            table.append(
                row(f"  {what}: {name}", [percentile(each, share) for each in beats], "ms")
            )
    table.append(row("  CPU of the loop's thread", [one.loop_cpu * 100 for one in all_of], "%"))
    table.append(row("  CPU of its process", [one.cpu * 100 for one in all_of], "%"))
    table.append(row("  CPU of the one that receives", [o.helper_cpu * 100 for o in all_of], "%"))
    return table


if __name__ == "__main__":
    main_of_rounds(run, __doc__, seconds=3.0, rounds=1)
