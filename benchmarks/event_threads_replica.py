"""One replica of `bench_event_threads`: a process of its own that is measured while it follows.

    python -m benchmarks.event_threads_replica NATS_URL NAMESPACE HOW SECONDS

HOW: `1`, `2`: --router-event-threads. `thread-5`, `thread-0.5`: all of the replica in a thread with
an event loop of its own, with the interpreter's switch interval in ms. `none`: no replica at all.

It says `ready` when it is at the head of the log, waits for a line, and says after SECONDS a JSON
line of `Measured`. Its event loop answers heartbeats, and asks the index 50 times a second.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from random import Random

import msgspec
import uvloop
from msgspec import Struct

from benchmarks.heartbeat import BEAT_BYTES
from benchmarks.processes import cpu_s
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from eventstore.tasks import end
from router.replica import Replica

ASK_EVERY_S = 0.02
PROMPT_BLOCKS = 625


class Measured(Struct, frozen=True):
    """late_ms: of every heartbeat, from its writing to its handling. busy_ms: how much of that the
    loop's own thread was computing; the rest is the machine's, or the interpreter lock's.
    loop_cpu, cpu: share of one core that the loop's thread and the process took. helper_cpu: of the
    process that receives."""

    late_ms: list[float]
    busy_ms: list[float]
    loop_cpu: float
    cpu: float
    helper_cpu: float


class Beats:
    """Heartbeats as the event loop sees them."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self.busy_ms: list[float] = []
        self._fd, write = os.pipe()
        os.set_blocking(self._fd, False)
        self._seen_ns = time.thread_time_ns()
        argv = [sys.executable, "-m", "benchmarks.heartbeat", str(write)]
        self._process = subprocess.Popen(argv, pass_fds=[write])
        os.close(write)
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, 65536)
        now_ns = time.monotonic_ns()
        busy_ns = time.thread_time_ns() - self._seen_ns
        for start in range(0, len(data), BEAT_BYTES):
            late_ns = now_ns - int.from_bytes(data[start : start + BEAT_BYTES], "little")
            self.late_ms.append(late_ns / 1e6)
            self.busy_ms.append(min(late_ns, busy_ns) / 1e6)
        self._seen_ns = time.thread_time_ns()

    def begin(self) -> None:
        self.late_ms.clear()
        self.busy_ms.clear()

    def end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._process.wait()


async def followed(url: str, namespace: str, how: str, ready: asyncio.Future[Replica]) -> None:
    """Follow until cancelled; `ready` may belong to another loop."""
    nats = await Nats.connect([url], name="event_threads_replica")
    log = await JetStreamLog.open(nats, namespace)
    threads = int(how) if how.isdigit() else 1
    replica = Replica(log, time.time_ns, event_threads=threads)
    running = asyncio.create_task(replica.run())
    try:
        await replica.wait_ready()
        ready.get_loop().call_soon_threadsafe(ready.set_result, replica)
        await running
    finally:
        await end(running)
        await log.close()
        await nats.close()


async def begun(url: str, namespace: str, how: str) -> tuple[Replica, "asyncio.Task[None] | None"]:
    ready: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
    if how.startswith("thread-"):
        sys.setswitchinterval(float(how.removeprefix("thread-")) / 1e3)
        follow = followed(url, namespace, how, ready)
        threading.Thread(
            target=lambda: uvloop.new_event_loop().run_until_complete(follow), daemon=True
        ).start()
        return await ready, None
    task = asyncio.create_task(followed(url, namespace, how, ready))
    return await ready, task


async def main() -> None:
    url, namespace, how, seconds = sys.argv[1:]
    beats = Beats()
    replica, task = (None, None) if how == "none" else await begun(url, namespace, how)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    rng = Random(1)
    prompts = [[rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)] for _ in range(10)]
    helper = replica.events.process if replica is not None else None
    before = time.thread_time(), time.process_time(), helper_cpu_s(helper)
    beats.begin()
    for number in range(round(float(seconds) / ASK_EVERY_S)):
        await asyncio.sleep(ASK_EVERY_S)
        if replica is not None:
            replica.state.tree.match_depths(prompts[number % len(prompts)])
    after = time.thread_time(), time.process_time(), helper_cpu_s(helper)
    loop_s, all_s, helper_s = (b - a for a, b in zip(before, after, strict=True))
    share = 1 / float(seconds)
    measured = Measured(
        beats.late_ms, beats.busy_ms, loop_s * share, all_s * share, helper_s * share
    )
    print(msgspec.json.encode(measured).decode(), flush=True)
    beats.end()
    if task is not None:
        await end(task)


def helper_cpu_s(pid: int | None) -> float:
    return 0.0 if pid is None else cpu_s(pid)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
