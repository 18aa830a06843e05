"""The load that unfinished requests put on ranks: prefill tokens and distinct active blocks.

A booking references every complete block of its prompt, and always a whole chain from the root, so
along a chain the set of ranks on which a block is active only shrinks: the same bisection that
finds cached prefixes finds how much of a prompt is already active on each rank.

Output blocks, and the prompt's where reuse is not assumed, belong to one booking alone: they are a
count. A booking whose request tells how many tokens it expects is relieved as it nears that length:
the blocks that only it uses then count less (`growth`).

Ranks are small integers here (the slots of the index), so that load is three plain lists.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct

from indexer.masks import match_depths

WHOLE = 1000
"""Blocks are relieved in thousandths, in integers, so that sums have no rounding of their own."""


class Growth(NamedTuple):
    """What a request's output has come to, in blocks."""

    output_blocks: int
    relief: int
    """Thousandths by which each block that only this request uses counts less, 0 … 1000."""


def growth(isl: int, osl: int, block_size: int, expected_osl: int | None) -> Growth:
    """The blocks that `osl` output tokens have begun behind a prompt of `isl`, and their relief.

    A block counts max(0, 1 - osl / expected_osl) of itself, 1 where nothing is expected: what will
    soon be free weighs less (the peer's rule for --router-track-output-blocks).
    """
    if block_size < 1:
        return Growth(0, 0)
    begun = -(-(isl + osl) // block_size) - -(-isl // block_size)
    if expected_osl is None or expected_osl < 1:
        return Growth(begun, 0)
    return Growth(begun, min(WHOLE, osl * WHOLE // expected_osl))


class Booking(Struct, gc=False):
    """One request's claim on a rank. `prefill_tokens` falls to 0 once its prefill is done."""

    slot: int
    prefill_tokens: int
    sequence_hashes: Sequence[int]
    """The prompt's complete blocks, where they are shared; empty where they are not."""
    own_blocks: int = 0
    """Blocks that no other booking can share: of the output, or of a prompt without reuse."""
    output_blocks: int = 0
    """Those of `own_blocks` that are of the output."""
    relief: int = 0
    """Thousandths of blocks by which the booking counts less than its blocks."""


class ActiveSequences:
    """Bookings, and their sums per slot.

    `prefill_tokens[slot]`: uncached prompt tokens booked and not yet computed.
    `blocks[slot]`: distinct blocks that bookings reference: two requests with the same 100-block
    prompt on one rank count 100; less the relief.
    `requests[slot]`: bookings.
    """

    def __init__(self) -> None:
        self.prefill_tokens: list[int] = []
        self.blocks: list[int] = []
        self.requests: list[int] = []
        self._references: list[dict[int, int]] = []
        self._own: list[int] = []
        self._relief: list[int] = []
        self._active: dict[int, int] = {}
        self._bookings: dict[str, Booking] = {}

    def __len__(self) -> int:
        return len(self._bookings)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._bookings

    def get(self, request_id: str) -> Booking | None:
        return self._bookings.get(request_id)

    def request_ids(self) -> Iterable[str]:
        return self._bookings.keys()

    def busy_slots(self) -> list[int]:
        """Slots with at least one booking, ascending."""
        return [slot for slot, count in enumerate(self.requests) if count]

    def add_slot(self, slot: int) -> None:
        """Make `slot` known, without load. Idempotent."""
        while len(self.blocks) <= slot:
            self.prefill_tokens.append(0)
            self.blocks.append(0)
            self.requests.append(0)
            self._references.append({})
            self._own.append(0)
            self._relief.append(0)

    def book(
        self,
        request_id: str,
        slot: int,
        prefill_tokens: int,
        sequence_hashes: Sequence[int],
        own_blocks: int = 0,
    ) -> None:
        """Claim `slot` for a request. ValueError if it holds a booking already. O(blocks)."""
        if request_id in self._bookings:
            raise ValueError(f"request {request_id} is already booked")
        self.add_slot(slot)
        self._bookings[request_id] = Booking(slot, prefill_tokens, sequence_hashes, own_blocks)
        self._own[slot] += own_blocks
        self.prefill_tokens[slot] += prefill_tokens
        self.requests[slot] += 1
        references = self._references[slot]
        active = self._active
        bit = 1 << slot
        for sequence_hash in sequence_hashes:
            count = references.get(sequence_hash)
            if count is None:
                references[sequence_hash] = 1
                active[sequence_hash] = active.get(sequence_hash, 0) | bit
            else:
                references[sequence_hash] = count + 1
        self._sum(slot)

    def _sum(self, slot: int) -> None:
        whole = len(self._references[slot]) + self._own[slot]
        self.blocks[slot] = whole - _blocks_relieved(self._relief[slot])

    def grown(self, request_id: str, to: Growth) -> bool:
        """The request's output has grown. False if it has no booking. O(log blocks).

        Relief goes to the blocks that only this booking uses at this moment: they are the end of
        its chain, since whoever shares a block shares all before it.
        """
        booking = self._bookings.get(request_id)
        if booking is None:
            return False
        slot, hashes = booking.slot, booking.sequence_hashes
        references = self._references[slot]
        shared = bisect_left(hashes, True, key=lambda each: references[each] == 1)
        own = booking.own_blocks - booking.output_blocks + to.output_blocks
        relief = to.relief * (own + len(hashes) - shared)
        self._own[slot] += own - booking.own_blocks
        self._relief[slot] += relief - booking.relief
        booking.own_blocks, booking.output_blocks = own, to.output_blocks
        booking.relief = relief
        self._sum(slot)
        return True

    def restore(self, request_id: str, booking: Booking) -> None:
        """Put back a booking as it was. ValueError as in `book`."""
        self.book(
            request_id,
            booking.slot,
            booking.prefill_tokens,
            booking.sequence_hashes,
            booking.own_blocks,
        )
        self._bookings[request_id] = booking
        self._relief[booking.slot] += booking.relief
        self._sum(booking.slot)

    def prefill_completed(self, request_id: str) -> bool:
        """The prompt is computed; its prefill tokens are no load any more. False if unknown."""
        booking = self._bookings.get(request_id)
        if booking is None:
            return False
        self.prefill_tokens[booking.slot] -= booking.prefill_tokens
        booking.prefill_tokens = 0
        return True

    def free(self, request_id: str) -> bool:
        """End a booking. False if there is none. O(blocks)."""
        booking = self._bookings.pop(request_id, None)
        if booking is None:
            return False
        slot = booking.slot
        self.prefill_tokens[slot] -= booking.prefill_tokens
        self.requests[slot] -= 1
        self._own[slot] -= booking.own_blocks
        self._relief[slot] -= booking.relief
        references = self._references[slot]
        active = self._active
        bit = 1 << slot
        for sequence_hash in booking.sequence_hashes:
            count = references[sequence_hash] - 1
            if count:
                references[sequence_hash] = count
                continue
            del references[sequence_hash]
            rest = active[sequence_hash] & ~bit
            if rest:
                active[sequence_hash] = rest
            else:
                del active[sequence_hash]
        self._sum(slot)
        return True

    def drop_slot(self, slot: int) -> list[str]:
        """End every booking on a slot; returns their request ids."""
        gone = [key for key, booking in self._bookings.items() if booking.slot == slot]
        for request_id in gone:
            self.free(request_id)
        return gone

    def match_depths(self, sequence_hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(mask of slots, leading blocks of this prompt active there), for depths of 1 or more."""
        return match_depths(self._active.get, sequence_hashes)

    def check(self) -> None:
        """Assert that every sum agrees with the bookings."""
        for slot in range(len(self.blocks)):
            here = [b for b in self._bookings.values() if b.slot == slot]
            distinct = {h for b in here for h in b.sequence_hashes}
            assert self.requests[slot] == len(here)
            assert self.prefill_tokens[slot] == sum(b.prefill_tokens for b in here)
            own = sum(b.own_blocks for b in here)
            relief = sum(b.relief for b in here)
            assert (self._own[slot], self._relief[slot]) == (own, relief)
            assert self.blocks[slot] == len(distinct) + own - _blocks_relieved(relief)
            assert set(self._references[slot]) == distinct
            assert all(self._active[h] >> slot & 1 for h in distinct)
        assert all(self._active.values()), "a block that is active nowhere"
        total = sum(mask.bit_count() for mask in self._active.values())
        assert total == sum(map(len, self._references))


def _blocks_relieved(relief: int) -> int:
    """In whole blocks, so that what is left is rounded to the nearest, and up from the middle."""
    return (relief + WHOLE // 2 - 1) // WHOLE
