"""Applying one record in steps, between which others on the event loop may have their turn.

A record may announce tens of thousands of blocks, which is tens of milliseconds of work. Events of
KV caches can be cut anywhere: they speak of blocks one by one, and every part of such an event is
itself one that might have been written. A record that holds anything else is applied whole.

Between two steps the state is that of the record's place, with the last of its blocks still
missing. It is consistent, so decisions may be made from it; its digest means nothing until the
record is complete.
"""

from collections.abc import Generator, Iterator

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
from router.fold import HANDLERS, apply, begin, complete
from router.state import RouterState

BLOCKS_PER_STEP = 256
"""0.1 to 0.4 ms of work."""
HASH_BYTES = 9
"""Of a hash in a record, nearly always."""

_KV_EVENTS = (BlockStored, BlockRemoved, KvRebased, AllBlocksCleared, PrefixPinned)


def applying(
    state: RouterState, record: Record, blocks_max: int = BLOCKS_PER_STEP
) -> Generator[None, None, list[AnyEvent]]:
    """As `router.fold.apply`, yielding after every `blocks_max` blocks; all of it must be run.

    An event that empties a cache is one step, O(blocks of the rank).
    """
    if len(record.data) <= blocks_max * HASH_BYTES:
        return apply(state, record)
    events, decoded = begin(state, record)
    can_cut = all(isinstance(event, _KV_EVENTS) for event in events)
    blocks = 0
    for event in events:
        for part in _parts(state, event, blocks_max):
            if can_cut and blocks >= blocks_max:
                yield
                blocks = 0
            HANDLERS[type(part)](state, part)
            blocks += _weight(part, blocks_max)
    complete(state, record, decoded)
    return events


def _parts(state: RouterState, event: AnyEvent, blocks_max: int) -> Iterator[AnyEvent]:
    """The same fact as events of at most `blocks_max` blocks each; stored ones chain up.

    One of an unknown rank stays whole: it is counted as one.
    """
    if (
        not isinstance(event, BlockStored | BlockRemoved)
        or len(event.sequence_hashes) <= blocks_max
        or not state.is_registered(event.worker_id, event.dp_rank)
    ):
        yield event
        return
    hashes = event.sequence_hashes
    for start in range(0, len(hashes), blocks_max):
        part = replace(event, sequence_hashes=hashes[start : start + blocks_max])
        if isinstance(part, BlockStored) and start:
            part = replace(part, parent_hash=hashes[start - 1])
        yield part


def _weight(event: AnyEvent, blocks_max: int) -> int:
    if isinstance(event, BlockStored | BlockRemoved | PrefixPinned):
        return len(event.sequence_hashes)
    return blocks_max  # what empties a cache is a step of its own
