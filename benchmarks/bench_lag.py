"""How old is what a router believes: how long until every replica has applied what a worker says?

    python -m benchmarks.bench_lag [--seconds N] [--rounds N] [--out FILE]

An embedded nats-server on a temporary file store, three replicas in a process each, and 8 workers'
feeds in this one, all on this machine. Events are `kv.block_stored` and, from full caches,
`kv.block_removed` of 16 blocks, evenly in time and over the workers. About 40 s.

applied by all: from `KvFeed.publish` until the last of the replicas has applied it, of all events
but those of the first half second. The feed's own linger of up to 5 ms is in it.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean, quantiles
from typing import NamedTuple

import msgspec

from benchmarks.lag_replica import Applied
from benchmarks.processes import cpu_s, main_of_rounds, row, running
from eventstore import codec
from eventstore.connect import Nats
from eventstore.events import BlockRemoved, BlockStored, WorkerRegistered
from eventstore.jetstream import JetStreamLog
from eventstore.server import EmbeddedServer
from eventstore.subjects import subject, worker_producer
from workers.kv_cache import KvEvent
from workers.kv_feed import KvFeed

RATES = (1_000, 5_000)
REPLICAS = 3
WORKERS = 8
BLOCKS = 16
CHAINS = 64
"""That a full cache holds."""
WARM_UP_S = 0.5
WITHIN_S = 30.0
"""Of a round, beside the time that events are published for."""


class Round(NamedTuple):
    """`lags_s`: one for each event. CPU in seconds an event; that of the replicas, of each."""

    rate: float
    lags_s: list[float]
    feeds_cpu_s: float
    server_cpu_s: float
    replica_cpu_s: float


def changes(worker: int) -> Iterator[KvEvent]:
    """What a busy cache does, once it is full: a chain in, a chain out."""
    rng = Random(worker)
    cache: deque[list[int]] = deque()
    while True:
        chain = [rng.getrandbits(64) for _ in range(BLOCKS)]
        cache.append(chain)
        yield BlockStored(worker, 0, None, chain)
        if len(cache) > CHAINS:
            yield BlockRemoved(worker, 0, cache.popleft())


async def register(log: JetStreamLog, namespace: str, workers: Sequence[int]) -> None:
    for worker in workers:
        producer = worker_producer(worker)
        data = codec.encode(producer, 1, 0, [WorkerRegistered(worker, "m", "aggregated", 16)])
        await log.append(subject(namespace, producer), data, msg_id=producer)


async def publish(feeds: Mapping[int, KvFeed], rate: int, count: int) -> dict[int, list[float]]:
    """`count` events, evenly in time; returns by worker when each was handed over."""
    each = -(-count // len(feeds))
    waiting = {worker: iter(list(islice(changes(worker), each))) for worker in feeds}
    workers = list(feeds)
    published: dict[int, list[float]] = {worker: [] for worker in workers}
    began_s = time.monotonic()
    for number in range(count):
        early_s = began_s + number / rate - time.monotonic()
        if early_s > 0:
            await asyncio.sleep(early_s)
        worker = workers[number % len(workers)]
        event = next(waiting[worker])
        published[worker].append(time.monotonic())
        feeds[worker].publish([event])
    return published


async def told(replica: "subprocess.Popen[str]") -> str:
    """Its next line."""
    assert replica.stdout is not None
    line = await asyncio.to_thread(replica.stdout.readline)
    if not line:
        raise RuntimeError(f"{replica.args!r} ended; its words are in the log beside the store")
    return line


async def measure(
    server: EmbeddedServer, log: JetStreamLog, namespace: str, rate: int, seconds: float
) -> Round:
    count = int(rate * seconds)
    workers = [Random(number).getrandbits(64) for number in range(WORKERS)]
    await register(log, namespace, workers)
    argv = [sys.executable, "-m", "benchmarks.lag_replica", server.url, namespace]
    argv += [str(count), str(seconds + WITHIN_S)]
    output = server.store_dir / "replicas.log"
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(running(argv, log=output, pipes=True)) for _ in range(REPLICAS)
        ]
        await asyncio.gather(*map(told, replicas))
        feeds = {
            worker: KvFeed(
                log, namespace, worker, 0, lambda: [], contents_max=0, on_log_rewound=lambda: None
            )
            for worker in workers
        }
        for feed in feeds.values():
            feed.start()
        assert server.pid is not None
        own_cpu_s, server_cpu_s = time.process_time(), cpu_s(server.pid)
        began_s = time.monotonic()
        published = await publish(feeds, rate, count)
        took_s = time.monotonic() - began_s
        lines = await asyncio.gather(*map(told, replicas))
        own_cpu_s = time.process_time() - own_cpu_s
        server_cpu_s = cpu_s(server.pid) - server_cpu_s
        for feed in feeds.values():
            await feed.close(WITHIN_S)
    found = [msgspec.json.decode(line, type=Applied) for line in lines]
    lags_s = [
        max(applied) - at_s
        for worker, times_s in published.items()
        for at_s, *applied in zip(times_s, *(one.times_s[worker] for one in found), strict=True)
        if at_s - began_s >= WARM_UP_S
    ]
    return Round(
        count / took_s,
        lags_s,
        own_cpu_s / count,
        server_cpu_s / count,
        fmean(one.cpu_s for one in found) / count,
    )


async def run(seconds: float, rounds: int) -> list[str]:
    table: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory)) as server:
            nats = await Nats.connect([server.url], name="bench_lag")
            for rate in RATES:
                found = []
                for number in range(rounds):
                    namespace = f"lag-{rate}-{number}"
                    log = await JetStreamLog.open(nats, namespace)
                    found.append(await measure(server, log, namespace, rate, seconds))
                    await log.close()
                percentiles = [quantiles(one.lags_s, n=100) for one in found]
                table += [
                    f"{rate:,} events a second",
                    row("  published", [one.rate / 1e3 for one in found], "k/s"),
                    row("  applied by all: p50", [each[49] * 1e3 for each in percentiles], "ms"),
                    row("  applied by all: p99", [each[98] * 1e3 for each in percentiles], "ms"),
                    row("  applied by all: last", [max(r.lags_s) * 1e3 for r in found], "ms"),
                    row("  CPU per event, feeds", [r.feeds_cpu_s * 1e6 for r in found], "µs"),
                    row("  CPU per event, server", [r.server_cpu_s * 1e6 for r in found], "µs"),
                    row("  CPU per event, a replica", [r.replica_cpu_s * 1e6 for r in found], "µs"),
                ]
            await nats.close()
    return table


if __name__ == "__main__":
    main_of_rounds(run, __doc__, seconds=4.0, rounds=3)
