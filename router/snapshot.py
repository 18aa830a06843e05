"""A router's state as bytes, and back: the body of a snapshot.

    u32 length | part | u32 length | part | …          parts as MessagePack

The first part is everything small; then come the live requests, the bound sessions, the predicted
and pinned blocks and the tree's chains, in parts that are small enough to be restored one by one
between other work. Equal states make equal bytes: about
9 bytes for each block, however many ranks hold it.
"""

import struct
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import msgspec
from msgspec import Struct

from eventstore.events import WorkerRegistered
from eventstore.snapshots import BadSnapshot, Snapshot, checking, pack, unpack
from indexer.dump import Chain, dump, store_chain
from indexer.predicted import PredictedIndex, Run
from indexer.radix import WorkerRank
from router.active import Booking
from router.affinity import SessionEntry
from router.cost import PrefillModel
from router.lifecycle import Phase
from router.state import (
    Anomalies,
    LiveRequest,
    Producer,
    RouterState,
    SessionUse,
    Setting,
    hop_id,
)

PAIRS_PER_STEP = 2048
"""(block, rank) pairs, or blocks of bookings, that are restored in a step: 1 to 2 ms."""
SESSIONS_PER_STEP = 256
CHAIN_BLOCKS_MAX = 2048
"""Longer chains are cut, so that a step with them is not much longer."""

_LENGTH = struct.Struct("<I")
_HASH_BYTES = 8

T = TypeVar("T")


class _Small(Struct, frozen=True, array_like=True, tag=0):
    """Everything of a state but its requests and blocks."""

    cursor: int
    time_ns: int
    ranks: list[WorkerRank]
    """Those of the tree, sorted. Others refer to them by their place here."""
    workers: list[WorkerRegistered]
    unbased: list[WorkerRank]
    thresholds: list[Setting]
    producers: list[tuple[str, int, int]]
    """(name, epoch, next), the one unheard for longest first."""
    removed_workers: list[int]
    """The one removed first, first."""
    anomalies: Anomalies
    unreadable_chain: int
    prefill_models: list[tuple[int, PrefillModel]]


class _Booked(Struct, frozen=True, array_like=True, gc=False):
    """A booking. place: of its rank."""

    place: int
    prefill_tokens: int
    sequence_hashes: bytes
    """Little-endian u64 each."""
    own_blocks: int
    output_blocks: int
    relief: int


class _Live(Struct, frozen=True, array_like=True, gc=False):
    """A live request, with its own booking and that of its hop."""

    request_id: str
    phase: Phase
    frontend_id: int
    attempt: int
    isl: int
    expected_osl: int | None
    tokens_ahead: int
    booked: _Booked | None = None
    hop: _Booked | None = None
    sessions: tuple[SessionUse, ...] = ()


class _Sessions(Struct, frozen=True, array_like=True, tag=3):
    entries: list[SessionEntry]


class _Believed(Struct, frozen=True, array_like=True, tag=4):
    """Predicted or pinned blocks of the rank at `place`."""

    pinned: bool
    place: int
    runs: list[Run]


class _Requests(Struct, frozen=True, array_like=True, tag=1):
    live: list[_Live]


class _Chains(Struct, frozen=True, array_like=True, tag=2):
    chains: list[Chain]


_encoder = msgspec.msgpack.Encoder()
_Part = _Small | _Requests | _Chains | _Sessions | _Believed
_decoder: msgspec.msgpack.Decoder[_Part] = msgspec.msgpack.Decoder(_Part)


def snapshot_of(state: RouterState, *, identity: str, version: str, from_seq: int = 1) -> bytes:
    """The snapshot of a state: an object for a `SnapshotStore`. Cost as `encode`.

    identity: of the log. version: of the code. from_seq: as in `SnapshotHeader`.
    """
    return pack(
        encode(state),
        identity=identity,
        seq=state.cursor,
        time_ns=state.time_ns,
        digest=state.digest(),
        version=version,
        from_seq=from_seq,
    )


def restored(name: str, data: bytes) -> RouterState:
    """The state of which `data` is a snapshot. Raises BadSnapshot."""
    return run_through(restoring(unpack(name, data)))


