"""Which rank is *believed* to hold which KV blocks, because prompts were sent there.

For engines that announce no KV events, and for the moments between a routing decision and the first
event that it causes. Nothing is known of evictions, so a belief lasts for a time and then expires;
the next prompt with the same beginning on the same rank renews it.

Prompts are inserted whole, from the root, and never shorten what was believed before. So along a
chain the expiries on a slot only fall: a block expires with, or after, everything below it. Every
way out keeps to that order, and the set of slots that hold a block only shrinks along a chain, as
`indexer.masks.match_depths` wants it.

One insertion makes one *lease*: it has the blocks that the insertion was the last to renew. Leases
are timed, blocks are not; a lease that loses half of its blocks to later ones is rewritten without
them, so there are never more stale references than live ones.

All is a pure function of the calls, and what a later call does depends on the content alone: on the
set of (slot, hash, expiry, depth), not on how it came about. It does not depend on how the slots
are numbered either, which differs from replica to replica.
"""

import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

from msgspec import Struct
from xxhash import xxh3_128_intdigest

from indexer.masks import add_holder, drop_holder, match_depths, slots_of
from indexer.radix import WorkerRank

DEAD_LEASES_MIN = 64
"""Timers of leases without blocks that may wait for their time however few others there are."""
_U128_MASK = 2**128 - 1

T = TypeVar("T")


class Lease(Struct, eq=False, gc=False):
    """Blocks of one slot with one expiry: those of `hashes` that the slot's map gives this lease.

    hashes: u64, each once. depths: parallel; 0 for a block at the root. live: how many it has.
    """

    slot: int
    expires_ns: int
    hashes: "array[int]"
    depths: Sequence[int]
    live: int


class Run(Struct, frozen=True, array_like=True, gc=False):
    """All blocks of a slot with one expiry, by depth and then hash: a piece of a snapshot."""

    expires_ns: int
    sequence_hashes: bytes
    """Little-endian u64 each."""
    depth_steps: list[int]
    """The depth of the first block, then of each how much deeper it is than the one before."""


