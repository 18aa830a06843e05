"""The load that a decision sees: what the log says, and what this router has decided since.

A decision is made once, by one replica, and appended with its reasons. Until the log delivers it
back it sits in the overlay, a second set of bookings that is added to the folded load; so a burst
of requests does not all see the same idle worker. With replica sync off, only this frontend's own
requests count, and the overlay then keeps them until they end.
"""

from collections.abc import Callable

from eventstore.events import RequestRouted
from indexer.radix import WorkerRank
from router.active import ActiveSequences, Growth
from router.request_fold import book
from router.selection import Load, depth_by_slot
from router.state import RouterState


class LocalLoad:
    """state: the one at hand; it may be another one at every call."""

    def __init__(self, state: Callable[[], RouterState], replica_sync: bool) -> None:
        self._state = state
        self._replica_sync = replica_sync
        self._overlay = ActiveSequences()
        self._routed: dict[str, RequestRouted] = {}
        """By booking id, what is booked in the overlay."""

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
        self._routed[booking_id] = routed

    def prefill_completed(self, booking_id: str) -> None:
        self._overlay.prefill_completed(booking_id)

    def grown(self, booking_id: str, to: Growth) -> None:
        self._overlay.grown(booking_id, to)

    def free(self, booking_id: str) -> None:
        self._routed.pop(booking_id, None)
        self._overlay.free(booking_id)

    def folded(self, booking_id: str) -> None:
        """The log has delivered the decision."""
        if self._replica_sync:
            self.free(booking_id)

    def rebuild(self) -> None:
        """Book again by rank: slots have moved to other ranks, or the state is another one."""
        state, before = self._state(), self._overlay
        routed, self._routed = self._routed, {}
        self._overlay = ActiveSequences()
        for booking_id, each in routed.items():
            booking = before.get(booking_id)
            if booking is None or (self._replica_sync and booking_id in state.active):
                continue  # ended, or counted by the fold by now
            self.book(booking_id, each)
            if not booking.prefill_tokens:
                self.prefill_completed(booking_id)

    def load(self) -> Load:
        """What is booked, by slot."""
        overlay, folded = self._overlay, self._state().active
        if not self._replica_sync:
            overlay.add_slot(len(folded.blocks) - 1)
            return Load(overlay.prefill_tokens, overlay.blocks, overlay.requests)
        if not len(overlay):
            return Load(folded.prefill_tokens, folded.blocks, folded.requests)
        prefill_tokens, blocks = folded.prefill_tokens.copy(), folded.blocks.copy()
        requests = folded.requests.copy()
        for slot in overlay.busy_slots():
            prefill_tokens[slot] += overlay.prefill_tokens[slot]
            blocks[slot] += overlay.blocks[slot]
            requests[slot] += overlay.requests[slot]
        return Load(prefill_tokens, blocks, requests)

    def active_overlaps(self, sequence_hashes: list[int], slot_count: int) -> list[int]:
        """By slot: leading blocks of the prompt that are active there already."""
        own = self._overlay.match_depths(sequence_hashes)
        folded = self._state().active.match_depths(sequence_hashes) if self._replica_sync else []
        if own and folded:
            both = depth_by_slot(own, slot_count), depth_by_slot(folded, slot_count)
            return list(map(max, *both))
        return depth_by_slot(own or folded, slot_count)
