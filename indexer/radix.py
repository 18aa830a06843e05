"""Which rank holds which KV blocks: a radix tree laid flat.

A sequence hash names a block together with its whole prefix, so the path from the root need not be
walked: one hash map from sequence hash to holders says everything that a tree of nodes would. The
holders are a bit mask over *slots*, small numbers that the tree lends to ranks.

Along a prompt's chain the masks only shrink, because a rank that holds a block also holds the block
before it; how deep each rank reaches is then found by bisection. The exception is a rank with a
*hole*, whose engine evicted from the middle of a chain and kept what follows. Such a held block
without its predecessor is an *orphan*. The tree knows every rank's orphans, and as long as one of
them may be concerned it runs along the chain instead, so the answer is always the leading run that
looking up every block would give.

It relies on what a sequence hash is: the same hash always follows the same hash. Events that break
this can make a match too deep, and nothing else.
"""

from collections.abc import KeysView, Mapping, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import accumulate, repeat
from operator import and_
from typing import NamedTuple, cast

from indexer.masks import add_holder, drop_holder, match_depths, select
from indexer.rank_cache import RankCache


class WorkerRank(NamedTuple):
    """What owns a KV cache: one data-parallel rank (from 0) of a worker."""

    worker_id: int
    dp_rank: int


class RadixTree:
    """The blocks of every registered rank. Hashes are u64 sequence hashes throughout.

    Every method that takes a rank, but `add_rank`, raises KeyError for one that is not registered.
    Hashes repeated in one call count once. A rank keeps its slot until it is removed, then the slot
    may go to another; only `slot_of` and the masks of `match_depths` show slots.
    """

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._caches: dict[WorkerRank, RankCache] = {}
        self._slots: dict[WorkerRank, int] = {}
        self._ranks: list[WorkerRank] = []
        """By slot; a free slot keeps the rank that it was taken from."""
        self._free: list[int] = []
        """Free slots, as a heap: the lowest is lent first, which keeps masks short."""
        self._holey = 0
        """Mask of the slots whose ranks have orphans."""

    # --- asking ----------------------------------------------------------------------------------

    def find_matches(self, sequence_hashes: Sequence[int]) -> dict[WorkerRank, int]:
        """Count, per rank, how many leading blocks it holds.

        sequence_hashes: the prompt's chain, in order; may be empty.
        Returns overlap in blocks, 1..len(sequence_hashes); ranks with none are absent. The order of
        the result means nothing. Cost: `match_depths`, then about 50 ns a rank.
        """
        overlaps: dict[WorkerRank, int] = {}
        for mask, depth in self.match_depths(sequence_hashes):
            for rank in self.ranks_of(mask):
                overlaps[rank] = depth
        return overlaps

    def match_depths(self, sequence_hashes: Sequence[int]) -> list[tuple[int, int]]:
        """`find_matches` in groups: (mask of slots, depth), depths ascending, masks disjoint.

        O(g · log(n / g)) look-ups for n blocks and g groups; O(n) where a rank with orphans holds
        the first block.
        """
        groups = match_depths(self._masks.get, sequence_hashes)
        if not groups or not self._holey & self._masks[sequence_hashes[0]]:
            return groups
        # Bisection may have stepped over holes, so its depths are upper bounds.
        reached = map(self._masks.get, sequence_hashes[: groups[-1][1]], repeat(0))
        run = list(accumulate(reached, and_))
        return match_depths(run.__getitem__, range(len(run)))

    def holds(self, rank: WorkerRank, sequence_hash: int) -> bool:
        """Does the rank hold this block? (Reached from the root or not.)"""
        return sequence_hash in self._caches[rank].held

    def blocks_of(self, rank: WorkerRank) -> int:
        """How many blocks the rank holds."""
        return len(self._caches[rank].held)

    def blocks(self, rank: WorkerRank) -> KeysView[int]:
        """The blocks that the rank holds, a live view, in the order that they came."""
        return self._caches[rank].held

    @property
    def block_count(self) -> int:
        """Distinct blocks held."""
        return len(self._masks)

    @property
    def pair_count(self) -> int:
        """(block, rank) pairs. O(ranks)."""
        return sum(len(cache.held) for cache in self._caches.values())

    # --- ranks and their slots -------------------------------------------------------------------

    def add_rank(self, rank: WorkerRank) -> int:
        """Register a rank, with no blocks, and return its slot. Known ranks keep theirs."""
        known = self._slots.get(rank)
        if known is not None:
            return known
        if self._free:
            slot = heappop(self._free)
            self._ranks[slot] = rank
        else:
            slot = len(self._ranks)
            self._ranks.append(rank)
        self._slots[rank] = slot
        self._caches[rank] = RankCache()
        return slot

    def remove_rank(self, rank: WorkerRank) -> int:
        """Forget a rank and its blocks; returns how many it held."""
        removed = self.clear(rank)
        del self._caches[rank]
        heappush(self._free, self._slots.pop(rank))
        return removed

    def ranks(self) -> list[WorkerRank]:
        """The registered ranks, sorted."""
        return sorted(self._caches)

    def slot_of(self, rank: WorkerRank) -> int:
        """The rank's bit number in masks."""
        return self._slots[rank]

    def rank_of(self, slot: int) -> WorkerRank:
        """Whose slot it is. The slot must be in use."""
        return self._ranks[slot]

    def ranks_of(self, mask: int) -> list[WorkerRank]:
        """The ranks whose slots are in a mask of `match_depths`, by slot."""
        return select(mask, self._ranks)

    # --- changing --------------------------------------------------------------------------------

    def store(
        self, rank: WorkerRank, parent_hash: int | None, sequence_hashes: Sequence[int]
    ) -> int:
        """The rank now holds these blocks, a chain in order below `parent_hash` (None: the root).

        Returns how many it did not hold before. Storing below a block that the rank does not hold
        is allowed: the blocks count for nothing until the gap is filled. About 0.2 µs a block, and
        up to 0.7 µs where the tree is large and the blocks are in no CPU cache.
        """
        cache = self._caches[rank]
        if not sequence_hashes:
            return 0
        fresh = cache.store(parent_hash, sequence_hashes)
        bit = self._note_holes(rank, cache)
        if fresh:
            add_holder(self._masks, bit, fresh)
        return len(fresh)

    def remove(self, rank: WorkerRank, sequence_hashes: Sequence[int]) -> int:
        """The rank no longer holds these blocks; what it holds below them stays, as orphans.

        Returns how many it did hold; the others are ignored. Cost as `store`.
        """
        cache = self._caches[rank]
        removed = cache.remove(sequence_hashes)
        if removed:
            drop_holder(self._masks, self._note_holes(rank, cache), removed)
        return len(removed)

    def clear(self, rank: WorkerRank) -> int:
        """The rank's cache is empty; returns how many blocks it held. O(those blocks)."""
        cache = self._caches[rank]
        blocks = list(cache.held)
        cache.clear()
        bit = self._note_holes(rank, cache)
        if blocks:
            drop_holder(self._masks, bit, blocks)
        return len(blocks)

    def _note_holes(self, rank: WorkerRank, cache: RankCache) -> int:
        """Keep `_holey` true after a change of a rank's cache; returns the rank's bit."""
        bit = 1 << self._slots[rank]
        if cache.orphans:
            self._holey |= bit
        elif self._holey & bit:
            self._holey ^= bit
        return bit

    # --- all of it -------------------------------------------------------------------------------

    def digest(self) -> str:
        """16 bytes in hex over which rank holds which blocks, whatever way they came. O(ranks).

        Covers every registered rank, also an empty one, by its count and sum of hashes.
        """
        digest = blake2b(digest_size=16)
        for (worker_id, dp_rank), cache in sorted(self._caches.items()):
            digest.update(b"%d.%d:%d:%d;" % (worker_id, dp_rank, len(cache.held), cache.hash_sum))
        return digest.hexdigest()

    def holders(self) -> Mapping[int, int]:
        """Every block's mask, live and read-only, in no particular order."""
        return self._masks

    def parents(self) -> dict[int, int]:
        """Every block's predecessor, held or not; blocks at the root are absent. O(pairs)."""
        parents: dict[int | None, int] = {}
        for cache in self._caches.values():
            cache.add_edges(parents)
        for block in parents.keys() - self._masks.keys():
            del parents[block]
        return cast("dict[int, int]", parents)  # None is no block, so it is gone too

    def check(self) -> None:
        """Assert every structural invariant. O(pairs); for tests."""
        assert self._caches.keys() == self._slots.keys()
        slots = sorted([*self._free, *self._slots.values()])
        assert slots == list(range(len(self._ranks))), "a slot lent twice, or lost"
        holders: dict[int, int] = {}
        for rank, cache in self._caches.items():
            cache.check()
            slot = self._slots[rank]
            assert self._ranks[slot] == rank, "slot of another rank"
            assert bool(cache.orphans) == bool(self._holey >> slot & 1), "hole mark"
            for block in cache.held:
                holders[block] = holders.get(block, 0) | 1 << slot
        assert holders == self._masks, "masks disagree with what the ranks hold"
        for block, parent in self.parents().items():
            for rank in self.ranks_of(holders[block] & ~holders.get(parent, 0)):
                assert block in self._caches[rank].orphans, "hole not noted"
