"""The log can lie, or be away: what is lost, who notices, and that serving never stops.

`docs/failures.md` has a row for each of these.
"""

import asyncio
import contextlib
import shutil
import signal
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


async def test_a_log_trimmed_under_a_replica_that_sleeps(here: Deployment) -> None:
    await ask(here, "word " * 300)
    await until_agreed(here)
    sleeping = here.frontends[1]
    sleeping.signal(signal.SIGSTOP)
    async with aiohttp.ClientSession() as session:
        for index in range(5):
            await stream(session, here.frontends[0].url, f"{index} " * 300, 4)
    head = (await here.log.extent()).last_seq
    await here.log.trim(head + 1)
    sleeping.signal(signal.SIGCONT)
    # What was trimmed is in no snapshot here; caches and registrations are told anew.
    await ask(here, "again " * 300)
    health = await here.health(sleeping)
    assert health["status"] in ("healthy", "degraded")


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
