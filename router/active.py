"""The load that unfinished requests put on ranks: prefill tokens and distinct active blocks.

A booking references every complete block of its prompt, and always a whole chain from the root, so
along a chain the set of ranks on which a block is active only shrinks: the same bisection that
finds cached prefixes finds how much of a prompt is already active on each rank.

Ranks are small integers here (the slots of the index), so that load is two plain lists.
"""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from indexer.masks import match_depths


class Booking(Struct, gc=False):
    """One request's claim on a rank. `prefill_tokens` falls to 0 once its prefill is done."""

    slot: int
    prefill_tokens: int
    sequence_hashes: Sequence[int]


class ActiveSequences:
    """Bookings, and their sums per slot.

    `prefill_tokens[slot]`: uncached prompt tokens booked and not yet computed.
    `blocks[slot]`: distinct blocks that bookings reference: two requests with the same 100-block
    prompt on one rank count 100.
    """

    def __init__(self) -> None:
        self.prefill_tokens: list[int] = []
        self.blocks: list[int] = []
        self.requests: list[int] = []
        self._references: list[dict[int, int]] = []
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

    def book(
        self, request_id: str, slot: int, prefill_tokens: int, sequence_hashes: Sequence[int]
    ) -> None:
        """Claim `slot` for a request. ValueError if it holds a booking already. O(blocks)."""
        if request_id in self._bookings:
            raise ValueError(f"request {request_id} is already booked")
        self.add_slot(slot)
        self._bookings[request_id] = Booking(slot, prefill_tokens, sequence_hashes)
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
        self.blocks[slot] = len(references)

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
        self.blocks[slot] = len(references)
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
            assert self.blocks[slot] == len(distinct)
            assert set(self._references[slot]) == distinct
            assert all(self._active[h] >> slot & 1 for h in distinct)
        assert all(self._active.values()), "a block that is active nowhere"
        total = sum(mask.bit_count() for mask in self._active.values())
        assert total == sum(self.blocks)
