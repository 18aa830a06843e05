"""Who is listed now, kept in a JetStream KV bucket, `reckon_<namespace>_instances`.

`workers.leases` has the form of a record. A watch is a sequence of rounds: each lists everything,
then follows. It starts over when the connection was lost, and now and then anyway, so that whatever
a round missed the next one finds.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Generic

import msgspec
from nats.aio.msg import Msg
from nats.js import api

from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.subjects import check_namespace, hex_id
from eventstore.tasks import end
from workers.card import FrontendInstance, Instance
from workers.discovery import Ending, Lease, OnDelete, OnLost, OnPut, T, Watch
from workers.errors import DiscoveryError
from workers.grace import GracePeriod
from workers.leases import (
    ANSWER_S,
    CLUSTER_LEASE_TTL_S,
    LEASE_TTL_S,
    RETRY_S,
    UNREACHABLE,
    Cell,
    LeaseTaken,
    RenewedLease,
    ending_of,
    key_of,
    open_bucket,
)

RESYNC_S = 30.0

_logger = logging.getLogger(__name__)


class NatsLeases(Generic[T]):
    """The processes of one kind in one namespace. Does not own the connection."""

    kind: type[T]
    """Of the records."""

    def __init__(
        self,
        connection: Nats,
        namespace: str,
        *,
        lease_ttl_s: int | None = None,
        replicas: int | None = None,
    ) -> None:
        """lease_ttl_s: whole seconds, at least 1; None: as the server needs it.
        replicas: see `eventstore.replicas`."""
        self._nats = connection
        self._js = connection.jetstream
        self._bucket = f"reckon_{check_namespace(namespace)}_instances"
        default_s = CLUSTER_LEASE_TTL_S if connection.clustered else LEASE_TTL_S
        self._lease_ttl_s = lease_ttl_s or default_s
        self._replicas = replicas
        # For as long as frontends, whose watches last the default, hold back that a lease expired.
        self._grace = GracePeriod(connection, self._bucket, default_s)
        self._leases: set[RenewedLease] = set()
        self._watches: set[_NatsWatch[T]] = set()

    async def register(self, instance: T, on_lost: OnLost) -> Lease:
        key = key_of(instance)
        cell = Cell(self._js, self._bucket, key, msgspec.json.encode(instance))
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                await open_bucket(self._nats, self._bucket, self._replicas)
                revision = await cell.claim(self._lease_ttl_s)
        except UNREACHABLE as error:
            what = f"cannot register in {self._bucket}"
            why = self._nats.denied(what, began_at) or f"{what}: {error!r}"
            raise DiscoveryError(str(why)) from error
        except LeaseTaken as error:
            raise DiscoveryError(f"cannot register {key}: {error}") from error
        lease = RenewedLease(cell, revision, self._lease_ttl_s, self._grace, on_lost)
        self._leases.add(lease)
        lease.task.add_done_callback(lambda _: self._leases.discard(lease))
        return lease

    async def watch(self, on_put: OnPut[T], on_delete: OnDelete[T]) -> Watch[T]:
        watch = _NatsWatch(
            self._nats,
            self._bucket,
            self.kind,
            on_put,
            on_delete,
            hold_s=self._lease_ttl_s,
            replicas=self._replicas,
        )
        began_at = time.monotonic()
        self._watches.add(watch)
        watch.task.add_done_callback(lambda _: self._watches.discard(watch))
        try:
            async with asyncio.timeout(ANSWER_S):
                await watch.synced.wait()
        except TimeoutError as error:
            await watch.close()
            what = f"no picture of {self._bucket} within {ANSWER_S:.0f} s"
            raise DiscoveryError(str(self._nats.denied(what, began_at) or what)) from error
        return watch

    async def close(self) -> None:
        for lease in list(self._leases):
            await lease.stop()
        for watch in list(self._watches):
            await watch.close()
        self._grace.close()


class _NatsWatch(Generic[T]):
    """Keeps `instances` as the bucket says, and tells of every change."""

    def __init__(
        self,
        connection: Nats,
        bucket: str,
        kind: type[T],
        on_put: OnPut[T],
        on_delete: OnDelete[T],
        *,
        hold_s: float,
        replicas: int | None,
    ) -> None:
        """hold_s: for how long expiry is not believed, from the start of a grace period on, and
        after an outage of the connection: the others may have been cut off as well."""
        self._nats = connection
        self._js = connection.jetstream
        self._bucket = bucket
        self._prefix = f"$KV.{bucket}."
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._on_put = on_put
        self._on_delete = on_delete
        self._grace = GracePeriod(connection, bucket, hold_s)
        self._hold_s = hold_s
        self._replicas = replicas
        self._instances: dict[str, T] = {}
        self._values: dict[str, bytes] = {}
        self._damaged: set[str] = set()
        self._listed: set[str] | None = None
        """Keys that this round's listing has named so far; None once it is complete."""
        self._round = 0
        self._reconnected = asyncio.Event()
        self._reconnected_at_s = -math.inf
        self._held: dict[str, None] = {}
        """Keys of instances whose lease expired, which is not believed yet; oldest first."""
        self._settling: asyncio.Task[None] | None = None
        self.synced = asyncio.Event()
        """Set while the picture is complete."""
        connection.on_connected.add(self._on_reconnect)
        self.task = asyncio.create_task(self._run(), name=f"watch {bucket}")

    @property
    def instances(self) -> Mapping[int, T]:
        return {instance.listed_id: instance for instance in self._instances.values()}

    async def close(self) -> None:
        self._nats.on_connected.discard(self._on_reconnect)
        await end(self.task)
        if self._settling is not None:
            await end(self._settling)
        self._grace.close()

    async def _run(self) -> None:
        for number in itertools.count(1):
            self._round = number
            try:
                await self._list_and_follow(number)
            except UNREACHABLE as error:
                _logger.debug("watch starts over bucket=%s why=%r", self._bucket, error)
                await asyncio.sleep(RETRY_S)

    async def _list_and_follow(self, number: int) -> None:
        """One round: returns when it is time for the next one."""
        await self._nats.wait_connected()
        self._reconnected.clear()
        await open_bucket(self._nats, self._bucket, self._replicas)
        self._listed = set()
        self.synced.clear()

        async def on_message(message: Msg) -> None:
            if number == self._round:  # else left over from an earlier subscription
                self._take(message)

        subscription = await self._js.subscribe(
            f"{self._prefix}{self._kind.LISTED_UNDER}.>",
            stream=f"KV_{self._bucket}",
            cb=on_message,
            ordered_consumer=True,
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            inactive_threshold=RESYNC_S,
        )
        try:
            info = await subscription.consumer_info()
            if not info.num_pending and not (info.delivered and info.delivered.consumer_seq):
                self._complete_listing()  # an empty bucket sends nothing
            async with asyncio.timeout(ANSWER_S):
                await self.synced.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_S):
                    await self._reconnected.wait()
        finally:
            await subscription.unsubscribe()

    def _on_reconnect(self) -> None:
        self._reconnected_at_s = asyncio.get_running_loop().time()
        self._reconnected.set()

    def _take(self, message: Msg) -> None:
        key = message.subject.removeprefix(self._prefix)
        ending = ending_of(message.headers)
        if ending is not None:
            self._end(key, ending)
        else:
            self._put(key, message.data)
        if self._listed is not None:
            if ending is None:
                self._listed.add(key)
            if message.metadata.num_pending == 0:
                self._complete_listing()

    def _complete_listing(self) -> None:
        if self._listed is None:
            return
        missing = self._instances.keys() - self._listed
        self._listed = None
        for key in missing:
            self._end(key, Ending.EXPIRED)
        self.synced.set()

    def _put(self, key: str, value: bytes) -> None:
        self._held.pop(key, None)
        if self._values.get(key) == value:  # renewed
            return
        try:
            instance = self._decoder.decode(value)
            if key.rpartition(".")[2] != hex_id(instance.listed_id):
                raise ValueError(f"it names {hex_id(instance.listed_id)}")
        except ValueError as error:  # msgspec's errors are ValueErrors
            if key not in self._damaged:
                self._damaged.add(key)
                _logger.error("instance left out key=%s why=%s", key, error)
            return
        self._damaged.discard(key)
        self._values[key] = value
        self._instances[key] = instance
        self._on_put(instance)

    def _end(self, key: str, ending: Ending) -> None:
        self._damaged.discard(key)
        if key not in self._instances:
            return
        if ending is Ending.EXPIRED and not self._believes_at_once():
            self._hold(key)
        else:
            self._drop(key, ending)

    def _drop(self, key: str, ending: Ending) -> None:
        self._held.pop(key, None)
        del self._values[key]
        self._on_delete(self._instances.pop(key), ending)

    # After an outage of the server, or after a time in which no server of a cluster led the bucket,
    # all leases may have ended at once, without a worker being dead. For the time in which live
    # workers notice and write their records again, expiry is not believed.

    def _believes_at_once(self) -> bool:
        return self._grace.surely_over and self._cut_off_ago_s() >= self._hold_s

    def _cut_off_ago_s(self) -> float:
        return asyncio.get_running_loop().time() - self._reconnected_at_s

    def _hold(self, key: str) -> None:
        self._held[key] = None
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle(), name=f"settle {self._bucket}")

    async def _settle(self) -> None:
        """Tell the ends that are held, those whose owners did not come back, once it is time."""
        told = False
        while self._held:
            try:
                left_s = max(await self._grace.left_s(), self._hold_s - self._cut_off_ago_s())
            except LogUnavailable:
                return  # the connection is closed: nothing is told any more
            if left_s > 0:
                if not told:
                    told = True
                    _logger.warning(
                        "expired leases held back bucket=%s for_s=%.1f why=nobody could renew them",
                        self._bucket,
                        left_s,
                    )
                await asyncio.sleep(left_s)
                continue  # who leads may have changed once more
            if told:
                _logger.warning("held leases end bucket=%s count=%d", self._bucket, len(self._held))
            for key in tuple(self._held):
                self._drop(key, Ending.EXPIRED)


class NatsDiscovery(NatsLeases[Instance]):
    """The workers of one namespace."""

    kind = Instance


class NatsFrontends(NatsLeases[FrontendInstance]):
    """The frontends of one namespace."""

    kind = FrontendInstance
