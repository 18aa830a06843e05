"""What a router believes: a pure fold over the log, and its digest.

`RouterState` is changed by `router.fold.apply` and nothing else. It knows no clock but the log's,
and holds nothing that does not follow from the records up to `cursor`.
"""

import hashlib
from collections import OrderedDict

import msgspec
from msgspec import Struct

from eventstore.events import BusyThresholdChanged, WorkerRegistered
from indexer.radix import RadixTree, WorkerRank
from router.active import ActiveSequences
from router.lifecycle import Phase

PRODUCERS_MAX = 4096
"""Producers remembered for deduplication; beyond, the one unheard for longest is forgotten."""
REMOVED_MAX = 4096
"""Removed workers remembered, so that a late repeat of a registration brings none of them back."""


class Producer(Struct, gc=False):
    """How far a producer has been read: event numbers below `next` of `epoch` are applied."""

    epoch: int
    next: int


class LiveRequest(Struct, gc=False):
    """A request that has not ended. `slot`: -1 while it is booked nowhere."""

    phase: Phase
    frontend_id: int
    slot: int = -1
    attempt: int = -1


class Anomalies(Struct):
    """What the log said that could not be applied. All zero in a healthy deployment."""

    unreadable: int = 0
    """Messages and events that this version cannot read."""
    duplicates: int = 0
    """Events seen before from their producer (harmless)."""
    producer_gaps: int = 0
    """Times a producer's numbers jumped: something of it never reached the log."""
    unknown_worker: int = 0
    """Events about a worker that is not registered, such as late ones of a removed worker."""
    out_of_order: int = 0
    """Request events that may not follow in the request's phase."""


class RouterState:
    """Index, load, workers and thresholds as of record `cursor`."""

    def __init__(self, cursor: int = 0) -> None:
        self.cursor = cursor
        self.time_ns = 0
        """The log's time of the last record."""
        self.tree = RadixTree()
        self.active = ActiveSequences()
        self.workers: dict[int, WorkerRegistered] = {}
        self.unbased: set[WorkerRank] = set()
        """Registered ranks whose blocks are not all known: they have not announced their cache
        since they registered or since a reset, or something they wrote is missing."""
        self.requests: dict[str, LiveRequest] = {}
        self.thresholds: dict[str, BusyThresholdChanged] = {}
        self.producers: OrderedDict[str, Producer] = OrderedDict()
        self.removed_workers: OrderedDict[int, None] = OrderedDict()
        self.anomalies = Anomalies()
        self.unreadable_chain = 0
        """A running hash over the unreadable records, so that replicas that differ in what they
        can read differ in their digest."""
        self.workers_version = 0
        """Counts changes of the set of workers. Not part of the state proper."""

    @property
    def follow_from(self) -> int:
        """Where to go on reading the log: at the last record itself, so that `apply` can tell
        whether the log still has it."""
        return self.cursor if self.time_ns else self.cursor + 1

    def ranks_of(self, worker_id: int) -> list[WorkerRank]:
        """The worker's ranks, ascending; empty if it is not registered."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return []
        ranks = range(worker.dp_start, worker.dp_start + worker.dp_size)
        return [WorkerRank(worker_id, dp_rank) for dp_rank in ranks]

    def digest(self) -> str:
        """A name for this state: equal on any two replicas that applied the same records.

        Independent of slots, of dictionary order and of how the state came about. O(ranks + live
        requests + producers), not O(blocks): the index keeps its part up to date.
        """
        rank_of = {self.tree.slot_of(rank): rank for rank in self.tree.ranks()}
        requests = []
        for request_id in sorted(self.requests):
            live = self.requests[request_id]
            booking = self.active.get(request_id)
            booked = None
            if booking is not None:
                hashes = booking.sequence_hashes
                tail = hashes[-1] if hashes else 0
                rank = rank_of[booking.slot]
                booked = (*rank, booking.prefill_tokens, len(hashes), tail)
            requests.append((request_id, live.phase, live.frontend_id, live.attempt, booked))
        parts = (
            self.tree.digest(),
            [self.workers[key] for key in sorted(self.workers)],
            sorted(self.unbased),
            requests,
            [self.thresholds[key] for key in sorted(self.thresholds)],
            [(key, p.epoch, p.next) for key, p in self.producers.items()],
            list(self.removed_workers),
            self.anomalies,
            self.unreadable_chain,
        )
        return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()

    def check(self) -> None:
        """Assert what must hold between the parts."""
        self.tree.check()
        self.active.check()
        registered = {rank for worker_id in self.workers for rank in self.ranks_of(worker_id)}
        assert set(self.tree.ranks()) == registered
        assert self.unbased <= registered
        for request_id, live in self.requests.items():
            booking = self.active.get(request_id)
            assert (live.slot >= 0) == (booking is not None)
            assert (live.phase in (Phase.PREFILL, Phase.DECODE)) == (booking is not None)
            assert booking is None or booking.slot == live.slot
        assert len(self.active) == sum(live.slot >= 0 for live in self.requests.values())
        assert len(self.producers) <= PRODUCERS_MAX
        assert len(self.removed_workers) <= REMOVED_MAX
