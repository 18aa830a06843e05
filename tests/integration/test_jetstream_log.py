"""The real log: the contract, and what a server, a network or an operator can do to it."""

import asyncio
import inspect
import json
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path

import nats.errors
import nats.js.errors
import pytest

from eventstore.access import Access
from eventstore.connect import Nats
from eventstore.errors import LogGap, LogUnavailable, SeqConflict
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog, Record
from eventstore.memory import MemoryLog
from eventstore.server import EmbeddedServer, find_server
from tests.log_contract import WITHIN_S, Collected, LogContract, listed
from tests.waiting import eventually


class TestJetStreamLog(LogContract):
    @pytest.fixture
    async def log(self, nats: Nats, namespace: str) -> AsyncIterator[EventLog]:
        log = await JetStreamLog.open(nats, namespace)
        yield log
        await log.close()


@asynccontextmanager
async def opened(server: EmbeddedServer) -> AsyncIterator[tuple[Nats, JetStreamLog]]:
    nats = await Nats.connect([server.url], name="test")
    log = await JetStreamLog.open(nats, "ns")
    try:
        yield nats, log
    finally:
        await log.close()
        await nats.close()


@pytest.fixture
async def own_log(own_server: EmbeddedServer) -> AsyncIterator[JetStreamLog]:
    async with opened(own_server) as (_, log):
        yield log


