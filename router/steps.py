"""Applying one record in steps, between which others on the event loop may have their turn.

A record may announce tens of thousands of blocks, which is tens of milliseconds of work. Events of
KV caches can be cut anywhere: they speak of blocks one by one, and every part of such an event is
itself one that might have been written. A record that holds anything else is applied whole.

Between two steps the state is that of the record's place, with the last of its blocks still
missing. It is consistent, so decisions may be made from it; its digest means nothing until the
record is complete.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial

from msgspec.structs import replace

from eventstore.events import (
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    KvRebased,
    PrefixPinned,
)
from eventstore.log import Record
from indexer.radix import WorkerRank
from router.fold import HANDLERS, begin, complete
from router.state import RouterState

BLOCKS_PER_STEP = 256
"""0.1 to 0.4 ms of work."""
_KV_EVENTS = (BlockStored, BlockRemoved, KvRebased, AllBlocksCleared, PrefixPinned)


def applying(
    state: RouterState, record: Record, blocks_max: int = BLOCKS_PER_STEP
) -> Generator[None, None, list[AnyEvent]]:
    """As `router.fold.apply`, yielding after every `blocks_max` blocks; all of it must be run."""
    events, decoded = begin(state, record)
    can_cut = all(isinstance(event, _KV_EVENTS) for event in events)
    done = 0
    for event in events:
        size = _blocks_in(state, event) if can_cut else 0
        if done and done + size > blocks_max:
            yield
            done = 0
        if size > blocks_max:
            for part in _parts(state, event, blocks_max):
                part()
                yield
        else:
            HANDLERS[type(event)](state, event)
            done += size
    complete(state, record, decoded)
    return events


def _blocks_in(state: RouterState, event: AnyEvent) -> int:
    """How many blocks the event is about."""
    if isinstance(event, BlockStored | BlockRemoved | PrefixPinned):
        return len(event.sequence_hashes)
    if isinstance(event, KvRebased | AllBlocksCleared) and _is_known(state, event):
        return state.tree.blocks_of(_rank_of(event))
    return 0


def _parts(state: RouterState, event: AnyEvent, blocks_max: int) -> Iterator[Callable[[], object]]:
    """What applies the event when all are called in turn; each is about `blocks_max` blocks."""
    handle = HANDLERS[type(event)]
    # An event of an unknown rank is counted as one. A pin is looked up as a whole.
    if isinstance(event, BlockStored | BlockRemoved) and _is_known(state, event):
        hashes = event.sequence_hashes
        for start in range(0, len(hashes), blocks_max):
            part = replace(event, sequence_hashes=hashes[start : start + blocks_max])
            if isinstance(part, BlockStored) and start:
                part = replace(part, parent_hash=hashes[start - 1])
            yield partial(handle, state, part)
        return
    if isinstance(event, KvRebased | AllBlocksCleared):
        rank = _rank_of(event)
        # The last first, so that hardly a block loses the one before it.
        held = list(state.tree.blocks(rank))[::-1]
        for start in range(0, len(held), blocks_max):
            yield partial(state.tree.remove, rank, held[start : start + blocks_max])
    yield partial(handle, state, event)


def _is_known(
    state: RouterState, event: BlockStored | BlockRemoved | KvRebased | AllBlocksCleared
) -> bool:
    return state.is_registered(event.worker_id, event.dp_rank)


def _rank_of(event: KvRebased | AllBlocksCleared) -> WorkerRank:
    return WorkerRank(event.worker_id, event.dp_rank)
