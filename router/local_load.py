"""The load that a decision sees: what the log says, and what this router has decided since.

A decision is made once, by one replica, and appended with its reasons. Until the log delivers it
back it sits in the overlay, a second set of bookings that is added to the folded load; so a burst
of requests does not all see the same idle worker. With replica sync off, only this frontend's own
requests count, and the overlay then keeps them until they end.

A prefill that is over here counts no more, although the log tells it only a moment later: who waits
in the queue is let on at once.

What a decision predicts counts ahead of the log too, so that equal prompts that come together go
together.
"""

from collections.abc import Callable

from msgspec import Struct

from eventstore.events import RequestRouted
from indexer.radix import WorkerRank
from router.active import ActiveSequences, Growth
from router.request_fold import book
from router.selection import Load, depth_by_slot
from router.state import RouterState


class _Ahead(Struct):
    """A booking of the overlay."""

    routed: RequestRouted
    growth: Growth | None = None


class LocalLoad:
    """state: the one at hand; it may be another one at every call."""

    def __init__(self, state: Callable[[], RouterState], replica_sync: bool) -> None:
        self._state = state
        self._replica_sync = replica_sync
        self._overlay = ActiveSequences()
        self._ahead: dict[str, _Ahead] = {}
        """By booking id, what is booked in the overlay."""
        self._over: set[str] = set()
        """Bookings that have no prefill ahead any more, of which the log has told nothing yet."""
        self._over_in_fold: set[str] = set()
        """Those of which it has told that they were made, and not that this is over."""
        self._predicted = ActiveSequences()
        """Bookings without load: the prompts that decisions predict and the log has not told."""

    def __len__(self) -> int:
        """Bookings that the folded load does not count."""
        return len(self._overlay)

    def __contains__(self, booking_id: str) -> bool:
        return booking_id in self._overlay

    def book(self, booking_id: str, routed: RequestRouted) -> None:
        """Book ahead of the log. Nothing happens if the rank is not registered any more."""
        state = self._state()
        if not state.is_registered(routed.worker_id, routed.dp_rank):
            return
        slot = state.tree.slot_of(WorkerRank(routed.worker_id, routed.dp_rank))
        block_size = state.workers[routed.worker_id].block_size
        book(self._overlay, booking_id, slot, routed, block_size)
        self._ahead[booking_id] = _Ahead(routed)
        self.told(booking_id)
        if routed.prediction is not None:
            self._predicted.free(booking_id)
            self._predicted.book(booking_id, slot, 0, routed.sequence_hashes)

    def prefill_completed(self, booking_id: str) -> None:
        self._overlay.prefill_completed(booking_id)
        self._note_over(booking_id)

    def grown(self, booking_id: str, to: Growth) -> None:
        if self._overlay.grown(booking_id, to):
            self._ahead[booking_id].growth = to

    def free(self, booking_id: str) -> None:
        """The request has ended, or has left the rank. What it predicts stays until the log tells
        that too."""
        self._drop(booking_id)
        self._note_over(booking_id)

    def _drop(self, booking_id: str) -> None:
        self._ahead.pop(booking_id, None)
        self._overlay.free(booking_id)

    def _note_over(self, booking_id: str) -> None:
        if self._replica_sync:
            in_fold = booking_id in self._state().active
            (self._over_in_fold if in_fold else self._over).add(booking_id)

    def told(self, booking_id: str) -> None:
        """The log has delivered that the booking's prefill is over, or that all of it is."""
        self._over.discard(booking_id)
        self._over_in_fold.discard(booking_id)

    def folded(self, booking_id: str, routed: RequestRouted) -> None:
        """The log has delivered the decision."""
        ahead = self._ahead.get(booking_id)
        if ahead is not None and ahead.routed.attempt != routed.attempt:
            return  # an earlier one: the request has moved on since
        self._predicted.free(booking_id)
        if self._replica_sync:
            self._drop(booking_id)
            if booking_id in self._over:
                self._over.discard(booking_id)
                self._over_in_fold.add(booking_id)

    def rebuild(self) -> None:
        """Book again by rank: slots have moved to other ranks, or the state is another one."""
        state, before = self._state(), self._overlay
        ahead, self._ahead = self._ahead, {}
        self._overlay, self._predicted = ActiveSequences(), ActiveSequences()
        self._over_in_fold = {each for each in self._over_in_fold if each in state.active}
        self._over.clear()
        for booking_id, each in ahead.items():
            booking = before.get(booking_id)
            if booking is None or (self._replica_sync and booking_id in state.active):
                continue  # ended, or counted by the fold by now
            self.book(booking_id, each.routed)
            if not booking.prefill_tokens:
                self.prefill_completed(booking_id)
            if each.growth is not None:
                self.grown(booking_id, each.growth)

    def load(self) -> Load:
        """What is booked, by slot."""
        overlay, folded = self._overlay, self._state().active
        if not self._replica_sync:
            overlay.add_slot(len(folded.blocks) - 1)
            return Load(overlay.prefill_tokens, overlay.blocks, overlay.requests)
        if not len(overlay) and not self._over_in_fold:
            return Load(folded.prefill_tokens, folded.blocks, folded.requests)
        prefill_tokens, blocks = folded.prefill_tokens.copy(), folded.blocks.copy()
        requests = folded.requests.copy()
        for slot in overlay.busy_slots():
            prefill_tokens[slot] += overlay.prefill_tokens[slot]
            blocks[slot] += overlay.blocks[slot]
            requests[slot] += overlay.requests[slot]
        for booking_id in self._over_in_fold:
            booking = folded.get(booking_id)
            if booking is not None:
                prefill_tokens[booking.slot] -= booking.prefill_tokens
        return Load(prefill_tokens, blocks, requests)

    def active_overlaps(self, sequence_hashes: list[int], slot_count: int) -> list[int]:
        """By slot: leading blocks of the prompt that are active there already."""
        own = self._overlay.match_depths(sequence_hashes)
        folded = self._state().active.match_depths(sequence_hashes) if self._replica_sync else []
        if own and folded:
            both = depth_by_slot(own, slot_count), depth_by_slot(folded, slot_count)
            return list(map(max, *both))
        return depth_by_slot(own or folded, slot_count)

    def predicted_depths(self, sequence_hashes: list[int]) -> list[tuple[int, int]]:
        """(mask of slots, leading blocks of the prompt predicted there) by decisions that the log
        has not told."""
        return self._predicted.match_depths(sequence_hashes) if len(self._predicted) else []
