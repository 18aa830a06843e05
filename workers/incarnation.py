"""One registration of a worker: one id, its record in the log, its lease, its ranks' KV feeds.

A worker that loses its lease, or whose log lost what it had acknowledged, goes on under a new id:
others may have recorded the end of the old one, and nothing revives an id. The process, its cache
and its running requests stay.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from eventstore.errors import LogUnavailable
from eventstore.log import EventLog
from eventstore.subjects import hex_id
from workers.card import Instance
from workers.discovery import Discovery, Lease
from workers.engine import MockEngine
from workers.kv_feed import EVENTS_MAX, KvFeed
from workers.registry import LEASE_EXPIRED, SHUTDOWN, record_registered, record_removed

LEAVE_S = 2.0
"""How long a worker that ends waits for the log to take its removal."""
FLUSH_S = 0.5
"""How long it waits for its last KV events, which matter to nobody once it is gone."""

_logger = logging.getLogger(__name__)


class Incarnation:
    """From `begin` until `lost` tells why it ended, or until `leave`."""

    def __init__(
        self,
        log: EventLog,
        discovery: Discovery,
        instance: Instance,
        engines: Sequence[MockEngine],
        *,
        kv_events_max: int = EVENTS_MAX,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """instance: its id is used for the first time. engines: by rank, from `dp_start` on.
        kv_events_max, jitter: of its KV feeds.
        """
        self.instance = instance
        self._log = log
        self._discovery = discovery
        self._engines = engines
        self._kv_events_max = kv_events_max
        self._jitter = jitter
        self._lease: Lease | None = None
        self.feeds: list[KvFeed] = []
        """By rank, from `dp_start` on."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why this incarnation is over, though it did not leave."""

    async def begin(self) -> None:
        """Record, list, and then announce the caches. Raises LogUnavailable or DiscoveryError;
        then it may be called again.
        """
        if not self.instance.registered_seq:
            seq = await record_registered(self._log, self.instance)
            self.instance = replace(self.instance, registered_seq=seq)
        self._lease = await self._discovery.register(self.instance, self.lose)
        for dp_rank, engine in zip(self.instance.ranks(), self._engines, strict=True):
            feed = KvFeed(
                self._log,
                self.instance.namespace,
                self.instance.worker_id,
                dp_rank,
                engine.cache_contents,
                contents_max=engine.config.num_gpu_blocks,
                events_max=self._kv_events_max,
                jitter=self._jitter,
                on_log_rewound=lambda: self.lose("the log lost what it had acknowledged"),
            )
            feed.start()
            self.feeds.append(feed)

    async def leave(self) -> None:
        """End in order: record the removal, so that nobody chooses it, then leave the list.

        If the log does not take the removal the lease is left to expire, and whoever sees that
        records it.
        """
        try:
            await self._record_end(SHUTDOWN)
        except LogUnavailable as error:
            _logger.warning("removal left to others worker=%s why=%s", self._name, error)
        else:
            if self._lease is not None:
                await self._lease.release()

    async def bury(self) -> None:
        """Record that this lost incarnation is over, in case nobody else has seen it."""
        try:
            await self._record_end(LEASE_EXPIRED)
        except LogUnavailable as error:
            _logger.warning("removal left to others worker=%s why=%s", self._name, error)
        if self._lease is not None:
            await self._lease.release()

    async def close(self) -> None:
        """Stop the feeds; nothing may be published on them any more. Safe to call twice."""
        await asyncio.gather(*(feed.close(FLUSH_S) for feed in self.feeds))

    @property
    def _name(self) -> str:
        return hex_id(self.instance.worker_id)

    def lose(self, cause: str) -> None:
        """Say that this incarnation is over; `lost` tells. Safe to call twice."""
        if not self.lost.done():
            self.lost.set_result(cause)

    async def _record_end(self, cause: str) -> None:
        await record_removed(
            self._log,
            self.instance.namespace,
            self.instance.worker_id,
            cause,
            self.instance.registered_seq,
            within_s=LEAVE_S,
        )