async def append_until_taken(log: EventLog, data: bytes, msg_id: str) -> int:
    """As the publisher does: the same msg_id until the log has it."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                return (await log.append("reckon.ns.control", data, msg_id=msg_id)).seq
            except LogUnavailable:
                await asyncio.sleep(0.05)


async def fill(log: EventLog, count: int, size: int = 10) -> None:
    for start in range(0, count, 1000):
        numbers = range(start, min(count, start + 1000))
        await asyncio.gather(
            *(log.append("reckon.ns.control", bytes(size), msg_id=f"f{n}") for n in numbers)
        )


async def test_the_memory_log_answers_as_the_real_one(nats: Nats, namespace: str) -> None:
    """Any appends and trims have the same outcomes in both."""
    rng = random.Random(1)
    real, model = await JetStreamLog.open(nats, namespace), MemoryLog(lambda: 0)

    async def outcome(log: EventLog, step: tuple[object, ...]) -> object:
        subject, msg_id, expected, before_seq = step
        if before_seq is not None:
            assert isinstance(before_seq, int)
            await log.trim(before_seq)
            extent = await log.extent()
            return (extent.first_seq, extent.last_seq)
        assert expected is None or isinstance(expected, int)
        try:
            return await log.append(
                str(subject), b"x", msg_id=str(msg_id), expected_subject_seq=expected
            )
        except SeqConflict as conflict:
            return str(conflict)

    for number in range(600):
        head = (await model.extent()).last_seq
        step = (
            f"reckon.{namespace}.kv.{rng.randrange(3)}",
            f"m{rng.randrange(1 + number // 2)}",
            rng.choice([None, None, 0, head, rng.randint(0, head)]),
            rng.randint(0, head + 3) if rng.random() < 0.05 else None,
        )
        assert await outcome(real, step) == await outcome(model, step), step
    really = [record._replace(time_ns=0) for record in await listed(real.read(1))]
    assert really == await listed(model.read(1))
    await real.close()


async def test_a_long_log_is_read_and_followed_whole(own_log: JetStreamLog) -> None:
    """More than the server sends without an answer to its flow control."""
    await fill(own_log, 5_000, size=5_000)
    assert [r.seq for r in await listed(own_log.read(1))] == list(range(1, 5_001))
    seen = Collected()
    following = await own_log.follow(1, seen)
    await seen.until_seq(5_000)
    await following.close()
    assert seen.seqs == list(range(1, 5_001))


async def test_a_read_that_is_left_early_holds_nothing(own_log: JetStreamLog) -> None:
    await fill(own_log, 3_000)
    records = own_log.read(1)
    assert (await anext(records)).seq == 1
    await records.aclose()  # type: ignore[attr-defined]
    assert not own_log._consumers


async def test_a_slow_reader_stops_the_server(own_log: JetStreamLog) -> None:
    """What a reader does not take stays on the server, beyond a bounded number of records."""
    await fill(own_log, 20_000, size=1_000)
    records = own_log.read(1)
    await anext(records)
    (consumer,) = own_log._consumers
    subscription = consumer._subscription
    assert subscription is not None
    taken = await held_steadily(subscription)
    assert taken < 19_000
    assert [r.seq async for r in records] == list(range(2, 20_001))


async def held_steadily(subscription: object) -> int:
    """How many messages wait in the client once no more come."""
    before = -1
    async with asyncio.timeout(WITHIN_S):
        while (held := subscription.pending_msgs) != before:  # type: ignore[attr-defined]
            before = held
            await asyncio.sleep(0.2)
    return before


async def test_others_get_their_turn_while_records_are_handled(own_log: JetStreamLog) -> None:
    """A following with much to do gives the loop to others every few milliseconds of work."""
    await fill(own_log, 5_000)
    clock = asyncio.get_running_loop().time
    seen = Collected()
    turns: list[int] = []

    def handle(record: Record) -> None:
        busy_until = clock() + 0.0002
        while clock() < busy_until:
            pass
        seen(record)

    following = await own_log.follow(1, handle)
    while not seen.records or seen.records[-1].seq < 5_000:
        turns.append(len(seen.records))
        await asyncio.sleep(0)
    await following.close()
    handled_between = [b - a for a, b in pairwise(turns)]
    assert max(handled_between) <= 50  # 2 ms of at least 0.2 ms each, with room for a slow machine


async def test_appends_and_followings_outlive_a_restart(own_server: EmbeddedServer) -> None:
    async with opened(own_server) as (nats, log):
        seen = Collected()
        following = await log.follow(1, seen)
        await append_until_taken(log, b"before", "1")
        await seen.until_seq(1)
        await own_server.stop()
        waiting = asyncio.create_task(append_until_taken(log, b"during", "2"))
        await asyncio.sleep(0)
        await own_server.start()
        assert await waiting == 2
        await append_until_taken(log, b"after", "3")
        await seen.until_seq(3)
        assert [r.data for r in seen.records] == [b"before", b"during", b"after"]
        assert nats.reconnects >= 1
        await following.close()


async def test_a_killed_server_loses_nothing_acknowledged(own_server: EmbeddedServer) -> None:
    async with opened(own_server) as (_, log):
        await fill(log, 500)
        assert own_server._process is not None
        own_server._process.kill()
        await own_server.stop()
        await own_server.start()
        assert await append_until_taken(log, b"after", "after") == 501
        assert len(await listed(log.read(1))) == 501


async def test_a_log_made_anew_is_a_gap(own_server: EmbeddedServer) -> None:
    """The stream is gone after a restart: the next append makes another, and a following ends."""
    async with opened(own_server) as (_, log):
        await fill(log, 10)
        before = await log.extent()
        seen = Collected()
        following = await log.follow(1, seen)
        await seen.until_seq(10)
        await own_server.stop()
        shutil.rmtree(own_server.store_dir / "jetstream")
        await own_server.start()
        assert await append_until_taken(log, b"new", "new") == 1
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(LogGap):
                await following.wait()
        assert (await log.extent()).identity != before.identity
        assert seen.seqs == list(range(1, 11))


async def test_a_deleted_stream_is_noticed_without_a_restart(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventstore.consumer.SILENCE_MAX_S", 1.5)
    async with opened(own_server) as (nats, log):
        await fill(log, 10)
        following = await log.follow(1, Collected())
        await nats.jetstream.delete_stream("RECKON_ns")
        assert await append_until_taken(log, b"new", "new") == 1
        async with asyncio.timeout(2 * WITHIN_S):
            with pytest.raises(LogGap):
                await following.wait()


async def test_messages_lost_on_the_way_are_fetched_again(own_log: JetStreamLog) -> None:
    """A following that misses a message gets it from a new consumer."""
    seen = Collected()
    following = await own_log.follow(1, seen)
    (consumer,) = own_log._consumers
    await fill(own_log, 3)
    await seen.until_seq(3)
    consumer._consumer_seq -= 1  # as if one more had been sent than came
    await append_until_taken(own_log, b"x", "x")
    await append_until_taken(own_log, b"y", "y")
    await seen.until_seq(5)
    assert seen.seqs == [1, 2, 3, 4, 5]
    await following.close()


async def test_an_append_without_a_server_fails_in_time(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventstore.jetstream.APPEND_TIMEOUT_S", 0.2)
    async with opened(own_server) as (nats, log):
        await own_server.stop()
        with pytest.raises(LogUnavailable):
            await log.append("reckon.ns.control", b"", msg_id="1")
        assert not nats.connected
        with pytest.raises(LogUnavailable):
            await log.extent()


async def test_a_closed_connection_ends_a_following(own_server: EmbeddedServer) -> None:
    async with opened(own_server) as (nats, log):
        following = await log.follow(1, Collected())
        await nats.close()
        with pytest.raises(LogUnavailable):
            await log.append("reckon.ns.control", b"", msg_id="1")
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(LogUnavailable):
                await following.wait()


async def test_a_stream_that_forgets_is_not_taken_for_the_log(nats: Nats, namespace: str) -> None:
    await nats.jetstream.add_stream(
        name=f"RECKON_{namespace}", subjects=[f"reckon.{namespace}.>"], max_age=60
    )
    with pytest.raises(LogUnavailable, match="max_age"):
        await JetStreamLog.open(nats, namespace)


async def test_a_namespace_without_a_log_is_only_made_on_request(
    nats: Nats, namespace: str
) -> None:
    log = await JetStreamLog.open(nats, namespace)
    await log.close()
    with pytest.raises(LogUnavailable, match="there is no stream") as caught:
        await JetStreamLog.open(nats, "typo-" + namespace[:20], create=False)
    assert namespace in caught.value.try_this


async def test_a_server_without_jetstream_is_named(tmp_path: Path) -> None:
    with plain_server(tmp_path, "-a", "127.0.0.1") as process:
        nats = await Nats.connect([await told_url(tmp_path)], name="test")
        try:
            with pytest.raises(LogUnavailable, match="JetStream is not enabled") as caught:
                await JetStreamLog.open(nats, "ns")
            assert caught.value.try_this
        finally:
            await nats.close()
        assert process.poll() is None


async def test_a_wrong_password_is_told_and_kept_secret(tmp_path: Path) -> None:
    with plain_server(tmp_path, "-a", "127.0.0.1", "--user", "u", "--pass", "right"):
        url = await told_url(tmp_path)
        with pytest.raises(LogUnavailable) as caught:
            await Nats.connect([url.replace("nats://", "nats://u:wrong@")], name="test", wait_s=0.5)
        assert "does not admit user u" in str(caught.value)
        assert "wrong" not in str(caught.value)
        nats = await Nats.connect([url], name="test", access=Access(user="u", password="right"))
        assert nats.connected
        await nats.close()


async def test_no_server_is_a_clear_error_after_a_bounded_wait(free_port: int) -> None:
    with pytest.raises(LogUnavailable) as caught:
        await Nats.connect([f"nats://127.0.0.1:{free_port}"], name="test", wait_s=0.3)
    assert f"127.0.0.1:{free_port}" in str(caught.value)
    assert "refused" in str(caught.value) or "Connect call failed" in str(caught.value)
    assert caught.value.try_this


@pytest.mark.parametrize("url", ["nats://", "nats://host:port", "tcp://:x"])
async def test_a_bad_address_is_a_clear_error(url: str) -> None:
    with pytest.raises(LogUnavailable, match="could not connect"):
        await Nats.connect([url], name="test", wait_s=0.3)


async def test_an_error_from_the_server_only_costs_a_reconnect(own_server: EmbeddedServer) -> None:
    """The client library would stay closed for ever after most of them."""
    async with opened(own_server) as (nats, log):
        seen = Collected()
        following = await log.follow(1, seen)
        await nats.client._process_err("'slow consumer'")
        assert await append_until_taken(log, b"x", "x") == 1
        await seen.until_seq(1)
        assert (nats.disconnects, nats.reconnects) == (1, 1)
        await following.close()


def test_every_error_of_the_library_is_mapped() -> None:
    """`connect.py` catches nats.errors.Error and OSError: there are no others."""
    for module in (nats.errors, nats.js.errors):
        for _, error in inspect.getmembers(module, inspect.isclass):
            if issubclass(error, Exception) and error.__module__.startswith("nats"):
                assert issubclass(error, nats.errors.Error)


@contextmanager
def plain_server(directory: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A nats-server on a free port, without JetStream."""
    process = subprocess.Popen(
        [find_server(), "-p", "-1", "--ports_file_dir", directory, *options],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


async def told_url(directory: Path) -> str:
    def told() -> list[str]:
        texts = [path.read_text() for path in directory.glob("*.ports")]
        return [str(json.loads(text)["nats"][0]) for text in texts if text.endswith("}")]

    await eventually(lambda: bool(told()))
    return told()[0]
