"""How long until a frontend and a worker serve, and how much memory do they hold then?

    python -m benchmarks.bench_startup [--rounds 5] [--out FILE]

A frontend serves when its /health says so; a mock worker when that frontend lists its model. Both
start on a running nats-server with a log that is new. Under a minute.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from msgspec import Struct

from benchmarks import processes
from benchmarks.processes import row, running
from eventstore.server import EmbeddedServer

READY_S = 30.0
ROUNDS = 5


class Round(Struct, frozen=True):
    """Times in ms from starting the process, memory in MiB."""

    frontend_ms: float
    frontend_mib: float
    worker_ms: float
    worker_mib: float


def measure(nats_url: str, namespace: str, logs: Path) -> Round:
    """Start a frontend, then a worker, and end both."""
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    where = ["--namespace", namespace, "--nats-url", nats_url]
    argv = [sys.executable, "-m", "frontend", "--router-mode", "kv", *where]
    argv += ["--http-host", "127.0.0.1", "--http-port", str(port)]
    started_s = time.perf_counter()
    with running(argv, log=logs / "frontend.log") as frontend:
        processes.wait_for_text(frontend, f"{url}/health", '"healthy"', READY_S)
        frontend_s = time.perf_counter() - started_s
        frontend_mib = processes.rss_mib(frontend.pid)
        argv = [sys.executable, "-m", "workers", "mock", *where]
        started_s = time.perf_counter()
        with running(argv, log=logs / "worker.log") as worker:
            processes.wait_for_text(frontend, f"{url}/v1/models", '"id"', READY_S)
            worker_s = time.perf_counter() - started_s
            worker_mib = processes.rss_mib(worker.pid)
    return Round(1e3 * frontend_s, frontend_mib, 1e3 * worker_s, worker_mib)


async def run(rounds: int, directory: Path) -> list[str]:
    """The lines of the result."""
    async with EmbeddedServer(directory / "nats") as nats:
        found = [
            # A first round, not counted, compiles the modules and fills the file cache.
            await asyncio.to_thread(measure, nats.url, f"bench{number}", directory)
            for number in range(rounds + 1)
        ][1:]
    return [
        processes.machine("aiohttp", "uvloop", "nats-py"),
        f"{rounds} rounds; median, lowest to highest",
        "",
        row("frontend, until /health is healthy", [one.frontend_ms for one in found], "ms"),
        row("frontend, resident memory", [one.frontend_mib for one in found], "MiB"),
        row("mock worker, until a frontend lists it", [one.worker_ms for one in found], "ms"),
        row("mock worker, resident memory", [one.worker_mib for one in found], "MiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = "\n".join(asyncio.run(run(options.rounds, Path(directory)))) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
