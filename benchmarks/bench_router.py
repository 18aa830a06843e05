"""What a decision and an applied event cost: choosing at 8, 64 and 1,000 workers, folding.

    python -m benchmarks.bench_router [--out FILE]

A choice is measured whole: candidates, overlaps by bisection, load, costs, the pick, the recorded
reasons. Prompts have 625 blocks of 16 tokens: 30 of a system prompt that every worker holds, the
rest held to different depths by up to 8 workers. Every worker runs two requests.
"""

import argparse
import asyncio
import time
from pathlib import Path
from random import Random

from benchmarks.processes import machine, row
from eventstore import codec, events
from eventstore.log import Record
from eventstore.memory import MemoryLog
from eventstore.publisher import Publisher
from router.decision import RoutedRequest, RouterOptions
from router.fold import apply
from router.replica import Replica
from router.router import Router
from router.selection import RouterMode
from router.state import RouterState

BLOCKS = 625
SHARED = 30
BLOCK_SIZE = 16
HOLDERS = 8
ROUNDS = 7
CALLS = 100


class Cluster:
    """A folded state with `workers` workers under load, and a router over it."""

    def __init__(self, workers: int) -> None:
        rng = Random(1)
        self.state = RouterState()
        self._number: dict[str, int] = {}
        self.prompt = [rng.getrandbits(64) for _ in range(BLOCKS)]
        shared = self.prompt[:SHARED]
        for worker in range(workers):
            self.write(
                f"worker.{worker}", events.WorkerRegistered(worker, "m", "aggregated", BLOCK_SIZE)
            )
            depth = rng.randrange(SHARED, BLOCKS) if worker < HOLDERS else SHARED
            stored = events.BlockStored(worker, 0, None, self.prompt[:depth])
            self.write(f"kv.{worker}.0", stored)
        for index in range(2 * workers):
            chain = shared + [rng.getrandbits(64) for _ in range(rng.randrange(10, 40))]
            self.write(f"request.{index % 4}", *self.request(f"r{index}", index % workers, chain))
        replica = Replica(MemoryLog(lambda: 0), lambda: 0)
        replica.state = self.state
        replica._ready.set()
        self.router = Router(
            replica=replica,
            publisher=Publisher(MemoryLog(lambda: 0), "bench", "request.9", 1),
            options=RouterOptions(mode=RouterMode.KV, replica_sync=True),
            frontend_id=9,
            rng=rng,
        )
        for worker in range(workers):
            self.router.serve(worker, "m")

    def write(self, producer: str, *written: events.AnyEvent) -> None:
        first = self._number.get(producer, 0)
        self._number[producer] = first + len(written)
        data = codec.encode(producer, 1, first, list(written))
        apply(self.state, Record(self.state.cursor + 1, 0, "s", data))

    @staticmethod
    def request(request_id: str, worker: int, chain: list[int]) -> list[events.AnyEvent]:
        isl = len(chain) * BLOCK_SIZE
        return [
            events.RequestAccepted(request_id, 9, "m", "chat_completions", isl, None, True),
            events.RequestRouted(
                request_id, 0, worker, 0, "kv", isl, SHARED, chain, 0, 1.0, 0.0, 1, [], "m"
            ),
        ]

    def choose_us(self) -> tuple[list[float], list[float]]:
        """Whole decisions, and their part after the matching, in µs: one median a round."""
        request = RoutedRequest(
            request_id="q",
            model="m",
            endpoint="chat_completions",
            isl=BLOCKS * BLOCK_SIZE + 3,
            block_size=BLOCK_SIZE,
            sequence_hashes=self.prompt,
        )
        whole, scheduling = [], []
        for _ in range(ROUNDS):
            times, parts = [], []
            for _ in range(CALLS):
                started = time.perf_counter()
                eligible, load = self.router.eligible(request)
                _, matching_s = self.router._decision(request, 0, eligible, load, started)
                took_s = time.perf_counter() - started
                times.append(took_s * 1e6)
                parts.append((took_s - matching_s) * 1e6)
            whole.append(sorted(times)[CALLS // 2])
            scheduling.append(sorted(parts)[CALLS // 2])
        return whole, scheduling


def fold_us(make: str) -> tuple[list[float], int]:
    """µs an event when folding batches, and events a batch. make: kv or requests."""
    results = []
    for seed in range(ROUNDS):
        rng = Random(seed)
        state = RouterState()
        records: list[bytes] = []
        for worker in range(8):
            event = events.WorkerRegistered(worker, "m", "aggregated", BLOCK_SIZE)
            records.append(codec.encode(f"worker.{worker}", 1, 0, [event]))
        batch = 64
        for index in range(200):
            written: list[events.AnyEvent] = []
            for each in range(batch // 4):
                chain = [rng.getrandbits(64) for _ in range(16)]
                if make == "kv":
                    parent = None
                    for _ in range(4):
                        written.append(events.BlockStored(index % 8, 0, parent, chain))
                        parent, chain = chain[-1], [rng.getrandbits(64) for _ in range(16)]
                else:
                    name = f"{index}.{each}"
                    written += Cluster.request(name, index % 8, chain)
                    written.append(events.PrefillCompleted(name, 0))
                    written.append(events.RequestCompleted(name, 9, "stop", 0))
            producer = f"kv.{index % 8}.0" if make == "kv" else "request.1"
            first = (index // 8 if make == "kv" else index) * batch
            records.append(codec.encode(producer, 1, first, written))
        log = [Record(seq, 0, "s", data) for seq, data in enumerate(records, 1)]
        started = time.process_time()
        for record in log:
            apply(state, record)
        results.append((time.process_time() - started) * 1e6 / (200 * batch))
    return results, batch


async def results() -> list[str]:
    lines = [machine("msgspec", "xxhash"), ""]
    for workers, aim in ((8, ""), (64, ""), (1000, "150 µs")):
        whole, scheduling = Cluster(workers).choose_us()
        lines.append(row(f"choose, {workers} workers, matching included", whole, "µs"))
        lines.append(row(f"choose, {workers} workers, after matching", scheduling, "µs", aim))
    for make, unit in (("kv", "event of 16 blocks"), ("requests", "event of a request's life")):
        times, batch = fold_us(make)
        lines.append(row(f"fold, per {unit}, {batch} a batch", times, "µs CPU"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    text = "\n".join(asyncio.run(results())) + "\n"
    print(text, end="")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main()