class PredictedIndex:
    """Blocks by slot, each with an expiry. Times are the caller's, in ns; hashes are u64.

    A slot is a small number that stands for a rank; it exists as soon as something is inserted.
    Memory: some 160 bytes a pair in prompts of 200 blocks, 400 where every prompt is one block.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Believe nothing."""
        self._masks: dict[int, int] = {}
        """Block → mask of slots, never 0. Neighbours in a chain share the integer."""
        self._held: list[dict[int, Lease]] = []
        """By slot: block → the lease that has it."""
        self._sums: list[int] = []
        """By slot: the sum over its blocks of (hash + 1) * weight of the expiry, mod 2^128."""
        self._count = 0
        self._timers: list[tuple[int, int, Lease]] = []
        """Heap of (expiry, number, lease): every lease once, and dead ones for a while."""
        self._next_number = 0
        """Of timers. Numbers only keep leases from being compared."""
        self._dead = 0
        """Timers whose lease has no blocks any more."""

    # --- asking ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """(slot, block) pairs."""
        return self._count

    def blocks_of_slot(self, slot: int) -> int:
        """How many blocks the slot holds."""
        return len(self._held[slot]) if slot < len(self._held) else 0

    def match_depths(
        self, sequence_hashes: Sequence[int], now_ns: int | None = None
    ) -> list[tuple[int, int]]:
        """(mask of slots, leading blocks of this prompt believed there), for depths of 1 or more.

        now_ns: what is past its time by then does not count, taken out or not; None: all that is
        held counts. Shape and cost as `indexer.masks.match_depths`; while something is due that
        `expire` has not taken out, some 0.1 µs more for every slot of each mask that is looked at.
        """
        if now_ns is None or not self._timers or self._timers[0][0] > now_ns:
            return match_depths(self._masks.get, sequence_hashes)
        masks, held = self._masks, self._held

        def lasting(block: int) -> int:
            mask = masks.get(block, 0)
            for slot in slots_of(mask):
                if held[slot][block].expires_ns <= now_ns:
                    mask ^= 1 << slot
            return mask

        return match_depths(lasting, sequence_hashes)

    # --- changing --------------------------------------------------------------------------------

    def insert(self, slot: int, sequence_hashes: Sequence[int], expires_ns: int) -> None:
        """The slot holds this chain until `expires_ns`; what it holds for longer stays as it is.

        sequence_hashes: the prompt's complete blocks, in order from the root. Repeats count once.
        OverflowError, and no change, for a hash outside u64. About 0.2 µs a block, and up to 0.8 µs
        where the index is large and the blocks are in no CPU cache.
        """
        self._take(slot, sequence_hashes, range(len(sequence_hashes)), expires_ns)

    def expire(self, now_ns: int) -> int:
        """Drop what expires at `now_ns` or before; returns how many pairs.

        O(1) where nothing is due; otherwise 0.2 µs to 1 µs a pair, as with `insert`.
        """
        before = self._count
        while self._timers and self._timers[0][0] <= now_ns:
            lease = self._pop_timer()
            self._drop(lease, self._blocks_of(lease))
        return before - self._count

    def prune(self, max_blocks: int, kept_blocks: int) -> int:
        """If more than `max_blocks` pairs are held, drop down to `kept_blocks`.

        The soonest to expire go first, of equals the deepest, of equals the lowest hashes. The same
        block on several slots, equal in all that, goes from all of them, and then fewer stay.
        Returns how many pairs went. kept_blocks: below 0 counts as 0, and beyond `max_blocks` as
        that. Cost as `expire`.
        """
        before = self._count
        if before <= max_blocks:
            return 0
        target = max(0, min(kept_blocks, max_blocks))
        while self._count > target:
            leases = [self._pop_timer()]
            while self._timers and self._timers[0][0] == leases[0].expires_ns:
                leases.append(self._pop_timer())
            excess = self._count - target
            if sum(lease.live for lease in leases) <= excess:
                for lease in leases:
                    self._drop(lease, self._blocks_of(lease))
            else:
                self._drop_deepest(leases, excess)
        return before - self._count

    def discard(self, slot: int, sequence_hashes: Sequence[int]) -> int:
        """The slot holds none of these blocks any more; returns how many of them it held.

        Taken from the middle of a chain, they leave what is below them, which then counts with
        them (`indexer.masks.match_depths` gives upper bounds). About 0.3 µs a block.
        """
        held = self._held[slot] if slot < len(self._held) else {}
        by_lease: dict[int, tuple[Lease, list[int]]] = {}
        for block in dict.fromkeys(sequence_hashes):
            lease = held.get(block)
            if lease is not None:
                by_lease.setdefault(id(lease), (lease, []))[1].append(block)
        for lease, blocks in by_lease.values():
            self._drop(lease, blocks)
            self._dead += not lease.live
            if 2 * lease.live < len(lease.hashes):
                self._rewrite(lease)
        self._sweep_timers()
        return sum(len(blocks) for _, blocks in by_lease.values())

    def drop_slot(self, slot: int) -> int:
        """The slot holds nothing: its rank left. Returns how many blocks it held. O(those)."""
        return self.discard(slot, list(self._held[slot])) if self.blocks_of_slot(slot) else 0

    # --- all of it -------------------------------------------------------------------------------

    def digest(self, rank_of: Callable[[int], WorkerRank]) -> str:
        """16 bytes in hex over which rank holds which blocks until when, whatever way they came.

        rank_of: the rank of a slot that holds blocks; slots without any do not matter. O(slots).
        """
        digest = blake2b(digest_size=16)
        ranks = sorted((rank_of(slot), slot) for slot, held in enumerate(self._held) if held)
        for (worker_id, dp_rank), slot in ranks:
            count, total = len(self._held[slot]), self._sums[slot]
            digest.update(b"%d.%d:%d:%d;" % (worker_id, dp_rank, count, total))
        return digest.hexdigest()

    def runs(self, slot: int) -> Iterator[Run]:
        """What the slot holds, soonest to expire first: equal content gives equal runs.

        Do not change the index meanwhile. About 1 µs a block; 9 bytes a block as MessagePack.
        """
        by_expiry: dict[int, list[Lease]] = {}
        for lease in set(self._held[slot].values()) if slot < len(self._held) else ():
            by_expiry.setdefault(lease.expires_ns, []).append(lease)
        for expires_ns in sorted(by_expiry):
            pairs = sorted(
                pair for lease in by_expiry[expires_ns] for pair in self._pairs_of(lease)
            )
            depths, blocks = zip(*pairs, strict=True)
            steps = [depths[0], *(after - before for before, after in pairwise(depths))]
            yield Run(expires_ns, struct.pack(f"<{len(blocks)}Q", *blocks), steps)

    def restore(self, slot: int, run: Run) -> None:
        """Add what `runs` gave; all of a slot's runs make it as it was. Cost as `insert`.

        A run that is not one raises ValueError or struct.error, and nothing changes.
        """
        count = len(run.sequence_hashes) // 8
        blocks = struct.unpack(f"<{count}Q", run.sequence_hashes)
        if count != len(run.depth_steps) or min(run.depth_steps, default=0) < 0:
            raise ValueError("not a run of a predicted index")
        self._take(slot, blocks, list(accumulate(run.depth_steps)), run.expires_ns)

    def check(self) -> None:
        """Assert every structural invariant. O(pairs); for tests."""
        leases = [lease for _, _, lease in self._timers]
        timed = set(map(id, leases))
        masks: dict[int, int] = {}
        for slot, held in enumerate(self._held):
            total = 0
            for block, lease in held.items():
                assert id(lease) in timed and lease.slot == slot, "a block without an end"
                masks[block] = masks.get(block, 0) | 1 << slot
                total += (block + 1) * _weight(lease.expires_ns)
            assert total & _U128_MASK == self._sums[slot], "sum"
        assert masks == self._masks, "masks disagree with what the slots hold"
        assert len(timed) == len(leases), "a lease timed twice"
        for expires_ns, _, lease in self._timers:
            assert lease.expires_ns == expires_ns, "timer of another expiry"
            assert len(set(lease.hashes)) == len(lease.hashes) == len(lease.depths)
            assert len(lease.hashes) <= 2 * lease.live, "more stale than live references"
            assert len(self._pairs_of(lease)) == lease.live, "count of a lease"
        live = [lease.live for lease in leases if lease.live]
        assert sum(live) == sum(map(len, self._held)) == self._count, "count"
        assert self._dead == len(leases) - len(live) <= len(leases) // 2 + DEAD_LEASES_MIN

    # --- leases ----------------------------------------------------------------------------------

    def _take(
        self, slot: int, hashes: Sequence[int], depths: Sequence[int], expires_ns: int
    ) -> None:
        """Give a new lease all of these blocks but those that the slot holds for as long."""
        lease = Lease(slot, expires_ns, array("Q", hashes), depths, 0)
        while len(self._held) <= slot:
            self._held.append({})
            self._sums.append(0)
        held = self._held[slot]
        taken = dict.fromkeys(hashes, lease)
        blocks = list(taken)
        gain = 0
        losses: list[tuple[Lease, int, int]] = []
        for loser, start, end in _stretches(list(map(held.get, blocks))):
            stretch = blocks[start:end]
            if loser is not None and loser.expires_ns >= expires_ns:
                deque(map(taken.__delitem__, stretch), maxlen=0)
                continue
            total = sum(stretch) + len(stretch)
            gain += total
            if loser is None:
                self._count += len(stretch)
                add_holder(self._masks, 1 << slot, stretch)
            else:
                losses.append((loser, len(stretch), total))
        if not taken:
            return
        if len(taken) < len(hashes):
            depth_of = dict(zip(reversed(hashes), reversed(depths), strict=True))
            lease.hashes = array("Q", taken)
            lease.depths = array("I", map(depth_of.__getitem__, taken))
        lease.live = len(taken)
        held.update(taken)
        self._weigh(lease, gain)
        self._push_timer(lease)
        for loser, count, total in losses:
            self._weigh(loser, -total)
            loser.live -= count
            self._dead += not loser.live
        for loser, _, _ in losses:
            if 2 * loser.live < len(loser.hashes):
                self._rewrite(loser)
        self._sweep_timers()

    def _drop(self, lease: Lease, blocks: Sequence[int]) -> None:
        """Take blocks from a lease, and from its slot."""
        held = self._held[lease.slot]
        deque(map(held.__delitem__, blocks), maxlen=0)
        drop_holder(self._masks, 1 << lease.slot, blocks)
        self._weigh(lease, -sum(blocks) - len(blocks))
        self._count -= len(blocks)
        lease.live -= len(blocks)

    def _drop_deepest(self, leases: Sequence[Lease], excess: int) -> None:
        """Drop `excess` blocks, fewer than all, of leases with one expiry and no timers."""
        pairs = {id(lease): self._pairs_of(lease) for lease in leases}
        order = sorted((-depth, block) for lease in leases for depth, block in pairs[id(lease)])
        last = order[excess - 1]
        for lease in leases:
            self._drop(
                lease, [block for depth, block in pairs[id(lease)] if (-depth, block) <= last]
            )
            if lease.live:
                self._rewrite(lease)
                self._push_timer(lease)

    def _blocks_of(self, lease: Lease) -> list[int]:
        if lease.live == len(lease.hashes):
            return lease.hashes.tolist()
        held = self._held[lease.slot]
        return [block for block in lease.hashes if held.get(block) is lease]

    def _pairs_of(self, lease: Lease) -> list[tuple[int, int]]:
        """(depth, block) of a lease's blocks."""
        held = self._held[lease.slot]
        pairs = zip(lease.depths, lease.hashes, strict=True)
        return [pair for pair in pairs if held.get(pair[1]) is lease]

    def _rewrite(self, lease: Lease) -> None:
        """Let a lease forget the blocks it no longer has."""
        pairs = self._pairs_of(lease) if lease.live else []
        lease.depths = array("I", [depth for depth, _ in pairs])
        lease.hashes = array("Q", [block for _, block in pairs])

    def _weigh(self, lease: Lease, total: int) -> None:
        """Put blocks of a lease into its slot's sum. total: of hash + 1 over them."""
        weighed = self._sums[lease.slot] + total * _weight(lease.expires_ns)
        self._sums[lease.slot] = weighed & _U128_MASK

    # --- timers ----------------------------------------------------------------------------------

    def _push_timer(self, lease: Lease) -> None:
        heappush(self._timers, (lease.expires_ns, self._next_number, lease))
        self._next_number += 1

    def _pop_timer(self) -> Lease:
        lease = heappop(self._timers)[2]
        self._dead -= not lease.live
        return lease

    def _sweep_timers(self) -> None:
        """Forget dead leases when they are more than the others. Seldom: amortised O(1)."""
        if self._dead > len(self._timers) // 2 + DEAD_LEASES_MIN:
            self._timers = [timer for timer in self._timers if timer[2].live]
            heapify(self._timers)
            self._dead = 0

    # --- masks -----------------------------------------------------------------------------------


def _stretches(values: Sequence[T]) -> Iterator[tuple[T, int, int]]:
    """Cut into stretches of equal values: (value, start, end) of each."""
    if not values:
        return
    if values.count(values[0]) == len(values):  # the usual case
        yield values[0], 0, len(values)
        return
    end = 0
    for value, same in groupby(values):
        start, end = end, end + len(list(same))
        yield value, start, end


def _weight(expires_ns: int) -> int:
    """A number that looks random, for the digest."""
    return xxh3_128_intdigest(b"%d" % expires_ns)
