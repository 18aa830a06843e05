"""Our hashes and our tree against the peer's own, on what both define.

The peer's tree walks by block hash and knows blocks by the id that the engine gave them; we give it
our sequence hashes as ids. Where the two differ on purpose (a block evicted from the middle of a
chain, a chain stored below a block that the rank does not hold) nothing is compared.
"""

import json
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.blocks import block_hashes, sequence_hashes
from indexer.dump import dump, load
from indexer.radix import RadixTree, WorkerRank

peer = pytest.importorskip(
    "dynamo.llm", reason="needs the optional package ai-dynamo-runtime", exc_type=ImportError
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
RANKS = [WorkerRank(worker_id, dp_rank) for worker_id in (1, 2**63 + 5) for dp_rank in (0, 3)]
prompts = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=8)
"""Prompts by the tokens of their blocks, which are one token long."""


@given(
    st.lists(U32, max_size=60),
    st.integers(1, 20),
    st.text(max_size=8),
    st.lists(st.lists(U64, max_size=3), max_size=4),
    st.booleans(),
)
@settings(max_examples=200)
def test_block_hashes(
    tokens: list[int], block_size: int, lora: str, objects: list[list[int]], eagle: bool
) -> None:
    infos = [{"mm_objects": [{"mm_hash": u64, "offsets": []} for u64 in row]} for row in objects]
    expected = peer.compute_block_hash_for_seq(
        tokens, block_size, infos or None, lora_name=lora, is_eagle=eagle
    )
    got = block_hashes(tokens, block_size, lora_name=lora, mm_objects=objects, eagle=eagle)
    assert got == expected


class Both:
    """Both trees, fed the same events."""

    def __init__(self) -> None:
        self.ours = RadixTree()
        self.theirs = peer.RadixTree()
        for rank in RANKS:
            self.ours.add_rank(rank)

    def store(self, rank: WorkerRank, local: Sequence[int], start: int) -> None:
        """The blocks of a chain from `start` on, which the rank holds up to there."""
        hashes = sequence_hashes(local)
        parent = hashes[start - 1] if start else None
        self.ours.store(rank, parent, hashes[start:])
        blocks = [
            {"block_hash": sequence_hash, "tokens_hash": block_hash}
            for sequence_hash, block_hash in zip(hashes[start:], local[start:], strict=True)
        ]
        self.tell(rank, {"stored": {"parent_hash": parent, "blocks": blocks}})

    def remove(self, rank: WorkerRank, hashes: Sequence[int]) -> None:
        self.ours.remove(rank, hashes)
        self.tell(rank, {"removed": {"block_hashes": hashes}})

    def clear(self, rank: WorkerRank) -> None:
        self.ours.clear(rank)
        self.tell(rank, "cleared")

    def remove_worker(self, worker_id: int) -> None:
        for rank in self.ours.ranks():
            if rank.worker_id == worker_id:
                self.ours.remove_rank(rank)
                self.ours.add_rank(rank)
        self.theirs.remove_worker(worker_id)

    def tell(self, rank: WorkerRank, data: object) -> None:
        event = {"event_id": 0, "data": data, "dp_rank": rank.dp_rank}
        self.theirs.apply_event(rank.worker_id, json.dumps(event).encode())

    def agree_on(self, local: Sequence[int]) -> None:
        expected = self.theirs.find_matches(local).scores
        assert self.ours.find_matches(sequence_hashes(local)) == expected


def held_depth(tree: RadixTree, rank: WorkerRank, hashes: Sequence[int]) -> int:
    return tree.find_matches(hashes).get(rank, 0)


def subtree(tree: RadixTree, rank: WorkerRank, top: int) -> Iterator[int]:
    """The rank's blocks from `top` down, deepest first: an order in which an engine evicts them."""
    for block, parent in tree.parents().items():
        if parent == top and tree.holds(rank, block):
            yield from subtree(tree, rank, block)
    yield top


@given(st.data())
@settings(max_examples=int(__import__("os").environ.get("N", "50")))
def test_histories(data: st.DataObject) -> None:
    """Chains stored in order, evicted from the tail; ranks cleared and workers removed."""
    both = Both()
    asked = []
    for _ in range(data.draw(st.integers(0, 25))):
        rank = data.draw(st.sampled_from(RANKS))
        local = block_hashes(data.draw(prompts), 1)
        hashes = sequence_hashes(local)
        asked.append(local)
        depth = held_depth(both.ours, rank, hashes)
        action = data.draw(st.sampled_from(["store"] * 4 + ["again", "evict", "evict", "end"]))
        if action == "store" and depth < len(local):
            both.store(rank, local, depth)
        elif action == "again":
            both.store(rank, local, data.draw(st.integers(0, min(depth, len(local) - 1))))
        elif action == "evict" and depth:
            top = hashes[data.draw(st.integers(0, depth - 1))]
            both.remove(rank, list(subtree(both.ours, rank, top)))
        elif action == "end":
            if data.draw(st.booleans()):
                both.clear(rank)
            else:
                both.remove_worker(rank.worker_id)
        for prompt in asked:
            both.agree_on(prompt)
    both.ours.check()
    both.ours = load(dump(both.ours))
    for prompt in asked:
        both.agree_on(prompt)


def test_our_dump_fills_their_tree() -> None:
    """The chains of a dump, as their events, make them find what we find."""
    both = Both()
    prompts = [[1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 3, 7]]
    block_hash_of: dict[int, int] = {}
    for rank, prompt in zip(RANKS, prompts, strict=True):
        local = block_hashes(prompt, 1)
        block_hash_of.update(zip(sequence_hashes(local), local, strict=True))
        both.ours.store(rank, None, sequence_hashes(local))
    dumped = dump(both.ours)
    for chain in dumped.chains:
        blocks = [
            {"block_hash": sequence_hash, "tokens_hash": block_hash_of[sequence_hash]}
            for (sequence_hash,) in struct.iter_unpack("<Q", chain.sequence_hashes)
        ]
        for place in chain.holders:
            stored = {"parent_hash": chain.parent_hash, "blocks": blocks}
            both.tell(dumped.ranks[place], {"stored": stored})
    for prompt in prompts:
        both.agree_on(block_hashes(prompt, 1))
