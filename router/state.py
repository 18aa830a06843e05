"""What a router believes: a pure fold over the log, and its digest.

`RouterState` is changed by `router.fold.apply` and nothing else. It knows no clock but the log's,
and holds nothing that does not follow from the records up to `cursor`.
"""

import functools
import hashlib
from collections import OrderedDict
from typing import NamedTuple

import msgspec
from msgspec import Struct

from eventstore.events import BusyThresholdChanged, WorkerRegistered
from indexer.predicted import PredictedIndex
from indexer.radix import RadixTree, WorkerRank
from router.active import ActiveSequences
from router.affinity import Sessions
from router.cost import PrefillModel
from router.lifecycle import Phase

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
TIME_MAX_NS = 2**63 - 1

PRODUCERS_MAX = 4096
"""Producers remembered for deduplication; beyond, the one unheard for longest is forgotten."""
REMOVED_MAX = 4096
"""Removed workers remembered, so that a late repeat of a registration brings none of them back."""


class Producer(Struct, gc=False):
    """How far a producer has been read: event numbers below `next` of `epoch` are applied."""

    epoch: int
    next: int


class SessionUse(NamedTuple):
    """A request of a session is running on a rank; the session is not idle until it ends."""

    key: str
    """As `session_key` makes it."""
    worker_id: int
    dp_rank: int
    ttl_ms: int


class LiveRequest(Struct, gc=False):
    """A request that has not ended. A slot is -1 while it has no booking in that role."""

    phase: Phase
    frontend_id: int
    slot: int = -1
    attempt: int = -1
    prefill_slot: int = -1
    """Of its hop to a prefill worker, which is booked beside the request itself."""
    isl: int = 0
    """Prompt tokens of the last choice: after a migration the prompt is longer."""
    expected_osl: int | None = None
    tokens_ahead: int = 0
    """Prefill tokens that the chosen rank had to compute before this request's own."""
    sessions: tuple[SessionUse, ...] = ()
    """One for each role that serves it, the last choice of each."""


class Setting(Struct, frozen=True, array_like=True):
    """The busy thresholds of a model, and where in the log they were set."""

    changed: BusyThresholdChanged
    seq: int
    time_ns: int


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


@functools.cache
def prior_model(max_num_batched_tokens: int | None) -> PrefillModel:
    """What is assumed of a worker before anything is learned. Not to be changed."""
    return new_model(max_num_batched_tokens)


def new_model(max_num_batched_tokens: int | None) -> PrefillModel:
    if max_num_batched_tokens is None or max_num_batched_tokens < 1:
        return PrefillModel()
    return PrefillModel(batch_tokens=max_num_batched_tokens)


def session_key(model: str, role: str, session_id: str) -> str:
    """The key of a session's binding: each model it talks to has its own, and each of the roles
    that serve one request there."""
    return f"{role}\x00{model}\x00{session_id}"


def hop_id(request_id: str) -> str:
    """The id under which a request's hop to a prefill worker is booked."""
    return f"{request_id}\x00prefill"


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
        self.thresholds: dict[str, Setting] = {}
        self.predicted = PredictedIndex()
        """Blocks that ranks are believed to cache since requests with them were sent there."""
        self.pinned = PredictedIndex()
        """Blocks that ranks have promised to keep for a time."""
        self.sessions = Sessions()
        self.prefill_models: dict[int, PrefillModel] = {}
        """What a worker takes for its prefills, as learned from its requests."""
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

    def prefill_model(self, worker: WorkerRegistered) -> PrefillModel:
        """What was learned of the worker's prefills, or what is assumed before anything was."""
        learned = self.prefill_models.get(worker.worker_id)
        return prior_model(worker.max_num_batched_tokens) if learned is None else learned

    def session_rank(
        self, model: str, role: str, session_id: str, now_ns: int
    ) -> WorkerRank | None:
        """The rank that a session of the model is bound to at `now_ns`, if any."""
        return self.sessions.get(session_key(model, role, session_id), now_ns)

    def ends_ns(self, after_ns: int) -> int:
        """When something ends that lasts `after_ns` from the last record's time on; an i64,
        whatever the log says."""
        return max(0, min(self.time_ns + after_ns, TIME_MAX_NS))

    def is_registered(self, worker_id: int, dp_rank: int) -> bool:
        worker = self.workers.get(worker_id)
        return worker is not None and 0 <= dp_rank - worker.dp_start < worker.dp_size

    def rank(self, worker_id: int, dp_rank: int) -> WorkerRank | None:
        """The rank that an event speaks of; None, counted, if no worker is registered with it."""
        if not self.is_registered(worker_id, dp_rank):
            self.anomalies.unknown_worker += 1
            return None
        return WorkerRank(worker_id, dp_rank)

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
                booked = (
                    *rank,
                    booking.prefill_tokens,
                    len(hashes),
                    tail,
                    booking.own_blocks,
                    booking.output_blocks,
                    booking.relief,
                )
            hop = self.active.get(hop_id(request_id))
            hopped = None
            if live.prefill_slot >= 0 and hop is not None:
                hopped = (*rank_of[hop.slot], hop.prefill_tokens, hop.own_blocks)
            facts = (live.isl, live.expected_osl, live.tokens_ahead, live.sessions)
            phase = (live.phase, live.frontend_id, live.attempt)
            requests.append((request_id, *phase, *facts, booked, hopped))
        parts = (
            self.tree.digest(),
            [self.workers[key] for key in sorted(self.workers)],
            sorted(self.unbased),
            requests,
            [self.thresholds[key] for key in sorted(self.thresholds)],
            self.predicted.digest(self.tree.rank_of),
            self.pinned.digest(self.tree.rank_of),
            self.sessions.digest(),
            [(key, self.prefill_models[key]) for key in sorted(self.prefill_models)],
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
        self.predicted.check()
        self.pinned.check()
        self.sessions.check()
        assert self.prefill_models.keys() <= self.workers.keys()
        for request_id, live in self.requests.items():
            booking = self.active.get(request_id)
            hop = self.active.get(hop_id(request_id))
            assert (live.prefill_slot >= 0) == (hop is not None)
            assert hop is None or hop.slot == live.prefill_slot
            assert (live.slot >= 0) == (booking is not None)
            assert (live.phase in (Phase.PREFILL, Phase.DECODE)) == (booking is not None)
            assert booking is None or booking.slot == live.slot
        assert len(self.active) == sum(
            (live.slot >= 0) + (live.prefill_slot >= 0) for live in self.requests.values()
        )
        assert len(self.producers) <= PRODUCERS_MAX
        assert len(self.removed_workers) <= REMOVED_MAX
