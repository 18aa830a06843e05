"""A radix tree as plain data, and back.

The tree is cut into chains: runs of blocks that follow one another and have the same holders. The
cut depends only on which rank holds what, not on how it came about, so equal trees have equal dumps
and, as MessagePack, equal bytes: about 9 bytes a block in chains of 16, however many ranks hold it.
"""

import struct
from collections.abc import Iterator, Sequence

from msgspec import Struct

from indexer.masks import slots_of
from indexer.radix import RadixTree, WorkerRank


class Chain(Struct, frozen=True, array_like=True, gc=False):
    """Blocks that follow one another below `parent_hash` (None: the root), all with these holders.

    A parent that a holder does not hold is a hole in that rank's cache.
    """

    holders: list[int]
    """Positions in `TreeDump.ranks`, ascending."""
    parent_hash: int | None
    sequence_hashes: bytes
    """Little-endian u64 each."""


class TreeDump(Struct, frozen=True, array_like=True):
    """Everything that a `RadixTree` knows."""

    ranks: list[WorkerRank]
    """All registered ranks, sorted; also those without blocks."""
    chains: list[Chain]
    """Each after the chain that it continues."""


def dump(tree: RadixTree) -> TreeDump:
    """The tree as data. O(pairs + blocks · log(blocks)); does not modify the tree."""
    ranks = tree.ranks()
    place_of = {tree.slot_of(rank): place for place, rank in enumerate(ranks)}
    places: dict[int, list[int]] = {}
    chains = []
    masks = tree.holders()
    for parent_hash, hashes in _chains(tree):
        mask = masks[hashes[0]]
        if mask not in places:
            places[mask] = sorted(place_of[slot] for slot in slots_of(mask))
        chains.append(Chain(places[mask], parent_hash, struct.pack(f"<{len(hashes)}Q", *hashes)))
    return TreeDump(ranks, chains)


def load(dumped: TreeDump) -> RadixTree:
    """The tree that `dump` described. About 0.5 µs a (block, rank) pair.

    A dump that is not one raises IndexError or struct.error.
    """
    tree = RadixTree()
    for rank in dumped.ranks:
        tree.add_rank(rank)
    for chain in dumped.chains:
        for _ in store_chain(tree, dumped.ranks, chain):
            pass
    return tree


def store_chain(tree: RadixTree, ranks: Sequence[WorkerRank], chain: Chain) -> Iterator[int]:
    """Give the chain to each of its holders, one a step; yields the blocks that it has.

    ranks: those of the dump, registered. Raises as `load`.
    """
    count = len(chain.sequence_hashes) // 8
    hashes = struct.unpack(f"<{count}Q", chain.sequence_hashes)
    for place in chain.holders:
        tree.store(ranks[place], chain.parent_hash, hashes)
        yield count


def _chains(tree: RadixTree) -> Iterator[tuple[int | None, list[int]]]:
    """Cut the tree into (parent, blocks), each chain after the one it continues."""
    masks = tree.holders()
    parents = tree.parents()
    below = dict(zip(parents.values(), parents, strict=True))
    more_below: dict[int, list[int]] = {}
    if len(below) != len(parents):
        for block, parent in parents.items():
            if below[parent] != block:
                more_below.setdefault(parent, []).append(block)
    for absent in below.keys() - masks.keys():
        del below[absent]
    waiting = [block for block in masks if parents.get(block) not in masks]
    waiting.sort(reverse=True)
    while waiting or below:
        # Only events that name two predecessors for a block can leave a ring, which has no top.
        block = waiting.pop() if waiting else min(below)
        mask = masks[block]
        chain = [block]
        while (child := below.pop(block, None)) is not None:
            if block not in more_below:
                if masks[child] != mask:
                    waiting.append(child)
                    break
                block = child
                chain.append(block)
                continue
            # Go on along the least child with the same holders; the others begin chains anew.
            children = sorted((child, *more_below[block]), reverse=True)
            continued = [child for child in children if masks[child] == mask][-1:]
            waiting += [child for child in children if child not in continued]
            if not continued:
                break
            block = continued[0]
            chain.append(block)
        yield parents.get(chain[0]), chain
