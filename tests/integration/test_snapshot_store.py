"""The store of snapshots and the claim, against a real server."""

import os
import time

import pytest

from eventstore.claims import ClaimLost, ClaimTaken
from eventstore.claims_nats import NatsClaims
from eventstore.connect import Nats
from eventstore.snapshots import HEAD_BYTES_MAX, BadSnapshot, SnapshotGone, life_of, name_of
from eventstore.snapshots_nats import CHUNK_BYTES, NatsSnapshots
from tests.waiting import eventually

NAMES = [name_of("i", seq) for seq in (5, 10, 100)]


@pytest.fixture
def store(nats: Nats, namespace: str) -> NatsSnapshots:
    return NatsSnapshots(nats, namespace)


# --- the store ------------------------------------------------------------------------------------


async def test_what_is_written_is_read(store: NatsSnapshots) -> None:
    assert await store.refs() == []
    with pytest.raises(SnapshotGone):
        await store.read(NAMES[0])
    await store.delete(NAMES[0])
    assert await store.sweep() == 0
    large = os.urandom(2 * CHUNK_BYTES + 17)
    for name, data in zip(NAMES, (large, b"x", b""), strict=True):
        await store.write(name, data)
        assert await store.read(name) == data
    assert [ref.seq for ref in await store.refs()] == [5, 10, 100]
    assert {ref.life for ref in await store.refs()} == {life_of("i")}
    head = await store.read(NAMES[0], HEAD_BYTES_MAX)
    assert HEAD_BYTES_MAX <= len(head) <= CHUNK_BYTES and large.startswith(head)
    await store.write(NAMES[1], b"another")
    assert await store.read(NAMES[1]) == b"another"
    await store.delete(NAMES[0])
    await store.delete(NAMES[0])
    assert [ref.seq for ref in await store.refs()] == [10, 100]


async def test_what_is_deleted_and_what_was_never_finished_leaves_nothing(
    store: NatsSnapshots, nats: Nats, namespace: str
) -> None:
    await store.write(NAMES[0], os.urandom(2 * CHUNK_BYTES))
    await store.write(NAMES[1], b"kept")
    await store.delete(NAMES[0])
    bucket = f"reckon_{namespace}_snapshots"
    for _ in range(2):
        await nats.jetstream.publish(f"$O.{bucket}.C.unfinished", b"chunk")
    assert await store.sweep() == 1
    state = (await nats.jetstream.stream_info(f"OBJ_{bucket}")).state
    assert state.messages == 2, "one chunk and one description"
    assert await store.read(NAMES[1]) == b"kept"


async def test_objects_of_others_and_objects_deleted_by_hand(
    store: NatsSnapshots, nats: Nats, namespace: str
) -> None:
    await store.write(NAMES[0], b"x")
    others = await nats.jetstream.object_store(f"reckon_{namespace}_snapshots")
    await others.put("notes", b"of an operator")
    assert [ref.name for ref in await store.refs()] == [NAMES[0]]
    await others.delete(NAMES[0])
    with pytest.raises(BadSnapshot, match="deleted"):
        await store.read(NAMES[0])
    assert await store.sweep() == 0
    await store.write(NAMES[0], b"again")
    assert await store.read(NAMES[0]) == b"again"


# --- the claim ------------------------------------------------------------------------------------


async def test_one_holds_the_claim(nats: Nats, namespace: str) -> None:
    claims = NatsClaims(nats, namespace, "work")
    assert await claims.holder() is None
    claim = await claims.take("one")
    assert await claims.holder() == "one"
    with pytest.raises(ClaimTaken, match="one"):
        await claims.take("two")
    claim.check()
    await claim.release()
    await claim.release()
    with pytest.raises(ClaimLost):
        claim.check()
    assert await claims.holder() is None
    second = await claims.take("two")
    assert await claims.holder() == "two"
    await second.release()


async def test_a_claim_is_renewed_and_ends_with_its_holder(nats: Nats, namespace: str) -> None:
    claims = NatsClaims(nats, namespace, "work", ttl_s=1)
    claim = await claims.take("one")
    started_s = time.monotonic()
    await eventually(lambda: time.monotonic() > started_s + 1.5)
    claim.check()
    assert await claims.holder() == "one"
    claim._task.cancel()  # type: ignore[attr-defined]  # as a holder that stands still

    async def free() -> bool:
        return await claims.holder() is None

    await eventually(free)
    with pytest.raises(ClaimLost):
        claim.check()
    second = await claims.take("two")
    await claim.release()
    assert await claims.holder() == "two"
    await second.release()
