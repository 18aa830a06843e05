"""Discovery as processes meet it: one store of leases, and a link to it for each of them.

The store does what the KV bucket of `workers.discovery_nats` does: a record lives as long as it is
renewed in time, watchers hear of every change after a while, and one that was cut off gets the
whole list. While the store is down no lease ends.
"""

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Generic, NamedTuple, TypeVar

from workers.card import Listed
from workers.discovery import Ending, Lease, OnDelete, OnLost, OnPut, Watch
from workers.errors import DiscoveryError

TTL_S = 5.0
RETRY_S = 0.25
ANSWER_S = 5.0

T = TypeVar("T", bound=Listed)


class _Entry(NamedTuple, Generic[T]):
    instance: T
    ends_at: float


class LeaseStore(Generic[T]):
    """The list of one kind of instances, by id."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry[T]] = {}
        self.endings: dict[int, Ending] = {}
        """How those that are gone have left."""
        self.is_up = True
        self.links: list[LeaseLink[T]] = []

    def put(self, instance: T) -> None:
        """List it, or renew its lease."""
        loop = asyncio.get_running_loop()
        is_new = instance.listed_id not in self.entries
        self.entries[instance.listed_id] = _Entry(instance, loop.time() + TTL_S)
        if is_new:
            self.endings.pop(instance.listed_id, None)
            loop.call_later(TTL_S, self._expire, instance.listed_id)
            self.tell()

    def end(self, listed_id: int, ending: Ending) -> None:
        """Take it off the list, if it is there."""
        entry = self.entries.pop(listed_id, None)
        if entry is not None:
            self.endings[listed_id] = ending
            self.tell()

    def _expire(self, listed_id: int) -> None:
        entry = self.entries.get(listed_id)
        if entry is None:
            return
        loop = asyncio.get_running_loop()
        left_s = entry.ends_at - loop.time() if self.is_up else TTL_S
        if left_s <= 0:
            self.end(listed_id, Ending.EXPIRED)
        else:
            loop.call_later(left_s, self._expire, listed_id)

    def tell(self) -> None:
        """Have all watchers look."""
        for link in self.links:
            link.wake()


class LeaseLink(Generic[T]):
    """One process's `Leases`. After `kill` nothing it does reaches the store."""

    def __init__(self, store: LeaseStore[T], rng: Random, latency_s: float) -> None:
        self.is_cut = False
        self._store = store
        self._rng = rng
        self._latency_s = latency_s
        self._is_dead = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watches: list[_Watch[T]] = []
        store.links.append(self)

    @property
    def is_open(self) -> bool:
        return self._store.is_up and not self.is_cut and not self._is_dead

    def kill(self) -> None:
        self._is_dead = True
        if self in self._store.links:
            self._store.links.remove(self)

    def wake(self) -> None:
        """The list changed, or can be reached again."""
        for watch in self._watches:
            watch.changed.set()

    async def delay(self) -> None:
        await asyncio.sleep(self._latency_s * self._rng.expovariate(1))

    # --- Leases -----------------------------------------------------------------------------------

    async def register(self, instance: T, on_lost: OnLost) -> Lease:
        await self._reach()
        self._store.put(instance)
        await self._reach()
        task = asyncio.create_task(self._renew(instance, on_lost), name="renew")
        self._tasks.append(task)
        return _Lease(self, self._store, instance.listed_id, task)

    async def watch(self, on_put: OnPut[T], on_delete: OnDelete[T]) -> Watch[T]:
        await self._reach()
        watch = _Watch(self, self._store, on_put, on_delete)
        watch.look()
        self._watches.append(watch)
        task = asyncio.create_task(watch.run(), name="watch")
        self._tasks.append(task)
        watch.task = task
        return watch

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _reach(self) -> None:
        """One way to the store. Raises DiscoveryError."""
        await self.delay()
        if not self.is_open:
            await asyncio.sleep(ANSWER_S)
            raise DiscoveryError(f"no answer from discovery within {ANSWER_S:g} s")

    async def _renew(self, instance: T, on_lost: OnLost) -> None:
        pause_s = TTL_S / 3
        while True:
            await asyncio.sleep(pause_s)
            await self.delay()
            if not self.is_open:
                pause_s = RETRY_S
                continue
            if instance.listed_id not in self._store.entries:
                on_lost("it expired")
                return
            self._store.put(instance)
            pause_s = TTL_S / 3


class _Lease(Lease):
    def __init__(
        self, link: LeaseLink[T], store: LeaseStore[T], listed_id: int, task: asyncio.Task[None]
    ) -> None:
        self._link = link
        self._end = store.end
        self._listed_id = listed_id
        self._task = task

    async def release(self) -> None:
        self._task.cancel()
        await self._link.delay()
        if self._link.is_open:
            self._end(self._listed_id, Ending.DEREGISTERED)


class _Watch(Watch[T]):
    task: asyncio.Task[None]

    def __init__(
        self, link: LeaseLink[T], store: LeaseStore[T], on_put: OnPut[T], on_delete: OnDelete[T]
    ) -> None:
        self.changed = asyncio.Event()
        self._link = link
        self._store = store
        self._on_put = on_put
        self._on_delete = on_delete
        self._seen: dict[int, T] = {}

    @property
    def instances(self) -> Mapping[int, T]:
        return self._seen

    def look(self) -> None:
        """Tell how the list differs from what was seen."""
        entries = self._store.entries
        for listed_id in [one for one in self._seen if one not in entries]:
            self._on_delete(self._seen.pop(listed_id), self._store.endings[listed_id])
        for listed_id, entry in list(entries.items()):
            if self._seen.get(listed_id) != entry.instance:
                self._seen[listed_id] = entry.instance
                self._on_put(entry.instance)

    async def run(self) -> None:
        while True:
            await self.changed.wait()
            self.changed.clear()
            await self._link.delay()
            if self._link.is_open:
                self.look()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