def restoring(snapshot: Snapshot) -> Generator[None, None, RouterState]:
    """Check and restore a snapshot, a few milliseconds of work a step; returns the state.

    Raises BadSnapshot; then nothing has come of it. About 0.6 µs a (block, rank) pair.
    """
    yield from checking(snapshot)
    try:
        state = yield from _restoring(snapshot.body)
    except (ValueError, KeyError, IndexError, struct.error, msgspec.MsgspecError) as error:
        # The bytes are those that were written, so whoever wrote them meant something else.
        raise BadSnapshot(snapshot.name, f"cannot be read: {error!r}") from error
    header = snapshot.header
    if (state.cursor, state.digest()) != (header.seq, header.digest):
        raise BadSnapshot(snapshot.name, "is not of the state that its digest names")
    return state


def run_through(steps: Generator[None, None, T]) -> T:
    """Do all the steps at once; returns what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


# --- state to bytes -------------------------------------------------------------------------------


def encode(state: RouterState) -> bytes:
    """The body. Does not modify the state. About 2.5 µs a (block, rank) pair."""
    dumped = dump(state.tree)
    small = _Small(
        cursor=state.cursor,
        time_ns=state.time_ns,
        ranks=dumped.ranks,
        workers=[state.workers[key] for key in sorted(state.workers)],
        unbased=sorted(state.unbased),
        thresholds=[state.thresholds[key] for key in sorted(state.thresholds)],
        producers=[(name, each.epoch, each.next) for name, each in state.producers.items()],
        removed_workers=list(state.removed_workers),
        anomalies=state.anomalies,
        unreadable_chain=state.unreadable_chain,
        prefill_models=sorted(state.prefill_models.items()),
    )
    parts: list[bytes] = []
    for part in (
        small,
        *_request_parts(state, dumped.ranks),
        *_session_parts(state),
        *_believed_parts(state, dumped.ranks),
        *_chain_parts(dumped.chains),
    ):
        data = _encoder.encode(part)
        parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)


def _request_parts(state: RouterState, ranks: list[WorkerRank]) -> Iterator[_Requests]:
    place_of = {state.tree.slot_of(rank): place for place, rank in enumerate(ranks)}
    live = []
    room = PAIRS_PER_STEP
    for request_id in sorted(state.requests):
        request = state.requests[request_id]
        booking, hop = state.active.get(request_id), state.active.get(hop_id(request_id))
        each = _Live(
            request_id,
            request.phase,
            request.frontend_id,
            request.attempt,
            request.isl,
            request.expected_osl,
            request.tokens_ahead,
            _booked(booking, place_of),
            _booked(hop, place_of),
            request.sessions,
        )
        live.append(each)
        room -= 1 + sum(len(each.sequence_hashes) for each in (booking, hop) if each is not None)
        if room <= 0:
            yield _Requests(live)
            live, room = [], PAIRS_PER_STEP
    if live:
        yield _Requests(live)


def _booked(booking: Booking | None, place_of: dict[int, int]) -> _Booked | None:
    if booking is None:
        return None
    hashes = booking.sequence_hashes
    return _Booked(
        place_of[booking.slot],
        booking.prefill_tokens,
        struct.pack(f"<{len(hashes)}Q", *hashes),
        booking.own_blocks,
        booking.output_blocks,
        booking.relief,
    )


def _session_parts(state: RouterState) -> Iterator[_Sessions]:
    entries = state.sessions.entries()
    for start in range(0, len(entries), SESSIONS_PER_STEP):
        yield _Sessions(entries[start : start + SESSIONS_PER_STEP])


def _believed_parts(state: RouterState, ranks: list[WorkerRank]) -> Iterator[_Believed]:
    for pinned, index in ((False, state.predicted), (True, state.pinned)):
        for place, rank in enumerate(ranks):
            part: list[Run] = []
            room = PAIRS_PER_STEP
            for run in index.runs(state.tree.slot_of(rank)):
                part.append(run)
                room -= len(run.depth_steps)
                if room <= 0:
                    yield _Believed(pinned, place, part)
                    part, room = [], PAIRS_PER_STEP
            if part:
                yield _Believed(pinned, place, part)


def _chain_parts(chains: Iterable[Chain]) -> Iterator[_Chains]:
    part: list[Chain] = []
    room = PAIRS_PER_STEP
    for whole in chains:
        for chain in _cut(whole):
            part.append(chain)
            room -= len(chain.sequence_hashes) // _HASH_BYTES * len(chain.holders)
            if room <= 0:
                yield _Chains(part)
                part, room = [], PAIRS_PER_STEP
    if part:
        yield _Chains(part)


def _cut(chain: Chain) -> Iterator[Chain]:
    """The same blocks as chains of at most CHAIN_BLOCKS_MAX, each below the one before."""
    bytes_max = CHAIN_BLOCKS_MAX * _HASH_BYTES
    hashes = chain.sequence_hashes
    if len(hashes) <= bytes_max:
        yield chain
        return
    parent = chain.parent_hash
    for start in range(0, len(hashes), bytes_max):
        piece = hashes[start : start + bytes_max]
        yield Chain(chain.holders, parent, piece)
        parent = int.from_bytes(piece[-_HASH_BYTES:], "little")


# --- bytes to state -------------------------------------------------------------------------------


def _restoring(body: memoryview) -> Generator[None, None, RouterState]:
    parts = _parts(body)
    small = next(parts, None)
    if not isinstance(small, _Small):
        raise ValueError("the first part is another")
    state = _restored_small(small)
    done = 0
    for part in parts:
        if isinstance(part, _Requests):
            for live in part.live:
                _restore_request(state, small.ranks, live)
            yield
        elif isinstance(part, _Sessions):
            for entry in part.entries:
                rank = WorkerRank(entry.worker_id, entry.dp_rank)
                state.sessions.bind(entry.session_id, rank, entry.expires_ns)
            yield
        elif isinstance(part, _Believed):
            index: PredictedIndex = state.pinned if part.pinned else state.predicted
            slot = state.tree.slot_of(small.ranks[part.place])
            for run in part.runs:
                index.restore(slot, run)
            yield
        elif isinstance(part, _Chains):
            for chain in part.chains:
                for pairs in store_chain(state.tree, small.ranks, chain):
                    done += pairs
                    if done >= PAIRS_PER_STEP:
                        done = 0
                        yield
        else:
            raise ValueError("a second first part")
    return state


def _parts(body: memoryview) -> Iterator[_Part]:
    start = 0
    while start < len(body):
        (length,) = _LENGTH.unpack_from(body, start)
        start += _LENGTH.size
        yield _decoder.decode(body[start : start + length])
        start += length


def _restored_small(small: _Small) -> RouterState:
    state = RouterState(small.cursor)
    state.time_ns = small.time_ns
    for rank in small.ranks:
        state.active.add_slot(state.tree.add_rank(rank))
    state.workers.update((worker.worker_id, worker) for worker in small.workers)
    state.unbased.update(small.unbased)
    state.thresholds.update((setting.changed.model, setting) for setting in small.thresholds)
    state.prefill_models.update(small.prefill_models)
    state.producers.update((name, Producer(epoch, end)) for name, epoch, end in small.producers)
    state.removed_workers.update(dict.fromkeys(small.removed_workers))
    state.anomalies = small.anomalies
    state.unreadable_chain = small.unreadable_chain
    return state


def _restore_request(state: RouterState, ranks: list[WorkerRank], live: _Live) -> None:
    request = state.requests[live.request_id] = LiveRequest(
        live.phase,
        live.frontend_id,
        attempt=live.attempt,
        isl=live.isl,
        expected_osl=live.expected_osl,
        tokens_ahead=live.tokens_ahead,
        sessions=live.sessions,
    )
    if live.booked is not None:
        request.slot = state.tree.slot_of(ranks[live.booked.place])
        state.active.restore(live.request_id, _booking(request.slot, live.booked))
    if live.hop is not None:
        request.prefill_slot = state.tree.slot_of(ranks[live.hop.place])
        state.active.restore(hop_id(live.request_id), _booking(request.prefill_slot, live.hop))


def _booking(slot: int, booked: _Booked) -> Booking:
    count = len(booked.sequence_hashes) // _HASH_BYTES
    return Booking(
        slot,
        booked.prefill_tokens,
        list(struct.unpack(f"<{count}Q", booked.sequence_hashes)),
        booked.own_blocks,
        booked.output_blocks,
        booked.relief,
    )
