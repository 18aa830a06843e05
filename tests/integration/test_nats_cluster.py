"""Three real nodes on loopback: what the death of one, or of two, costs.

Kills are SIGKILL, of the leader of the stream that matters, in the middle of traffic.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import aiohttp
import pytest
from msgspec import Struct

from eventstore import codec, events
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.events import BlockStored
from eventstore.jetstream import JetStreamLog
from eventstore.log import Record
from eventstore.publisher import Publisher
from eventstore.replicas import MoreReplicas, TooFewServers
from eventstore.subjects import kv_producer, stream_name
from tests.integration.listing import Entry, Seen, closing, instance, unexpected
from tests.integration.nats_nodes import NatsCluster
from tests.integration.processes import Deployment, deployment, stream
from tests.waiting import eventually
from workers.discovery_nats import NatsDiscovery
from workers.leases import open_bucket
from workers.models import ModelStore

WITHIN_S = 40.0
WORKER = 7

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[NatsCluster]:
    async with NatsCluster(tmp_path / "nats") as cluster:
        yield cluster


@pytest.fixture
async def clients(cluster: NatsCluster) -> AsyncIterator[list[Nats]]:
    """Three connections, as of three processes."""
    made = [await Nats.connect(cluster.urls, name=f"test {n}", wait_s=WITHIN_S) for n in range(3)]
    yield made
    for each in made:
        await each.close()


class Config(Struct, frozen=True):
    config: dict[str, object]


class Follower:
    """A replica in short: the numbers of the facts that it saw, in order."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.facts: list[int] = []

    def handle(self, record: Record) -> None:
        self.seqs.append(record.seq)
        batch = codec.decode(record.data).batch
        assert batch is not None
        for event in batch.events:
            assert isinstance(event, BlockStored)
            self.facts += event.sequence_hashes


async def test_the_leader_dies_under_traffic(cluster: NatsCluster, clients: list[Nats]) -> None:
    """Every acknowledged fact is there once, in order, and two followers saw the same."""
    nats = clients[0]
    logs = [await JetStreamLog.open(each, "ns", wait_s=WITHIN_S) for each in clients]
    assert await copies(nats, "RECKON_ns") == 3, "the default in a cluster"
    followers = [Follower(), Follower()]
    followings = [
        await log.follow(1, follower.handle)
        for log, follower in zip(logs[1:], followers, strict=True)
    ]
    publisher = Publisher(logs[0], "ns", kv_producer(WORKER, 0), 1, retry_s=(0.05, 0.5))
    published = 0
    async with publisher:

        async def publish_until(done: asyncio.Event) -> None:
            nonlocal published
            while not done.is_set():
                if publisher.buffered < publisher.events_max // 2:
                    publisher.publish(BlockStored(WORKER, 0, None, [published]))
                    published += 1
                await asyncio.sleep(0.0005)

        done = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publish_until(done))
            await eventually(lambda: publisher.appended_events > 500, WITHIN_S)
            victim = await cluster.leader(nats, stream_name("ns"))
            cluster.nodes[victim].kill()
            then = publisher.appended_events
            await eventually(lambda: publisher.appended_events > then + 2000, WITHIN_S)
            assert await cluster.leader(nats, stream_name("ns")) != victim
            done.set()
        await publisher.flush(WITHIN_S)
    await eventually(lambda: all(len(f.facts) >= published for f in followers), WITHIN_S)
    for follower in followers:
        assert follower.facts == list(range(published))
        assert follower.seqs == sorted(set(follower.seqs))
    assert followers[0].seqs == followers[1].seqs
    for following in followings:
        await following.close()
    for log in logs:
        await log.close()


class Traffic:
    """Requests to every frontend in turn, without a pause, for as long as the block runs."""

    def __init__(self, made: Deployment) -> None:
        self.statuses: Counter[int] = Counter()
        self._made = made
        self._stopped = False

    async def answered(self, count: int) -> None:
        """Return when that many more have been answered; all well up to then."""
        before = self.statuses.total()
        await eventually(lambda: self.statuses.total() >= before + count, WITHIN_S)
        assert set(self.statuses) == {200}

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await self._task

    async def _send(self) -> None:
        async with aiohttp.ClientSession() as session:
            for number in itertools.count():
                if self._stopped:
                    return
                frontend = self._made.frontends[number % len(self._made.frontends)]
                status, text = await stream(session, frontend.url, f"{number} " * 50, 5)
                self.statuses[status if text.endswith("data: [DONE]\n\n") else 0] += 1


async def buffered(made: Deployment) -> list[int]:
    """How many facts each frontend holds that the log has not taken."""
    healths = [await made.health(frontend) for frontend in made.frontends]
    return [health["log"]["buffered_events"] for health in healths]  # type: ignore[index]


