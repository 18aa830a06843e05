"""What tests of discovery share: an instance, a watch that remembers, an end in order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from eventstore.connect import Nats
from eventstore.replicas import ASK_TIMEOUT_S
from tests.waiting import eventually
from workers.card import Instance, ModelCard
from workers.discovery import Ending, Leases, T
from workers.leases import UNREACHABLE, Cell, ending_of, key_of

CARD = ModelCard(name="m", block_size=64, context_length=1000, files={"tokenizer.json": "0" * 64})
TTL_S = 1


def instance(worker_id: int, namespace: str = "n", component: str = "backend") -> Instance:
    return Instance(
        worker_id=worker_id,
        namespace=namespace,
        component=component,
        endpoint="generate",
        address="127.0.0.1:9999",
        card=CARD,
    )


class Seen:
    """What a watch told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def put(self, instance: Instance) -> None:
        self.told.append(("put", instance.worker_id))

    def delete(self, instance: Instance, ending: Ending) -> None:
        self.told.append((ending.value, instance.worker_id))


def unexpected(cause: str) -> None:
    raise AssertionError(f"the lease was lost: {cause}")


@asynccontextmanager
async def closing(leases: Leases[T]) -> AsyncIterator[Leases[T]]:
    try:
        yield leases
    finally:
        await leases.close()


class Entry:
    """The record of one worker as the bucket has it."""

    def __init__(self, nats: Nats, namespace: str, listed: Instance) -> None:
        self._nats = nats
        self._bucket = f"reckon_{namespace}_instances"
        self._key = key_of(listed)
        self._value = msgspec.json.encode(listed)

    async def write_once(self, ttl_s: int) -> None:
        """List it, as a worker does that dies at once."""
        cell = Cell(self._nats.jetstream, self._bucket, self._key, self._value)

        async def written() -> bool:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    await cell.claim(ttl_s)
            except UNREACHABLE:  # as a cluster is that elects
                return False
            return True

        await eventually(written)

    async def expired(self) -> bool:
        """Whether its end stands there. False also while nobody answers."""
        subject = f"$KV.{self._bucket}.{self._key}"
        try:
            found = await self._nats.jetstream.get_msg(f"KV_{self._bucket}", subject=subject)
        except UNREACHABLE:
            return False
        return ending_of(found.headers) is Ending.EXPIRED
