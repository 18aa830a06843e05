"""How a fact changes belief: `apply` is the only function that changes a `RouterState`.

It is pure, synchronous and total: no clock, no I/O, no randomness, and no exception on any record
that follows the last one. What cannot be applied is counted in `state.anomalies`.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from eventstore import codec
from eventstore.errors import BadSubject, LogGap
from eventstore.events import (
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    BusyThresholdChanged,
    Event,
    FrontendRemoved,
    KvRebased,
    OutputGrown,
    PrefillCompleted,
    PrefillHopEnded,
    PrefixPinned,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    RequestRejected,
    RequestRouted,
    SnapshotTaken,
    StateReset,
    WorkerRegistered,
    WorkerRemoved,
    WorkerSetAside,
)
from eventstore.log import Record
from eventstore.subjects import producer_of, rank_of_kv_producer
from indexer.radix import WorkerRank
from router.lifecycle import Phase
from router.request_fold import (
    accepted,
    ended,
    forget_request,
    migrated,
    output_grown,
    prefill_completed,
    prefill_hop_ended,
    queued,
    routed,
)
from router.state import (
    NS_PER_S,
    PRODUCERS_MAX,
    REMOVED_MAX,
    Anomalies,
    Producer,
    RouterState,
    Setting,
)


def apply(state: RouterState, record: Record) -> list[AnyEvent]:
    """Move `state` past `record` and return the events that were applied.

    A record at or below the cursor is a redelivery and changes nothing. LogGap if records are
    missing in between, or if another record stands now where the cursor is: the log lost its end
    and grew again. The state is then unchanged.
    """
    events, decoded = begin(state, record)
    for event in events:
        HANDLERS[type(event)](state, event)
    complete(state, record, decoded)
    return events


def begin(state: RouterState, record: Record) -> tuple[list[AnyEvent], codec.Decoded | None]:
    """What `apply` does before the events, which are still to be applied, in order.

    Returns them, and what `complete` wants to know. Raises LogGap.
    """
    if record.seq <= state.cursor:
        if record.seq == state.cursor and record.time_ns != state.time_ns and state.time_ns:
            raise LogGap(expected=record.seq + 1, got=record.seq)
        return [], None
    if record.seq != state.cursor + 1:
        raise LogGap(expected=state.cursor + 1, got=record.seq)
    decoded = codec.decode(record.data)
    events = [] if decoded.batch is None else _unseen(state, decoded)
    # Before the events, since some count from the time, or are known by the place, of their record.
    state.cursor = record.seq
    state.time_ns = record.time_ns
    state.predicted.expire(record.time_ns)
    state.pinned.expire(record.time_ns)
    state.sessions.expire(record.time_ns)
    return events, decoded


def complete(state: RouterState, record: Record, decoded: codec.Decoded | None) -> None:
    """What `apply` does after the events. decoded: as `begin` returned it."""
    if decoded is not None and decoded.unreadable:
        # Last: a rebase in the same batch does not tell what it was.
        _note_unreadable(state, record, decoded)


def _note_unreadable(state: RouterState, record: Record, decoded: codec.Decoded) -> None:
    for unreadable in decoded.unreadable:
        state.anomalies.unreadable += 1
        what = f"{record.seq}.{unreadable.index}".encode()
        state.unreadable_chain = zlib.crc32(what, state.unreadable_chain)
    try:
        _doubt(state, producer_of(record.subject))
    except BadSubject:
        pass  # not written by anyone we know, so there is nobody to ask again


def _doubt(state: RouterState, producer: str) -> None:
    """Something of `producer` is missing. A rank's cache can be asked for again."""
    named = rank_of_kv_producer(producer)
    if named is not None and state.is_registered(*named):
        state.unbased.add(WorkerRank(*named))


def _note_gap(state: RouterState, producer: str) -> None:
    state.anomalies.producer_gaps += 1
    _doubt(state, producer)


def _unseen(state: RouterState, decoded: codec.Decoded) -> list[AnyEvent]:
    """The batch's events that its producer had not written before."""
    batch = decoded.batch
    assert batch is not None
    known = state.producers.get(batch.producer)
    end = batch.first + decoded.count
    if known is None or batch.epoch > known.epoch:
        if known is None and len(state.producers) >= PRODUCERS_MAX:
            state.producers.popitem(last=False)
        state.producers[batch.producer] = Producer(batch.epoch, end)
        state.producers.move_to_end(batch.producer)
        if batch.first > 0:
            _note_gap(state, batch.producer)
        return batch.events
    state.producers.move_to_end(batch.producer)
    if batch.epoch < known.epoch:
        state.anomalies.duplicates += decoded.count
        return []
    if batch.first >= known.next:
        if batch.first > known.next:
            _note_gap(state, batch.producer)
        known.next = end
        return batch.events
    seen = min(known.next - batch.first, decoded.count)
    state.anomalies.duplicates += seen
    known.next = max(known.next, end)
    if not decoded.unreadable:
        return batch.events[seen:]
    bad = {unreadable.index for unreadable in decoded.unreadable}
    readable = (index for index in range(decoded.count) if index not in bad)
    return [e for index, e in zip(readable, batch.events, strict=True) if index >= seen]


# --- KV cache -------------------------------------------------------------------------------------


