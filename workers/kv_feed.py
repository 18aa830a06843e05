"""One rank's KV events on their way to the log, never with a silent hole.

Every epoch begins with `kv.rebased` and the whole cache. The first one begins with the worker's
registration; a further one when a frontend asks because its picture has a hole, or when the
publisher's buffer is full, which drops what it holds: the cache as it is now says more than the
events that led to it.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from eventstore.errors import BufferFull
from eventstore.events import KvRebased, PrefixPinned
from eventstore.log import EventLog
from eventstore.publisher import BLOCKS_PER_EVENT_MAX, Publisher, split_blocks
from eventstore.subjects import kv_producer
from workers.kv_cache import KvEvent

FIRST_EPOCH = 1
EVENTS_MAX = 100_000
"""Unwritten events of a rank, beside those that tell its whole cache."""


class KvFeed:
    """The feed of one rank under one worker id. Runs from `start` to `close`."""

    def __init__(
        self,
        log: EventLog,
        namespace: str,
        worker_id: int,
        dp_rank: int,
        contents: Callable[[], Sequence[KvEvent]],
        *,
        contents_max: int,
        events_max: int = EVENTS_MAX,
        jitter: Callable[[], float] = random.random,
        on_log_rewound: Callable[[], None],
    ) -> None:
        """contents: the whole cache now, as stored events, at most `contents_max` of them.
        events_max: unwritten events, beside those that tell the whole cache. jitter: in [0, 1).
        on_log_rewound: the log lost what it had acknowledged; called on the event loop.
        """
        self._worker_id = worker_id
        self._dp_rank = dp_rank
        self._contents = contents
        self._pins: Callable[[], Sequence[PrefixPinned]] = tuple
        self._publisher = Publisher(
            log,
            namespace,
            kv_producer(worker_id, dp_rank),
            FIRST_EPOCH,
            # A block of the whole cache may be told twice: as stored, and as pinned.
            events_max=events_max + 2 * contents_max + 1,
            jitter=jitter,
            on_log_rewound=on_log_rewound,
        )

    @property
    def epoch(self) -> int:
        return self._publisher.epoch

    @property
    def buffered(self) -> int:
        """Events that the log does not have yet."""
        return self._publisher.buffered

    def start(self) -> None:
        """Begin to write, with the whole cache."""
        self._publisher.start()
        self._announce("started")

    def follow_pins(self, pins: Callable[[], Sequence[PrefixPinned]]) -> None:
        """Tell `pins()`, all that is pinned, now and after every announcement of the cache.

        At most as many as there are blocks. Raises as `publish` does.
        """
        self._pins = pins
        self.publish(pins())

    def publish(self, events: Sequence[KvEvent]) -> None:
        """Queue what happened, in order. Never waits.

        Raises LogUnavailable or MessageTooLarge if the publisher has stopped for good.
        """
        try:
            self._publish(events)
        except BufferFull:
            self._publisher.start_epoch(self._publisher.epoch + 1)
            self._announce("overflow")

    def announce_after(self, epoch: int) -> None:
        """Announce the whole cache in a later epoch than `epoch`, unless that has been done."""
        if self._publisher.epoch <= epoch:
            self._publisher.start_epoch(epoch + 1)
            self._announce("asked")

    async def flush(self, timeout_s: float) -> None:
        """Return when the log has all that was published. Raises LogUnavailable in time."""
        await self._publisher.flush(timeout_s)

    async def close(self, timeout_s: float) -> None:
        """Write what is buffered, for at most `timeout_s`, and stop. Safe to call twice."""
        await self._publisher.close(timeout_s)

    def _announce(self, reason: str) -> None:
        self._publisher.publish(KvRebased(self._worker_id, self._dp_rank, reason))
        self._publish(self._contents())
        self._publish(self._pins())

    def _publish(self, events: Sequence[KvEvent]) -> None:
        # The engine does not know under which id its worker is registered just now.
        for event in events:
            for part in _split(replace(event, worker_id=self._worker_id)):
                self._publisher.publish(part)


def _split(event: KvEvent) -> Iterator[KvEvent]:
    """The same fact as events that each fit into a message."""
    if not isinstance(event, PrefixPinned):
        yield from split_blocks(event)
        return
    hashes = event.sequence_hashes
    for start in range(0, len(hashes), BLOCKS_PER_EVENT_MAX):
        yield replace(event, sequence_hashes=hashes[start : start + BLOCKS_PER_EVENT_MAX])
