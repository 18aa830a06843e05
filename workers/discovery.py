"""Who serves now: instances that are listed for as long as their lease is renewed.

`Discovery` is what a worker and a frontend need of a store of leases. `discovery_nats.py` is the
real one, and `MemDiscovery` the model of it for tests and simulations. The list is about the
present only; what the log knows of a worker is in `workers.registry`.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Generic, Protocol, TypeAlias, TypeVar

from workers.card import Instance, Listed


class Ending(StrEnum):
    """How an instance left the list."""

    DEREGISTERED = "deregistered"
    """Its own word: it is shutting down in order."""
    EXPIRED = "expired"
    """Its lease ended, or its record is gone and nobody saw how."""


T = TypeVar("T", bound=Listed)
T_co = TypeVar("T_co", bound=Listed, covariant=True)

OnPut = Callable[[T], None]
OnDelete = Callable[[T, Ending], None]
OnLost = Callable[[str], None]


class Lease(Protocol):
    """A registered instance's place on the list, renewed until it is released or lost."""

    async def release(self) -> None:
        """Take the instance off the list. `on_lost` is not called any more. Safe to call twice.

        If the store cannot be reached the lease is left to expire.
        """


class Watch(Protocol[T_co]):
    """A running `watch`."""

    @property
    def instances(self) -> Mapping[int, T_co]:
        """The listed instances by their id, as far as the watch knows."""

    async def close(self) -> None:
        """Stop; no callback is called again. Safe to call twice."""


class Leases(Protocol[T]):
    """A store of leases. Callbacks are called on the event loop and must not raise."""

    async def register(self, instance: T, on_lost: OnLost) -> Lease:
        """Put `instance` on the list.

        on_lost: called once, with the cause, if the lease ends although nobody released it. The
        instance's id must not be registered again: others may have recorded its end.
        Raises DiscoveryError; then it may be called again with the same instance.
        """

    async def watch(self, on_put: OnPut[T], on_delete: OnDelete[T]) -> Watch[T]:
        """Tell what is listed, then every change; returns after the first full picture.

        `on_put` comes once per instance, and again only if its record changed; `on_delete` only
        for instances that were put. Raises DiscoveryError.
        """

    async def close(self) -> None:
        """Stop renewing and watching. Leases that were not released are left to expire."""


Discovery: TypeAlias = Leases[Instance]


class MemLeases(Generic[T]):
    """Leases within one process. Leases end when a test says so (`expire`)."""

    def __init__(self) -> None:
        self._instances: dict[int, T] = {}
        self._on_lost: dict[int, OnLost] = {}
        self._watches: list[_MemWatch[T]] = []

    async def register(self, instance: T, on_lost: OnLost) -> Lease:
        self._instances[instance.listed_id] = instance
        self._on_lost[instance.listed_id] = on_lost
        for watch in list(self._watches):
            watch.on_put(instance)
        return _MemLease(self, instance.listed_id)

    async def watch(self, on_put: OnPut[T], on_delete: OnDelete[T]) -> Watch[T]:
        watch = _MemWatch(self._watches, self._instances, on_put, on_delete)
        self._watches.append(watch)
        for instance in list(self._instances.values()):
            on_put(instance)
        return watch

    async def close(self) -> None:
        self._watches.clear()
        self._on_lost.clear()

    def expire(self, listed_id: int) -> None:
        """End a lease as if it had not been renewed in time."""
        on_lost = self._on_lost.get(listed_id)
        self.end(listed_id, Ending.EXPIRED)
        if on_lost is not None:
            on_lost("the lease expired")

    def end(self, listed_id: int, ending: Ending) -> None:
        """Take an instance off the list, if it is there."""
        instance = self._instances.pop(listed_id, None)
        self._on_lost.pop(listed_id, None)
        if instance is not None:
            for watch in list(self._watches):
                watch.on_delete(instance, ending)


class _MemLease(Generic[T]):
    def __init__(self, discovery: MemLeases[T], listed_id: int) -> None:
        self._discovery = discovery
        self._listed_id = listed_id

    async def release(self) -> None:
        self._discovery.end(self._listed_id, Ending.DEREGISTERED)


class _MemWatch(Generic[T]):
    def __init__(
        self,
        watches: list["_MemWatch[T]"],
        instances: Mapping[int, T],
        on_put: OnPut[T],
        on_delete: OnDelete[T],
    ) -> None:
        self._watches = watches
        self.instances = instances
        self.on_put = on_put
        self.on_delete = on_delete

    async def close(self) -> None:
        if self in self._watches:
            self._watches.remove(self)


class MemDiscovery(MemLeases[Instance]):
    """Discovery of workers within one process."""