def _block_stored(state: RouterState, event: BlockStored) -> None:
    rank = state.rank(event.worker_id, event.dp_rank)
    if rank is not None:
        state.tree.store(rank, event.parent_hash, event.sequence_hashes)


def _block_removed(state: RouterState, event: BlockRemoved) -> None:
    rank = state.rank(event.worker_id, event.dp_rank)
    if rank is not None:
        state.tree.remove(rank, event.sequence_hashes)
        slot = state.tree.slot_of(rank)
        for believed in (state.predicted, state.pinned):
            if len(believed):
                believed.discard(slot, event.sequence_hashes)


def _cleared(state: RouterState, event: AllBlocksCleared | KvRebased) -> None:
    rank = state.rank(event.worker_id, event.dp_rank)
    if rank is None:
        return
    state.tree.clear(rank)
    state.unbased.discard(rank)
    slot = state.tree.slot_of(rank)
    state.pinned.drop_slot(slot)  # what stays pinned is told anew
    if type(event) is AllBlocksCleared:
        state.predicted.drop_slot(slot)


def _prefix_pinned(state: RouterState, event: PrefixPinned) -> None:
    rank = state.rank(event.worker_id, event.dp_rank)
    if rank is not None:
        until_ns = state.ends_ns(event.ttl_s * NS_PER_S)
        state.pinned.insert(state.tree.slot_of(rank), event.sequence_hashes, until_ns)


# --- workers --------------------------------------------------------------------------------------


def _worker_registered(state: RouterState, event: WorkerRegistered) -> None:
    if event.worker_id in state.removed_workers:
        state.anomalies.unknown_worker += 1
        return
    before = state.workers.get(event.worker_id)
    if before is not None:
        _forget_ranks(state, event.worker_id)
    state.workers[event.worker_id] = event
    for rank in state.ranks_of(event.worker_id):
        state.active.add_slot(state.tree.add_rank(rank))
        state.unbased.add(rank)
    state.workers_version += 1


def _worker_removed(state: RouterState, event: WorkerRemoved) -> None:
    if event.worker_id not in state.workers:
        state.anomalies.unknown_worker += 1
        return
    _forget_ranks(state, event.worker_id)
    state.prefill_models.pop(event.worker_id, None)
    del state.workers[event.worker_id]
    state.removed_workers[event.worker_id] = None
    if len(state.removed_workers) > REMOVED_MAX:
        state.removed_workers.popitem(last=False)
    state.workers_version += 1


def _forget_ranks(state: RouterState, worker_id: int) -> None:
    """Blocks and bookings go with the ranks; requests there wait for a new choice or their end."""
    for rank in state.ranks_of(worker_id):
        slot = state.tree.slot_of(rank)
        if state.active.drop_slot(slot):
            for live in state.requests.values():
                if live.slot == slot:
                    live.phase, live.slot = Phase.ACCEPTED, -1
                if live.prefill_slot == slot:
                    live.prefill_slot = -1
        state.predicted.drop_slot(slot)
        state.pinned.drop_slot(slot)
        state.sessions.drop_rank(rank)
        state.tree.remove_rank(rank)
        state.unbased.discard(rank)


# --- frontends ------------------------------------------------------------------------------------


def _frontend_removed(state: RouterState, event: FrontendRemoved) -> None:
    gone = [key for key, live in state.requests.items() if live.frontend_id == event.frontend_id]
    for request_id in gone:
        forget_request(state, request_id)


# --- operators ------------------------------------------------------------------------------------


def _threshold_changed(state: RouterState, event: BusyThresholdChanged) -> None:
    state.thresholds[event.model] = Setting(event, state.cursor, state.time_ns)


def _reset(state: RouterState, event: StateReset) -> None:
    """Forget what was believed, but not who serves, nor who wrote how far."""
    for rank in state.tree.ranks():
        state.tree.clear(rank)
        state.unbased.add(rank)
    for request_id in list(state.requests):
        forget_request(state, request_id)
    state.thresholds.clear()
    state.predicted.clear()
    state.pinned.clear()
    state.sessions.clear()
    state.prefill_models.clear()
    state.anomalies = Anomalies()
    state.unreadable_chain = 0


def _says_nothing_new(state: RouterState, event: SnapshotTaken | WorkerSetAside) -> None:
    """Written for whoever reads the log; nothing follows for the state."""


HANDLERS: Final[Mapping[type[Event], Callable[[RouterState, Any], None]]] = {
    BlockStored: _block_stored,
    BlockRemoved: _block_removed,
    AllBlocksCleared: _cleared,
    KvRebased: _cleared,
    PrefixPinned: _prefix_pinned,
    WorkerRegistered: _worker_registered,
    WorkerRemoved: _worker_removed,
    FrontendRemoved: _frontend_removed,
    RequestAccepted: accepted,
    RequestQueued: queued,
    RequestRouted: routed,
    PrefillCompleted: prefill_completed,
    PrefillHopEnded: prefill_hop_ended,
    OutputGrown: output_grown,
    RequestMigrated: migrated,
    RequestCompleted: ended,
    RequestFailed: ended,
    RequestCancelled: ended,
    RequestRejected: ended,
    WorkerSetAside: _says_nothing_new,
    BusyThresholdChanged: _threshold_changed,
    StateReset: _reset,
    SnapshotTaken: _says_nothing_new,
}
"""One handler per event type; a test holds the table to `AnyEvent`."""