async def read_all(made: Deployment) -> list[events.AnyEvent]:
    """The whole log. The cluster may still elect who makes consumers."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                return await made.recorded()
            except LogUnavailable:
                await asyncio.sleep(0.2)


async def test_serving_goes_on_without_one_node_and_without_two(
    cluster: NatsCluster, clients: list[Nats], namespace: str
) -> None:
    """Real frontends and workers. With two nodes gone nothing can be written, and facts wait."""
    async with deployment(",".join(cluster.urls), namespace) as made:
        for _ in range(2):
            # Shorter than the cluster is away: all of them end, though nobody is dead.
            await made.add_worker("--speedup-ratio", "20", "--lease-ttl-secs", "2")
            await made.add_frontend()
        await made.until_serving(2)
        observer = made.observer

        async def all_waits() -> bool:
            return min(await buffered(made)) > 0

        async def nothing_waits() -> bool:
            return max(await buffered(made)) == 0

        async with Traffic(made) as traffic:
            await traffic.answered(20)
            first = await cluster.leader(clients[0], f"KV_reckon_{namespace}_instances")
            cluster.nodes[first].kill()
            await traffic.answered(20)
            cursor = observer.state.cursor
            await eventually(lambda: observer.state.cursor > cursor + 100, WITHIN_S)

            second = next(name for name in cluster.nodes if name != first)
            cluster.nodes[second].kill()
            await eventually(all_waits, WITHIN_S)
            cursor = observer.state.cursor
            await traffic.answered(20)
            assert observer.state.cursor == cursor

            await asyncio.gather(cluster.nodes[first].start(), cluster.nodes[second].start())
            await eventually(lambda: observer.state.cursor > cursor + 100, WITHIN_S)
            await traffic.answered(20)
        await eventually(nothing_waits, WITHIN_S)
        await made.until_quiet()
        recorded = Counter(type(event) for event in await read_all(made))
        assert traffic.statuses == {200: recorded[events.RequestCompleted]}
        assert not recorded[events.RequestFailed]
        assert not recorded[events.WorkerRemoved] + recorded[events.FrontendRemoved]
        assert await made.audit() == [], "no fact twice, equal digests, no booking left"


async def copies(nats: Nats, stream: str) -> object:
    return (await nats.api(f"STREAM.INFO.{stream}", None, Config)).config["num_replicas"]


async def test_copies_are_raised_and_never_lowered(clients: list[Nats]) -> None:
    nats = clients[0]

    async def open_all(replicas: int | None, wait_s: float = WITHIN_S) -> None:
        log = await JetStreamLog.open(nats, "ns", replicas=replicas, wait_s=wait_s)
        await log.close()
        await open_bucket(nats, "reckon_ns_instances", replicas)
        await ModelStore(nats, "ns", replicas=replicas).upload({"config.json": b"{}"})

    async def all_copies() -> list[object]:
        streams = ("RECKON_ns", "KV_reckon_ns_instances", "OBJ_reckon_ns_models")
        return [await copies(nats, stream) for stream in streams]

    await open_all(1)
    assert await all_copies() == [1, 1, 1]
    await open_all(None)
    assert await all_copies() == [1, 1, 1], "nobody said that it should be otherwise"
    await open_all(3)
    assert await all_copies() == [3, 3, 3]
    await open_all(None)
    with pytest.raises(MoreReplicas, match="is kept by 3 servers, not 1") as more:
        await open_all(1)
    assert "--log-replicas 3" in more.value.try_this
    with pytest.raises(TooFewServers) as too_few:
        await open_all(5, wait_s=0.5)
    assert "--log-replicas" in too_few.value.try_this
    assert await all_copies() == [3, 3, 3]


async def test_a_server_alone_keeps_one_copy(nats: Nats, namespace: str) -> None:
    with pytest.raises(TooFewServers):
        await JetStreamLog.open(nats, namespace, replicas=3, wait_s=0.2)
    log = await JetStreamLog.open(nats, namespace)
    assert await copies(nats, stream_name(namespace)) == 1
    await log.close()


class SteppedDown(Struct, frozen=True):
    success: bool


async def test_a_new_leader_takes_nobody_for_dead_who_lives(
    clients: list[Nats], caplog: pytest.LogCaptureFixture
) -> None:
    """Both leases end soon after the election, as if nobody could have renewed them: the live
    worker takes its own back, under its id; that the other one is dead is believed later, once.
    """
    nats, seen = clients[0], Seen()
    live, dead = (Entry(nats, "ns", instance(each)) for each in (1, 2))
    log = await JetStreamLog.open(nats, "ns", wait_s=WITHIN_S)
    await log.close()  # the cluster has elected who makes streams
    async with (
        closing(NatsDiscovery(nats, "ns")) as frontend,
        closing(NatsDiscovery(clients[1], "ns", lease_ttl_s=21)) as worker,
    ):
        await frontend.watch(seen.put, seen.delete)
        await worker.register(instance(1), unexpected)  # and renews it 7 s from now
        await nats.api("STREAM.LEADER.STEPDOWN.KV_reckon_ns_instances", None, SteppedDown)
        for each in (dead, live):
            await each.write_once(ttl_s=1)
        await eventually(dead.expired)
        await eventually(live.expired)
        assert seen.told == [("put", 1), ("put", 2)]
        await eventually(lambda: "lease reclaimed" in caplog.text)
        assert not await live.expired()
        await eventually(lambda: len(seen.told) > 2, WITHIN_S)
        await worker.register(instance(3), unexpected)
        await eventually(lambda: len(seen.told) > 3, WITHIN_S)
        assert seen.told == [("put", 1), ("put", 2), ("expired", 2), ("put", 3)]
    assert caplog.text.count("expired leases held back") == 1
