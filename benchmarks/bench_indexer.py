"""What do hashing a prompt, finding its matches, and storing and removing blocks cost?

    python -m benchmarks.bench_indexer [--out FILE]

Each tree is a cluster in use: every worker holds four system prompts of 64 blocks and many chains
of its own below them. About 30 s and 350 MB.

find: the same prompt again and again: it begins with a system prompt, seven workers hold more of
    it, each to another depth, and its last tenth is new. "In groups" is the form that the router
    asks for. With a hole: one of the workers has evicted a block from the middle.
store, remove: one event comes, the oldest of the same worker goes; every third event is one that
    another worker stored before. They come to the workers in random order, so that most of the
    cost is waiting for memory that is in no cache. Decoding them is not counted.
warm: one event stored and removed over and over: the cost without the waiting.
predict: prompts of 200 blocks, each inserted once where it was routed and again by a later prompt
    that repeats it; as many blocks expire as come. A pair is a block on one worker.
"""

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter_ns

import msgspec

from benchmarks.processes import machine, row, rss_mib
from indexer.blocks import prompt_hashes
from indexer.dump import TreeDump, dump, load
from indexer.predicted import PredictedIndex
from indexer.radix import RadixTree, WorkerRank

ROUNDS = 7
SYSTEM_PROMPT_BLOCKS = 64
HELD_BLOCKS = {8: 16_000, 64: 4_000, 1_000: 500}
"""Blocks of its own that each worker holds, by number of workers."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, list[int]]).decode


class Cluster:
    """Workers that store and evict, as an index sees them."""

    def __init__(self, workers: int, event_blocks: int) -> None:
        self.random = Random(workers)
        self.event_blocks = event_blocks
        self.tree = RadixTree()
        self.ranks = [WorkerRank(self.random.getrandbits(64), 0) for _ in range(workers)]
        self.system_prompts = [self.hashes(SYSTEM_PROMPT_BLOCKS) for _ in range(4)]
        self.held: list[deque[bytes]] = [deque() for _ in self.ranks]
        self.recent: deque[bytes] = deque(maxlen=256)
        for rank in self.ranks:
            self.tree.add_rank(rank)
            for system_prompt in self.system_prompts:
                self.tree.store(rank, None, list(system_prompt))
        for worker, rank in enumerate(self.ranks):
            while len(self.held[worker]) * event_blocks < HELD_BLOCKS[workers]:
                self.tree.store(rank, *_decode(self.next_event(worker)))

    def hashes(self, count: int) -> list[int]:
        return [self.random.getrandbits(64) for _ in range(count)]

    def next_event(self, worker: int) -> bytes:
        """A chain below a system prompt, every third time one that was stored lately."""
        if len(self.recent) > 16 and self.random.random() < 1 / 3:
            event = self.random.choice(self.recent)
        else:
            parent_hash = self.random.choice(self.system_prompts)[-1]
            event = _encode((parent_hash, self.hashes(self.event_blocks)))
            self.recent.append(event)
        self.held[worker].append(event)
        return event

    def turnover(self, events: int) -> tuple[float, float]:
        """Store and remove so many events; ns a block of both."""
        store_ns = remove_ns = 0
        for worker in self.random.choices(range(len(self.ranks)), k=events):
            rank = self.ranks[worker]
            parent_hash, stored = _decode(self.next_event(worker))
            _, removed = _decode(self.held[worker].popleft())
            start_ns = perf_counter_ns()
            self.tree.store(rank, parent_hash, stored)
            middle_ns = perf_counter_ns()
            self.tree.remove(rank, removed)
            store_ns += middle_ns - start_ns
            remove_ns += perf_counter_ns() - middle_ns
        blocks = events * self.event_blocks
        return store_ns / blocks, remove_ns / blocks

    def warm(self) -> tuple[float, float]:
        """Store and remove one event over and over; ns a block of both."""
        parent_hash = self.system_prompts[0][-1]
        hashes = self.hashes(self.event_blocks)
        stores, removals = [], []
        for _ in range(200):
            start_ns = perf_counter_ns()
            self.tree.store(self.ranks[-1], parent_hash, hashes)
            middle_ns = perf_counter_ns()
            self.tree.remove(self.ranks[-1], hashes)
            removals.append(perf_counter_ns() - middle_ns)
            stores.append(middle_ns - start_ns)
        return median(stores) / self.event_blocks, median(removals) / self.event_blocks

    def conversation(self, blocks: int) -> list[int]:
        """A prompt of so many blocks that seven workers know more or less of."""
        prompt = [*self.system_prompts[0], *self.hashes(blocks - SYSTEM_PROMPT_BLOCKS)]
        for share, rank in enumerate(self.ranks[:7], start=3):
            known = prompt[SYSTEM_PROMPT_BLOCKS : blocks * share // 10]
            self.tree.store(rank, prompt[SYSTEM_PROMPT_BLOCKS - 1], known)
        return prompt


def each_us(repeat: int, work: Callable[..., object], *arguments: object) -> list[float]:
    """µs of one call, by round."""
    rounds = []
    for _ in range(ROUNDS):
        start_ns = perf_counter_ns()
        for _ in range(repeat):
            work(*arguments)
        rounds.append((perf_counter_ns() - start_ns) / repeat / 1_000)
    return rounds


def hashing() -> Iterator[str]:
    tokens = Random(1).choices(range(150_000), k=10_000)
    for block_size in (16, 64):
        times = each_us(50, prompt_hashes, tokens, block_size)
        yield row(f"hash 10k tokens, blocks of {block_size}", times, "µs", "aim ≤ 500")


def finding(cluster: Cluster) -> Iterator[str]:
    tree, workers = cluster.tree, len(cluster.ranks)
    for blocks in (625, 6_250):
        prompt = cluster.conversation(blocks)
        assert len(set(tree.find_matches(prompt).values())) == 8
        at = f"{blocks:,} blocks, {workers:,} workers"
        aim = "aim ≤ 15" if (blocks, workers) == (625, 64) else ""
        yield row(f"find, {at}", each_us(200, tree.find_matches, prompt), "µs", aim)
        yield row(f"  in groups, {at}", each_us(200, tree.match_depths, prompt), "µs", aim)
        hole = prompt[SYSTEM_PROMPT_BLOCKS]
        tree.remove(cluster.ranks[0], [hole])
        yield row(f"  with a hole, {at}", each_us(50, tree.find_matches, prompt), "µs")
        tree.store(cluster.ranks[0], None, prompt[: SYSTEM_PROMPT_BLOCKS + 2])


def changing(cluster: Cluster) -> Iterator[str]:
    at = f"{cluster.event_blocks} blocks, {len(cluster.ranks):,} workers"
    events = 20_000 // cluster.event_blocks
    stores, removals = zip(*(cluster.turnover(events) for _ in range(ROUNDS)), strict=True)
    yield row(f"store a block, in {at}", stores, "ns", "aim ≤ 300")
    yield row(f"remove a block, in {at}", removals, "ns", "aim ≤ 300")
    stores, removals = zip(*(cluster.warm() for _ in range(ROUNDS)), strict=True)
    yield row(f"  store, warm, in {at}", stores, "ns", "aim ≤ 300")
    yield row(f"  remove, warm, in {at}", removals, "ns", "aim ≤ 300")


def dumping(cluster: Cluster) -> Iterator[str]:
    tree = cluster.tree
    pairs = tree.pair_count
    encoded = msgspec.msgpack.encode(dump(tree))
    read = msgspec.msgpack.Decoder(TreeDump).decode
    dumps, loads = [], []
    for _ in range(3):
        start_ns = perf_counter_ns()
        msgspec.msgpack.encode(dump(tree))
        middle_ns = perf_counter_ns()
        loaded = load(read(encoded))
        loads.append((perf_counter_ns() - middle_ns) / pairs)
        dumps.append((middle_ns - start_ns) / pairs)
        assert loaded.digest() == tree.digest()
    at = f"{len(cluster.ranks):,} workers, {pairs:,} pairs"
    yield row(f"dump a pair, {at}", dumps, "ns")
    yield row(f"load a pair, {at}", loads, "ns", "aim ≤ 1,000")
    yield row(f"  size of a pair, {at}", [len(encoded) / pairs], "B", "aim ≤ 12")


class Predictions:
    """A predicted index in use by 64 workers, and the prompts that were routed lately."""

    workers = 64
    prompts = 6_000
    prompt_blocks = 200

    def __init__(self) -> None:
        self.random = Random(self.workers)
        self.index = PredictedIndex()
        self.system_prompts = [self.hashes(SYSTEM_PROMPT_BLOCKS) for _ in range(4)]
        self.recent: deque[tuple[int, bytes]] = deque(maxlen=256)
        self.now = 0
        for _ in range(self.prompts):
            self.insert_new()

    def hashes(self, count: int) -> list[int]:
        return [self.random.getrandbits(64) for _ in range(count)]

    def insert(self, slot: int, hashes: list[int]) -> int:
        """Time goes by one a prompt, and a prompt expires after `prompts` others. Returns ns."""
        self.now += 1
        start_ns = perf_counter_ns()
        self.index.insert(slot, hashes, self.now + self.prompts)
        return perf_counter_ns() - start_ns

    def insert_new(self) -> int:
        system_prompt = self.random.choice(self.system_prompts)
        hashes = [*system_prompt, *self.hashes(self.prompt_blocks - SYSTEM_PROMPT_BLOCKS)]
        slot = self.random.randrange(self.workers)
        self.recent.append((slot, _encode((slot, hashes))))
        return self.insert(slot, hashes)

    def some_recent(self) -> tuple[int, list[int]]:
        """A prompt that was routed lately, decoded anew, as from the log."""
        slot, event = self.random.choice(self.recent)
        return slot, _decode(event)[1]

    def turnover(self, requests: int) -> tuple[float, float, float, float]:
        """ns a block of a new prompt, of a repeated one, ns an expired pair; µs a match."""
        new_ns = renewed_ns = expired_ns = match_ns = expired = 0
        for _ in range(requests):
            new_ns += self.insert_new()
            renewed_ns += self.insert(*self.some_recent())
            start_ns = perf_counter_ns()
            expired += self.index.expire(self.now)
            expired_ns += perf_counter_ns() - start_ns
            prompt = self.some_recent()[1]
            start_ns = perf_counter_ns()
            self.index.match_depths(prompt)
            match_ns += perf_counter_ns() - start_ns
        blocks = requests * self.prompt_blocks
        each_ns = new_ns / blocks, renewed_ns / blocks, expired_ns / max(1, expired)
        return *each_ns, match_ns / requests / 1_000


def predicting() -> Iterator[str]:
    before_mib = rss_mib(os.getpid())
    predictions = Predictions()
    pairs = len(predictions.index)
    size = (rss_mib(os.getpid()) - before_mib) * 2**20 / pairs
    rounds = [predictions.turnover(500) for _ in range(ROUNDS)]
    new, renewed, expired, matches = zip(*rounds, strict=True)
    yield row("predict a new block", new, "ns", "aim ≤ 400")
    yield row("  a block again", renewed, "ns", "aim ≤ 400")
    yield row("  expire a pair", expired, "ns")
    yield row(f"  match {predictions.prompt_blocks} blocks", matches, "µs")
    yield row(f"  size of a pair, {pairs:,} pairs", [size], "B", "aim ≤ 150")


def table() -> Iterator[str]:
    yield machine("msgspec", "xxhash")
    yield ""
    yield from hashing()
    yield ""
    yield from predicting()
    for workers in HELD_BLOCKS:
        yield ""
        cluster = Cluster(workers, 16)
        yield from changing(cluster)
        yield from finding(cluster)
        yield from dumping(cluster)
        yield from changing(Cluster(workers, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
