"""The part of the fold that follows requests: their phases, bookings, and what they teach.

`router.fold` calls these, one for each type of event.
"""

from eventstore.events import (
    Event,
    OutputGrown,
    PrefillCompleted,
    PrefillHopEnded,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    RequestRejected,
    RequestRouted,
)
from indexer.radix import WorkerRank
from router.active import ActiveSequences, growth
from router.cost import observe
from router.lifecycle import Phase, next_phase
from router.state import (
    NS_PER_MS,
    LiveRequest,
    RouterState,
    SessionUse,
    hop_id,
    new_model,
    session_key,
)


def _advance(state: RouterState, request_id: str, event: type[Event]) -> LiveRequest | None:
    """Move the request to the phase that `event` leads to; None, counted, if it may not happen."""
    live = state.requests.get(request_id)
    phase = None if live is None else next_phase(live.phase, event)
    if live is None or phase is None:
        state.anomalies.out_of_order += 1
        return None
    live.phase = phase
    return live


def accepted(state: RouterState, event: RequestAccepted) -> None:
    if event.request_id in state.requests:
        state.anomalies.out_of_order += 1
        return
    state.requests[event.request_id] = LiveRequest(Phase.ACCEPTED, event.frontend_id)


def queued(state: RouterState, event: RequestQueued) -> None:
    _advance(state, event.request_id, RequestQueued)


def routed(state: RouterState, event: RequestRouted) -> None:
    rank = state.rank(event.worker_id, event.dp_rank)
    if rank is None:
        return
    slot = state.tree.slot_of(rank)
    if event.role == "prefill":
        live = _hop_begun(state, event.request_id, slot)
        booking_id = hop_id(event.request_id)
    else:
        live = _advance(state, event.request_id, RequestRouted)
        booking_id = event.request_id
    if live is None:
        return
    live.isl = event.isl
    if event.role != "prefill":
        live.slot, live.attempt, live.expected_osl = slot, event.attempt, event.expected_osl
    if event.books_prefill:
        live.tokens_ahead = state.active.prefill_tokens[slot]
    book(state.active, booking_id, slot, event, state.workers[event.worker_id].block_size)
    prediction, session = event.prediction, event.session
    if prediction is not None:
        until_ns = state.ends_ns(prediction.ttl_ms * NS_PER_MS)
        state.predicted.insert(slot, event.sequence_hashes, until_ns)
        state.predicted.prune(prediction.blocks_max, prediction.blocks_kept)
    if session is not None:
        key = session_key(event.model, event.role, session.session_id)
        others = tuple(use for use in live.sessions if use.key != key)
        live.sessions = (*others, SessionUse(key, *rank, session.ttl_ms))
        state.sessions.bind(key, rank, state.ends_ns(session.ttl_ms * NS_PER_MS))


def book(
    active: ActiveSequences, booking_id: str, slot: int, event: RequestRouted, block_size: int
) -> None:
    """Put the booking that a decision stands for on `slot`; routers book ahead of the log so."""
    prefill_tokens = 0
    if event.books_prefill:
        prefill_tokens = max(0, event.isl - event.overlap_blocks * block_size)
    hashes: list[int] = []
    own_blocks = 0
    if event.books_blocks:
        if event.shares_blocks:
            hashes = event.sequence_hashes
        else:
            own_blocks = len(event.sequence_hashes)
    active.book(booking_id, slot, prefill_tokens, hashes, own_blocks)


def _hop_begun(state: RouterState, request_id: str, slot: int) -> LiveRequest | None:
    """A request goes to a prefill worker: before its decode worker is chosen, or at once after."""
    live = state.requests.get(request_id)
    if live is None or live.prefill_slot >= 0 or live.phase is Phase.DECODE:
        state.anomalies.out_of_order += 1
        return None
    if live.phase is Phase.QUEUED:
        live.phase = Phase.ACCEPTED
    live.prefill_slot = slot
    return live


def prefill_completed(state: RouterState, event: PrefillCompleted) -> None:
    live = _advance(state, event.request_id, PrefillCompleted)
    if live is None:
        return
    booking = state.active.get(event.request_id)
    if booking is not None and booking.prefill_tokens:
        _learn(state, live, live.slot, event)
    state.active.prefill_completed(event.request_id)


def prefill_hop_ended(state: RouterState, event: PrefillHopEnded) -> None:
    live = state.requests.get(event.request_id)
    if live is None or live.prefill_slot < 0:
        state.anomalies.out_of_order += 1
        return
    _learn(state, live, live.prefill_slot, event)
    live.prefill_slot = -1
    state.active.free(hop_id(event.request_id))


def _learn(
    state: RouterState, live: LiveRequest, slot: int, event: PrefillCompleted | PrefillHopEnded
) -> None:
    """What this prefill took tells what the worker's next ones will take."""
    if event.ttft_ms is None or event.cached_tokens is None:
        return
    worker_id = state.tree.rank_of(slot).worker_id
    worker = state.workers[worker_id]
    model = state.prefill_models.get(worker_id)
    if model is None:
        model = state.prefill_models[worker_id] = new_model(worker.max_num_batched_tokens)
    computed = max(1, live.isl - event.cached_tokens)
    observe(model, live.tokens_ahead + computed, event.ttft_ms)


def output_grown(state: RouterState, event: OutputGrown) -> None:
    live = _advance(state, event.request_id, OutputGrown)
    if live is None:
        return
    block_size = state.workers[state.tree.rank_of(live.slot).worker_id].block_size
    to = growth(live.isl, max(0, event.osl), block_size, live.expected_osl)
    state.active.grown(event.request_id, to)


def migrated(state: RouterState, event: RequestMigrated) -> None:
    live = _advance(state, event.request_id, RequestMigrated)
    if live is not None:
        live.slot = -1
        state.active.free(event.request_id)


def forget_request(state: RouterState, request_id: str) -> None:
    del state.requests[request_id]
    state.active.free(request_id)
    state.active.free(hop_id(request_id))


def ended(
    state: RouterState,
    event: RequestCompleted | RequestFailed | RequestCancelled | RequestRejected,
) -> None:
    live = _advance(state, event.request_id, type(event))
    if live is None:
        return
    for use in live.sessions:
        _rest(state, use)
    forget_request(state, event.request_id)


def _rest(state: RouterState, use: SessionUse) -> None:
    """A session is idle from here on, if it has not moved on to another rank meanwhile."""
    rank = WorkerRank(use.worker_id, use.dp_rank)
    if not state.is_registered(*rank):
        return
    if state.sessions.get(use.key, state.time_ns) in (None, rank):
        state.sessions.bind(use.key, rank, state.ends_ns(use.ttl_ms * NS_PER_MS))
