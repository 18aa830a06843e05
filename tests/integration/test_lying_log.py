"""The log can lie, or be away: what is lost, who notices, and that serving never stops.

`docs/failures.md` has a row for each of these.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from eventstore import codec, events
from eventstore.connect import Nats
from eventstore.server import EmbeddedServer
from eventstore.subjects import kv_producer, stream_name, subject
from tests.integration.log_audit import leftover, parted, read
from tests.integration.processes import Deployment, deployment, stream
from tests.integration.proxy import Proxy
from tests.waiting import eventually

HEALED_S = 40.0


@pytest.fixture
async def here(own_server: EmbeddedServer, namespace: str) -> AsyncIterator[Deployment]:
    """Two frontends and two workers over a NATS server of the test's own."""
    async with deployment(own_server.url, namespace) as made:
        for _ in range(2):
            await made.add_worker("--speedup-ratio", "5")
            await made.add_frontend()
        await made.until_serving(2)
        yield made


async def ask(here: Deployment, prompt: str, tokens: int = 4) -> None:
    """One request to each frontend, which both answer in full."""
    async with aiohttp.ClientSession() as session:
        for frontend in here.frontends:
            status, text = await stream(session, frontend.url, prompt, tokens)
            assert status == 200 and text.endswith("data: [DONE]\n\n"), text[-300:]


async def until_agreed(here: Deployment, blocks_min: int = 1) -> None:
    """Everybody is at the head with equal digests, no cache in doubt, both workers known; and that
    is what the log says, which has no request left."""

    async def agreed() -> bool:
        seen = set()
        for frontend in here.frontends:
            health = await here.health(frontend)
            replica = health["replica"]
            assert isinstance(replica, dict)
            if health["status"] != "healthy" or len(list(health["instances"])) != 2:  # type: ignore[call-overload]
                return False
            seen.add((replica["cursor"], replica["digest"]))
        state = here.observer.state
        seen.add((state.cursor, state.digest()))
        known = len(state.workers) == 2 and not state.unbased and not state.requests
        return len(seen) == 1 and known and state.tree.pair_count >= blocks_min

    await eventually(agreed, HEALED_S)
    here.observer.state.check()
    records, views = await here.settled()
    facts, _ = read(records)
    assert leftover(facts) == [] and parted(records, facts, views) == []


async def test_a_stream_that_was_deleted_under_traffic(
    here: Deployment, own_server: EmbeddedServer
) -> None:
    await ask(here, "before " * 300)
    await eventually(lambda: here.observer.state.tree.pair_count > 0)
    admin = await Nats.connect([own_server.url], name="admin")
    async with aiohttp.ClientSession() as session:
        running = asyncio.create_task(stream(session, here.frontends[0].url, "long " * 300, 1500))
        await eventually(lambda: len(here.observer.state.requests) == 1)
        await admin.jetstream.delete_stream(stream_name(here.namespace))
        await admin.close()
        await ask(here, "during " * 300)
        status, text = await running
        assert status == 200 and '"error":' not in text
    await ask(here, "after " * 300)
    await until_agreed(here)


