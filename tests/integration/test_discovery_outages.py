"""Discovery when the line to the server is cut, and when the server itself was away."""

import time

import pytest

from eventstore.connect import Nats
from eventstore.server import EmbeddedServer
from tests.integration.listing import TTL_S, Entry, Seen, closing, instance, unexpected
from tests.integration.proxy import Proxy
from tests.waiting import eventually
from workers import discovery_nats
from workers.discovery_nats import NatsDiscovery
from workers.errors import DiscoveryError


async def test_what_happened_behind_a_cut_line_is_found_out(
    nats: Nats, nats_url: str, namespace: str
) -> None:
    """After a reconnect a watch tells what came and what went in between."""
    proxy = Proxy(nats_url)
    await proxy.mend()
    far = await Nats.connect([f"nats://127.0.0.1:{proxy.port}"], name="far")
    seen = Seen()
    async with closing(NatsDiscovery(nats, namespace)) as near_discovery:
        stays = await near_discovery.register(instance(1), unexpected)
        leaves = await near_discovery.register(instance(2), unexpected)
        dying = NatsDiscovery(nats, namespace, lease_ttl_s=TTL_S)
        await dying.register(instance(3), unexpected)
        async with closing(NatsDiscovery(far, namespace, lease_ttl_s=TTL_S)) as far_discovery:
            watch = await far_discovery.watch(seen.put, seen.delete)
            assert sorted(seen.told) == [("put", 1), ("put", 2), ("put", 3)]
            seen.told.clear()
            await proxy.cut()
            await eventually(lambda: not far.connected)
            await leaves.release()
            await dying.close()
            await near_discovery.register(instance(4), unexpected)
            near = Seen()
            near_watch = await near_discovery.watch(near.put, near.delete)
            await eventually(lambda: set(near_watch.instances) == {1, 4})
            await proxy.mend()
            await eventually(lambda: set(watch.instances) == {1, 4})
            assert sorted(seen.told) == [("deregistered", 2), ("expired", 3), ("put", 4)]
            assert seen.told.index(("put", 4)) < seen.told.index(("expired", 3))
        await stays.release()
    await far.close()
    await proxy.cut()


async def test_a_short_restart_of_the_server_is_nobodys_end(own_server: EmbeddedServer) -> None:
    seen = Seen()
    nats = await Nats.connect([own_server.url], name="test")
    async with closing(NatsDiscovery(nats, "n", lease_ttl_s=30)) as discovery:
        await discovery.watch(seen.put, seen.delete)
        await discovery.register(instance(1), unexpected)
        await eventually(lambda: seen.told == [("put", 1)])
        await own_server.stop()
        await eventually(lambda: not nats.connected)
        await own_server.start()
        await eventually(lambda: nats.connected)
        await discovery.register(instance(2), unexpected)
        await eventually(lambda: ("put", 2) in seen.told)
        assert seen.told == [("put", 1), ("put", 2)]
    await nats.close()


async def test_a_restart_that_outlasts_the_lease_is_no_live_workers_end(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The server ends, when it is back, what is due by then. The live worker keeps its id; that
    another one is dead is believed a little later.
    """
    proxy = Proxy(own_server.url)
    await proxy.mend()
    watching = await Nats.connect([own_server.url], name="watch")
    serving = await Nats.connect([f"nats://127.0.0.1:{proxy.port}"], name="worker")
    live, dead = (Entry(watching, "n", instance(each)) for each in (1, 2))
    seen = Seen()
    async with (
        closing(NatsDiscovery(watching, "n")) as near,
        closing(NatsDiscovery(serving, "n", lease_ttl_s=TTL_S)) as worker,
    ):
        await near.watch(seen.put, seen.delete)
        await worker.register(instance(1), unexpected)
        await dead.write_once(ttl_s=60)
        await eventually(lambda: seen.told == [("put", 1), ("put", 2)])
        await dead.write_once(TTL_S)
        await own_server.stop()
        due_s = time.monotonic() + TTL_S
        await proxy.cut()
        await eventually(lambda: time.monotonic() > due_s)
        await own_server.start()
        await eventually(live.expired)
        await eventually(dead.expired)
        await proxy.mend()
        await eventually(lambda: "lease reclaimed" in caplog.text)
        await eventually(lambda: ("expired", 2) in seen.told)
        assert seen.told == [("put", 1), ("put", 2), ("expired", 2)]
    await watching.close()
    await serving.close()
    await proxy.cut()


async def test_an_outage_longer_than_the_lease(nats_url: str, namespace: str) -> None:
    """The lease ends and its owner registers anew; a watch hears of the new one before the end."""
    proxy = Proxy(nats_url)
    await proxy.mend()
    watching = await Nats.connect([f"nats://127.0.0.1:{proxy.port}"], name="watch")
    serving = await Nats.connect([f"nats://127.0.0.1:{proxy.port}"], name="worker")
    seen, lost = Seen(), list[str]()
    async with (
        closing(NatsDiscovery(watching, namespace, lease_ttl_s=2)) as far,
        closing(NatsDiscovery(serving, namespace, lease_ttl_s=TTL_S)) as worker,
    ):
        await far.watch(seen.put, seen.delete)
        await worker.register(instance(1), lost.append)
        await eventually(lambda: seen.told == [("put", 1)])
        near = await Nats.connect([nats_url], name="near")
        async with closing(NatsDiscovery(near, namespace)) as direct:
            gone = Seen()
            await direct.watch(gone.put, gone.delete)
            await proxy.cut()
            await eventually(lambda: gone.told == [("put", 1), ("expired", 1)])
        await near.close()
        await proxy.mend()
        await eventually(lambda: bool(lost))
        await worker.register(instance(2), unexpected)
        await eventually(lambda: ("expired", 1) in seen.told)
        assert seen.told == [("put", 1), ("put", 2), ("expired", 1)]
    await watching.close()
    await serving.close()
    await proxy.cut()


async def test_a_bucket_that_is_gone_is_made_again(nats: Nats, namespace: str) -> None:
    seen, lost = Seen(), list[str]()
    async with closing(NatsDiscovery(nats, namespace, lease_ttl_s=TTL_S)) as discovery:
        await discovery.register(instance(1), lost.append)
        await nats.jetstream.delete_key_value(f"reckon_{namespace}_instances")
        await discovery.watch(seen.put, seen.delete)
        await eventually(lambda: bool(lost))
        await discovery.register(instance(2), unexpected)
        await eventually(lambda: seen.told == [("put", 2)])


async def test_without_a_server_it_says_so(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery_nats, "ANSWER_S", 0.2)
    nats = await Nats.connect([own_server.url], name="test")
    await own_server.stop()
    await eventually(lambda: not nats.connected)
    async with closing(NatsDiscovery(nats, "n")) as discovery:
        seen = Seen()
        with pytest.raises(DiscoveryError):
            await discovery.watch(seen.put, seen.delete)
        with pytest.raises(DiscoveryError):
            await discovery.register(instance(1), unexpected)
    await nats.close()
