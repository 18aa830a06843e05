"""One replica of `bench_lag`: a process of its own that notes when it has applied what.

    python -m benchmarks.lag_replica NATS_URL NAMESPACE EVENTS WITHIN_S

It says `ready` when it is at the head of the log, and once it has applied EVENTS changes of KV
caches a JSON line of `Applied`. It fails if that takes longer than WITHIN_S.
"""

import asyncio
import sys
import time

import msgspec
import uvloop
from msgspec import Struct

from eventstore.connect import Nats
from eventstore.events import AnyEvent, BlockRemoved, BlockStored
from eventstore.jetstream import JetStreamLog
from router.replica import Replica


class Applied(Struct, frozen=True):
    """times_s: of `time.monotonic`, which all processes of a machine share; by worker, in order.
    cpu_s: of the process, since it was ready."""

    times_s: dict[int, list[float]]
    cpu_s: float


class Watch:
    """Notes the changes that a replica applies, until `count` of them are there."""

    def __init__(self, count: int) -> None:
        self.times_s: dict[int, list[float]] = {}
        self.complete = asyncio.Event()
        self._left = count

    def observe(self, events: list[AnyEvent]) -> None:
        now_s = time.monotonic()
        for event in events:
            if isinstance(event, BlockStored | BlockRemoved):
                self.times_s.setdefault(event.worker_id, []).append(now_s)
                self._left -= 1
        if self._left <= 0:
            self.complete.set()


async def main() -> None:
    url, namespace, count, within_s = sys.argv[1:]
    watch = Watch(int(count))
    nats = await Nats.connect([url], name="lag_replica")
    log = await JetStreamLog.open(nats, namespace)
    replica = Replica(log, time.time_ns, observe=watch.observe)
    running = asyncio.create_task(replica.run())
    async with asyncio.timeout(float(within_s)):
        await replica.wait_ready()
        print("ready", flush=True)
        cpu_s = time.process_time()
        await watch.complete.wait()
        applied = Applied(watch.times_s, time.process_time() - cpu_s)
    print(msgspec.json.encode(applied).decode(), flush=True)
    running.cancel()
    await asyncio.wait([running])
    await log.close()
    await nats.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