async def test_a_tail_that_a_crash_of_the_server_lost(
    here: Deployment, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The server comes back with the store of a moment ago."""
    await ask(here, "early " * 300)
    await until_agreed(here)
    kept = tmp_path / "kept"
    await own_server.stop()
    shutil.copytree(own_server.store_dir, kept)
    await own_server.start()
    await ask(here, "late " * 300)
    await eventually(lambda: here.observer.applied[events.RequestCompleted] == 4, HEALED_S)
    await until_agreed(here)
    await own_server.stop()
    shutil.rmtree(own_server.store_dir)
    shutil.copytree(kept, own_server.store_dir)
    await own_server.start()
    await eventually(lambda: here.observer.restarts > 0, HEALED_S)
    await ask(here, "anew " * 300)
    await until_agreed(here)


async def test_records_that_nobody_can_read(here: Deployment) -> None:
    """Nonsense, a newer format, an unknown event, an impossible one: set aside in full view."""
    await ask(here, "word " * 300)
    await eventually(lambda: here.observer.state.tree.pair_count > 0)
    worker_id = min(here.observer.state.workers)
    producer = kv_producer(worker_id, 0)
    whole = here.observer.state.anomalies.unreadable
    newer = b"\x95\x63" + codec.encode("control", 1, 0, [])[2:]
    unknown = codec.join("control", 9, 0, [b"\x92\xaanot.a.fact\x01"])
    impossible = codec.encode("request.x", 1, 0, [events.RequestCompleted("never", 1, "stop", 0)])
    for index, data in enumerate((b"nonsense", newer, unknown, impossible)):
        name = subject(here.namespace, producer if index == 0 else "control")
        await here.log.append(name, data, msg_id=f"bad.{index}")
    await eventually(lambda: here.observer.state.anomalies.unreadable == whole + 3)
    await eventually(lambda: here.observer.state.anomalies.out_of_order >= 1)
    await ask(here, "word " * 300)
    await until_agreed(here)
    health = await here.health(here.frontends[0])
    anomalies = health["anomalies"]
    assert isinstance(anomalies, dict) and anomalies["unreadable"] == whole + 3
    found = await here.audit()
    assert sum("can't be read" in finding for finding in found) == 3
    assert sum("was written by request.x" in finding for finding in found) == 1
    assert "request never ends and was never accepted" in found
    assert len(found) == 5, found


@contextlib.asynccontextmanager
async def one_far(
    nats_url: str, namespace: str, *options: str
) -> AsyncIterator[tuple[Deployment, Proxy]]:
    """Two frontends, the second of which reaches NATS over a line that can be cut."""
    line = Proxy(nats_url)
    await line.mend()
    try:
        async with deployment(nats_url, namespace) as made:
            await made.add_worker("--speedup-ratio", "20")
            await made.add_frontend(*options)
            await made.add_frontend(*options, "--nats-url", f"nats://127.0.0.1:{line.port}")
            await made.until_serving(1)
            await ask(made, "word " * 300)
            await made.settled()
            yield made, line
    finally:
        await line.cut()


async def test_a_log_trimmed_under_a_replica_that_is_cut_off(
    own_server: EmbeddedServer, namespace: str
) -> None:
    """No snapshot has what was trimmed: it says so, and caches and registrations are told anew."""
    async with one_far(own_server.url, namespace) as (here, line):
        near, far = here.frontends
        await line.cut()
        async with aiohttp.ClientSession() as session:
            for index in range(5):
                await stream(session, near.url, f"{index} " * 300, 4)
        await here.log.trim((await here.log.extent()).last_seq + 1)
        await line.mend()
        await ask(here, "again " * 300)

        async def knows_what_is_left() -> bool:
            health = await here.health(far)
            replica = health["replica"]
            assert isinstance(replica, dict)
            at_head = replica["cursor"] == here.observer.state.cursor
            return health["status"] == "healthy" and at_head and replica["snapshot"]["incomplete"]

        async def serves() -> bool:
            """The worker has registered anew: that it once did is not in the log any more."""
            async with aiohttp.ClientSession() as session:
                return (await stream(session, far.url, "again " * 300, 4))[0] == 200

        await eventually(knows_what_is_left, HEALED_S)
        await eventually(serves, HEALED_S)
        await ask(here, "again " * 300)


async def test_a_log_trimmed_to_a_snapshot_under_a_replica_that_is_cut_off(
    own_server: EmbeddedServer, namespace: str
) -> None:
    """It begins again with the snapshot, and agrees with who saw everything."""
    options = ("--router-snapshot-threshold", "20", "--router-snapshots-kept", "2")
    async with one_far(own_server.url, namespace, *options) as (here, line):
        near, far = here.frontends
        cursor = here.observer.state.cursor
        await line.cut()
        async with aiohttp.ClientSession() as session:

            async def trimmed() -> bool:
                await stream(session, near.url, "word " * 300, 4)
                return (await here.log.extent()).first_seq > cursor + 1

            await eventually(trimmed, HEALED_S)
        await line.mend()
        await ask(here, "again " * 300)

        async def agreed() -> bool:
            views = await here.views()
            return len(views) == 3 and len({(view.cursor, view.digest) for view in views}) == 1

        await eventually(agreed, HEALED_S)
        replica = (await here.health(far))["replica"]
        assert isinstance(replica, dict)
        assert replica["snapshot"]["seq"] > cursor and not replica["snapshot"]["incomplete"]


async def test_a_record_that_is_gone_from_the_middle(
    here: Deployment, own_server: EmbeddedServer
) -> None:
    """Who starts later finds the hole, says so, and serves; who has read it goes on."""
    await ask(here, "word " * 300)
    await until_agreed(here)
    admin = await Nats.connect([own_server.url], name="admin")
    middle = (await here.log.extent()).last_seq - 3
    await admin.jetstream.delete_msg(stream_name(here.namespace), middle)
    await admin.close()
    late = await here.add_frontend()

    async def serves() -> bool:
        health = await here.health(late)
        replica = health["replica"]
        assert isinstance(replica, dict)
        return health["status"] == "healthy" and replica["snapshot"]["incomplete"]

    await eventually(serves, HEALED_S)
    await ask(here, "again " * 300)
    health = await here.health(here.frontends[0])
    assert health["status"] == "healthy"


async def test_serving_goes_on_without_nats_and_every_fact_is_written_once_it_is_back(
    here: Deployment, own_server: EmbeddedServer
) -> None:
    await ask(here, "before " * 300)
    await until_agreed(here)
    await own_server.stop()
    try:

        async def degraded() -> bool:
            return all([(await here.health(f))["status"] == "degraded" for f in here.frontends])

        await eventually(degraded, HEALED_S)
        for _ in range(5):
            await ask(here, "without the log " * 100)
        buffered = (await here.health(here.frontends[0]))["log"]
        assert isinstance(buffered, dict) and buffered["buffered_events"] >= 20
    finally:
        with contextlib.suppress(TimeoutError):
            await own_server.start()
    await until_agreed(here)
    recorded = await here.recorded()
    assert sum(isinstance(e, events.RequestAccepted) for e in recorded) == 12
    assert sum(isinstance(e, events.RequestCompleted) for e in recorded) == 12
    assert sum(isinstance(e, events.FrontendRemoved) for e in recorded) == 0
    assert sum(isinstance(e, events.WorkerRemoved) for e in recorded) == 0
    assert await here.audit() == []
