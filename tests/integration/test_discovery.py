"""Discovery on a real nats-server: leases, their renewal and their end, and what a watch tells."""

import logging
from collections.abc import AsyncIterator

import pytest

from eventstore.connect import Nats
from eventstore.subjects import hex_id
from tests.integration.listing import TTL_S, Seen, closing, instance, unexpected
from tests.waiting import eventually
from workers.card import FrontendInstance
from workers.discovery import Discovery, MemDiscovery
from workers.discovery_nats import NatsDiscovery, NatsFrontends


@pytest.fixture(params=["nats", "mem"])
async def discovery(
    request: pytest.FixtureRequest, nats: Nats, namespace: str
) -> AsyncIterator[Discovery]:
    """Both forms: what these tests say holds for each."""
    made = MemDiscovery() if request.param == "mem" else NatsDiscovery(nats, namespace)
    async with closing(made):
        yield made


async def test_a_watch_tells_what_is_there_and_what_comes_and_goes(discovery: Discovery) -> None:
    first = await discovery.register(instance(1), unexpected)
    seen = Seen()
    watch = await discovery.watch(seen.put, seen.delete)
    assert seen.told == [("put", 1)]
    await discovery.register(instance(2), unexpected)
    await eventually(lambda: ("put", 2) in seen.told)
    assert watch.instances == {1: instance(1), 2: instance(2)}
    await first.release()
    await first.release()
    await eventually(lambda: seen.told[-1] == ("deregistered", 1))
    assert watch.instances == {2: instance(2)}


async def test_a_closed_watch_tells_nothing(discovery: Discovery) -> None:
    closed, open_ = Seen(), Seen()
    watch = await discovery.watch(closed.put, closed.delete)
    await discovery.watch(open_.put, open_.delete)
    await watch.close()
    await watch.close()
    await discovery.register(instance(1), unexpected)
    await eventually(lambda: open_.told == [("put", 1)])
    assert closed.told == []


async def test_a_lease_is_renewed_and_told_once(nats: Nats, namespace: str) -> None:
    """It stays listed for many times its TTL, and a renewal is no news."""
    seen = Seen()
    async with closing(NatsDiscovery(nats, namespace, lease_ttl_s=TTL_S)) as discovery:
        await discovery.watch(seen.put, seen.delete)
        await discovery.register(instance(1), unexpected)
        bucket = await nats.jetstream.key_value(f"reckon_{namespace}_instances")

        async def renewed() -> bool:
            return ((await bucket.get(f"v1.instances.backend.{hex_id(1)}")).revision or 0) >= 10

        await eventually(renewed)
    assert seen.told == [("put", 1)]


async def test_a_lease_that_is_not_renewed_ends(nats: Nats, nats_url: str, namespace: str) -> None:
    seen = Seen()
    async with closing(NatsDiscovery(nats, namespace)) as discovery:
        await discovery.watch(seen.put, seen.delete)
        worker = await Nats.connect([nats_url], name="worker")
        dying = NatsDiscovery(worker, namespace, lease_ttl_s=TTL_S)
        await dying.register(instance(1), unexpected)
        await eventually(lambda: seen.told == [("put", 1)])
        await dying.close()
        await worker.close()
        await eventually(lambda: seen.told == [("put", 1), ("expired", 1)])


async def test_a_frontends_next_lease_takes_the_place_of_the_one_that_ended(
    nats: Nats, namespace: str
) -> None:
    """The key is the same, and the server remembers for a minute what ended there."""
    told: list[tuple[str, int]] = []
    async with closing(NatsFrontends(nats, namespace)) as frontends:
        await frontends.watch(
            lambda instance: told.append(("put", instance.lease)),
            lambda instance, ending: told.append((ending.value, instance.lease)),
        )
        dying = NatsFrontends(nats, namespace, lease_ttl_s=TTL_S)
        await dying.register(FrontendInstance(frontend_id=1, address="a"), unexpected)
        await dying.close()
        await eventually(lambda: told == [("put", 1), ("expired", 1)])
        await frontends.register(FrontendInstance(frontend_id=1, address="a", lease=2), unexpected)
        await eventually(lambda: told[2:] == [("put", 2)])


async def test_whoever_loses_the_lease_is_told_once(nats: Nats, namespace: str) -> None:
    seen, lost = Seen(), list[str]()
    async with closing(NatsDiscovery(nats, namespace, lease_ttl_s=TTL_S)) as discovery:
        await discovery.watch(seen.put, seen.delete)
        lease = await discovery.register(instance(1), lost.append)
        bucket = await nats.jetstream.key_value(f"reckon_{namespace}_instances")
        await bucket.purge(f"v1.instances.backend.{hex_id(1)}")
        await eventually(lambda: bool(lost))
        await eventually(lambda: seen.told == [("put", 1), ("expired", 1)])
        await lease.release()
    assert len(lost) == 1


async def test_a_renewal_whose_answer_was_lost_is_no_loss(nats: Nats, namespace: str) -> None:
    """The owner's own value under a revision that it does not know is still its own."""
    async with closing(NatsDiscovery(nats, namespace, lease_ttl_s=TTL_S)) as discovery:
        lease = await discovery.register(instance(1), unexpected)
        bucket = await nats.jetstream.key_value(f"reckon_{namespace}_instances")
        key = f"v1.instances.backend.{hex_id(1)}"
        value = (await bucket.get(key)).value
        assert value is not None
        revision = await bucket.put(key, value)

        async def renewed() -> bool:
            return (await bucket.get(key)).revision != revision

        await eventually(renewed)
        await lease.release()
        seen = Seen()
        await discovery.watch(seen.put, seen.delete)
    assert seen.told == []


async def test_a_damaged_record_is_left_out_and_logged_once(
    nats: Nats, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    async with closing(NatsDiscovery(nats, namespace)) as discovery:
        await discovery.watch(seen.put, seen.delete)
        bucket = await nats.jetstream.key_value(f"reckon_{namespace}_instances")
        with caplog.at_level(logging.ERROR, "workers.discovery_nats"):
            for value in (b"{", b"[]", b'{"worker_id": 7}'):
                await bucket.put(f"v1.instances.backend.{hex_id(7)}", value)
            await discovery.register(instance(1), unexpected)
            await eventually(lambda: seen.told == [("put", 1)])
        assert len(caplog.records) == 1
        await bucket.delete(f"v1.instances.backend.{hex_id(7)}")
        await discovery.register(instance(2), unexpected)
        await eventually(lambda: ("put", 2) in seen.told)
    assert seen.told == [("put", 1), ("put", 2)]


async def test_a_component_that_is_no_key_is_refused(nats: Nats, namespace: str) -> None:
    async with closing(NatsDiscovery(nats, namespace)) as discovery:
        with pytest.raises(ValueError, match="letters"):
            await discovery.register(instance(1, component="a.b"), unexpected)
