"""Discovery on a real nats-server: leases, expiry, lost connections, restarts; what is recorded."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from eventstore.codec import decode
from eventstore.connect import Nats
from eventstore.events import WorkerRegistered, WorkerRemoved
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog
from eventstore.memory import DUPLICATE_WINDOW_NS, MemoryLog
from eventstore.server import EmbeddedServer
from eventstore.subjects import hex_id
from tests.waiting import eventually
from workers import discovery_nats
from workers.card import Instance, ModelCard
from workers.discovery import Discovery, Ending, MemDiscovery
from workers.discovery_nats import NatsDiscovery
from workers.errors import DiscoveryError
from workers.registry import LEASE_EXPIRED, SHUTDOWN, record_registered, record_removed

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
async def closing(discovery: Discovery) -> AsyncIterator[Discovery]:
    try:
        yield discovery
    finally:
        await discovery.close()


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


class Proxy:
    """A way to the server that a test can cut and mend."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._pipe, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        await self._server.wait_closed()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        host, port = self._target.hostname, self._target.port
        far_reader, far_writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_copy(reader, far_writer))
                tasks.create_task(_copy(far_reader, writer))
        except asyncio.CancelledError:
            pass  # cut
        finally:
            self._pipes.discard(task)
            for each in (writer, far_writer):
                each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


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


# --- what the log is told -------------------------------------------------------------------------


@pytest.fixture(params=["jetstream", "memory"])
async def log(
    request: pytest.FixtureRequest, nats: Nats, namespace: str
) -> AsyncIterator[EventLog]:
    opened: EventLog
    if request.param == "memory":
        opened = MemoryLog(time.time_ns)
    else:
        opened = await JetStreamLog.open(nats, namespace)
    yield opened
    await opened.close()


async def events(log: EventLog) -> list[object]:
    """All events of the log, each with the number that its producer gave it."""
    found: list[object] = []
    async for record in log.read(1):
        batch = decode(record.data).batch
        assert batch is not None
        assert record.subject.endswith(batch.producer)
        found += [(batch.first, event) for event in batch.events]
    return found


async def test_a_removal_is_recorded_once_by_however_many_see_it(
    log: EventLog, namespace: str
) -> None:
    seq = await record_registered(log, instance(5, namespace))
    wrote = await asyncio.gather(
        *(record_removed(log, namespace, 5, LEASE_EXPIRED, seq) for _ in range(3)),
        record_removed(log, namespace, 5, SHUTDOWN, seq),
    )
    assert sum(wrote) == 1
    registered, removed = await events(log)
    assert registered == (
        0,
        WorkerRegistered(
            worker_id=5, model="m", worker_type="aggregated", block_size=64, context_length=1000
        ),
    )
    assert removed in [(1, WorkerRemoved(5, cause)) for cause in (LEASE_EXPIRED, SHUTDOWN)]


async def test_other_workers_do_not_matter(log: EventLog, namespace: str) -> None:
    seqs = [await record_registered(log, instance(n, namespace)) for n in range(3)]
    assert await record_removed(log, namespace, 0, LEASE_EXPIRED, seqs[0])
    assert await record_removed(log, namespace, 2, LEASE_EXPIRED, seqs[2])
    assert not await record_removed(log, namespace, 0, LEASE_EXPIRED, seqs[0])
    assert len(await events(log)) == 5


async def test_a_late_observer_adds_nothing(namespace: str) -> None:
    """Beyond the window of message ids, its expectation of the subject keeps it out."""
    now_ns = 0
    log = MemoryLog(lambda: now_ns)
    seq = await record_registered(log, instance(5, namespace))
    assert await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    now_ns += 10 * DUPLICATE_WINDOW_NS
    await record_registered(log, instance(6, namespace))
    assert not await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert len(await events(log)) == 3


async def test_a_removal_after_the_registration_was_trimmed(log: EventLog, namespace: str) -> None:
    seq = await record_registered(log, instance(5, namespace))
    other = await record_registered(log, instance(6, namespace))
    await log.trim(other)
    assert await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert not await record_removed(log, namespace, 5, LEASE_EXPIRED, seq)
    assert len(await events(log)) == 2


async def test_a_removal_without_the_registrations_seq(log: EventLog, namespace: str) -> None:
    await record_registered(log, instance(5, namespace))
    wrote = [await record_removed(log, namespace, 5, LEASE_EXPIRED, 0) for _ in range(2)]
    assert wrote == [True, False]
