"""Snapshots by example: names, formats, when one is due, who takes it, what stays."""

import asyncio
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from eventstore.claims import ClaimLost, ClaimTaken, MemoryClaims
from eventstore.errors import LogGap, LogUnavailable
from eventstore.log import Extent
from eventstore.memory import MemoryLog
from eventstore.settings import parse
from eventstore.snapshots import (
    BadSnapshot,
    HistoryLost,
    MemorySnapshots,
    SnapshotRef,
    UnknownFormat,
    life_of,
    name_of,
    pack_header,
    refs_of,
    sort_out,
    trim_before,
    unpack,
    unusable,
)
from frontend.settings import FrontendSettings
from indexer.radix import WorkerRank
from router.loading import SnapshotLoader
from router.progress import Progress
from router.replica import Replica, ReplicaPhase
from router.settings import SnapshotterSettings
from router.snapshot import restored, snapshot_of
from router.snapshot_steps import Due, Outcome, SnapshotTaker
from router.snapshot_trigger import BACK_OFF_MIN_S, Snapshots, SnapshotTrigger
from router.snapshotter import SnapshotFailed, environment_for
from router.state import RouterState
from tests.property.test_fold import fold, history
from tests.waiting import eventually

MIB = 1024 * 1024


def extent(first_seq: int, last_seq: int, size: int = 0, identity: str = "i") -> Extent:
    return Extent(identity, first_seq, last_seq, size)


def ref(seq: int, identity: str = "i") -> SnapshotRef:
    return SnapshotRef(name_of(identity, seq), life_of(identity), seq)


async def log_of(count: int, seed: int = 7) -> MemoryLog:
    log = MemoryLog(time.time_ns)
    for record in history(seed, count):
        await log.append("reckon.t.any", record.data, msg_id=str(record.seq))
    return log


def taker(
    log: MemoryLog, store: MemorySnapshots, claims: MemoryClaims | None = None, kept: int = 2
) -> SnapshotTaker:
    claims = claims or MemoryClaims(lambda: 0.0)
    return SnapshotTaker(log, "t", store, claims, kept=kept, version="v")


# --- what is in one -------------------------------------------------------------------------------


def test_every_part_of_the_state_is_in_a_snapshot() -> None:
    """A new attribute of RouterState belongs into `router.snapshot`, and then into this list."""
    assert set(vars(RouterState())) == {
        *("cursor", "time_ns", "tree", "active", "workers", "unbased", "requests", "thresholds"),
        *("producers", "removed_workers", "anomalies", "unreadable_chain"),
        *("predicted", "pinned", "sessions", "prefill_models"),
        "workers_version",  # of the process, not of the state
    }


def test_a_snapshot_of_another_format_is_told_from_a_damaged_one() -> None:
    data = bytearray(snapshot_of(RouterState(5), identity="i", version="v"))
    data[8] += 1
    with pytest.raises(UnknownFormat, match="format 3"):
        unpack("s", bytes(data))
    with pytest.raises(BadSnapshot, match="is not a snapshot"):
        unpack("s", b"something else of more than thirty bytes")


def test_a_snapshot_says_what_it_is_of() -> None:
    state = fold(history(4, 60))
    header = unpack("s", snapshot_of(state, identity="life", version="1.2", from_seq=3)).header
    assert (header.identity, header.seq, header.time_ns) == ("life", 60, 60_000_000)
    assert (header.digest, header.version, header.from_seq) == (state.digest(), "1.2", 3)


def test_a_whole_body_of_another_state_is_refused() -> None:
    """Its checksum fits: whoever wrote it lied, or restores in another way."""
    data = snapshot_of(fold(history(4, 60)), identity="i", version="v")
    snapshot = unpack("s", data)
    for wrong in (replace(snapshot.header, digest="0"), replace(snapshot.header, seq=61)):
        with pytest.raises(BadSnapshot, match="not of the state"):
            restored("s", pack_header(wrong) + snapshot.body)


def test_a_snapshot_is_small() -> None:
    """At most 12 bytes for each (block, rank) pair, in chains of 16 that nobody shares."""
    state = RouterState()
    ranks = [WorkerRank(worker, 0) for worker in range(4)]
    for rank in ranks:
        state.tree.add_rank(rank)
    rng = Random(1)
    for number in range(2000):
        chain = [rng.getrandbits(64) for _ in range(16)]
        state.tree.store(ranks[number % 4], None, chain)
    size = len(snapshot_of(state, identity="i", version="v"))
    assert size / state.tree.pair_count < 9.5


# --- which are usable, which stay -----------------------------------------------------------------


def test_usable_is_what_the_log_goes_on_from() -> None:
    here = extent(11, 50)
    assert [seq for seq in (9, 10, 30, 50, 51) if unusable(ref(seq), here) is None] == [10, 30, 50]
    assert "another life" in (unusable(ref(30, "other"), here) or "")


def test_what_stays_and_what_goes() -> None:
    refs = [ref(5), ref(20), ref(30), ref(40), ref(30, "other"), ref(99)]
    stay, go = sort_out(refs, extent(11, 50), kept=2)
    assert stay == [ref(30), ref(40)]
    assert go == refs_of(each.name for each in (ref(5), ref(20), ref(30, "other")))
    assert trim_before(stay) == 30
    assert trim_before(stay[:1]) == trim_before([]) == 0


@pytest.mark.parametrize(
    ("due", "newest_seq", "why"),
    [
        (Due(), 0, None),
        (Due(messages=99), 0, "100 messages"),
        (Due(messages=100), 0, None),
        (Due(messages=49), 150, "50 messages"),
        (Due(messages=50), 150, None),
        (Due(messages=1), 200, None),
        (Due(messages=1), 300, None),
        (Due(bytes=999), 0, "1000 bytes"),
        (Due(bytes=1000), 0, None),
        (Due(bytes=499), 150, "500 bytes"),
    ],
)
def test_when_a_snapshot_is_due(due: Due, newest_seq: int, why: str | None) -> None:
    told = due.why(extent(101, 200, size=1000), newest_seq)
    assert told is None if why is None else (told or "").startswith(why)
    assert due.why(extent(1, 0), 0) is None


# --- taking one -----------------------------------------------------------------------------------


async def test_one_after_another() -> None:
    log, store = await log_of(50), MemorySnapshots()
    first = await taker(log, store).run("a")
    assert (first.taken, first.seq, first.first_seq, first.deleted) == (True, 50, 1, 0)
    second = await taker(log, store).run("b")
    assert (second.seq, second.first_seq) == (51, 50), "the announcement is a record too"
    third = await taker(log, store).run("c")
    assert (third.seq, third.first_seq, third.deleted) == (52, 51, 1)
    not_due = await taker(log, store).run("d", due=Due(messages=10))
    assert (not_due.taken, not_due.name) == (False, third.name)
    assert (await log.extent()).last_seq == 53, "announced once"


async def test_an_empty_log_has_none() -> None:
    outcome = await taker(MemoryLog(lambda: 0), MemorySnapshots()).run("a")
    assert outcome == Outcome(taken=False)


async def test_only_one_takes_it() -> None:
    log, store = await log_of(50), MemorySnapshots()
    claims = MemoryClaims(lambda: 0.0)
    await claims.take("somebody")
    with pytest.raises(ClaimTaken, match="somebody"):
        await taker(log, store, claims).run("a")
    assert store.objects == {}


class SlowStore(MemorySnapshots):
    """Writing waits until it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = asyncio.Event()
        self.go_on = asyncio.Event()

    async def write(self, name: str, data: bytes) -> None:
        self.writing.set()
        await self.go_on.wait()
        await super().write(name, data)


async def test_one_that_stood_still_does_no_harm_when_it_goes_on() -> None:
    """While it is paused its claim ends, and others take, delete and trim."""
    now_s = 0.0
    log, store = await log_of(50), SlowStore()
    claims = MemoryClaims(lambda: now_s)
    slow = asyncio.create_task(taker(log, store, claims).run("slow"))
    await store.writing.wait()
    now_s += 60
    store.go_on.set()
    await asyncio.sleep(0)
    quick = MemorySnapshots()
    quick.objects = store.objects
    for number in range(3):
        await taker(log, quick, MemoryClaims(lambda: now_s)).run(f"quick {number}")
    with pytest.raises(ClaimLost):
        await slow
    loaded = await SnapshotLoader(log, store).load()
    assert loaded is not None and loaded.header.seq == 52
    assert (await log.extent()).first_seq == 51


async def test_a_log_made_anew_meanwhile_is_not_trimmed() -> None:
    """The run knows seqs of the old log; the new one has no snapshot yet."""
    log, store = await log_of(50), MemorySnapshots()
    await taker(log, store).run("a")

    class Anew(MemorySnapshots):
        async def write(self, name: str, data: bytes) -> None:
            await super().write(name, data)
            log._identity = "another"

    anew = Anew()
    anew.objects = store.objects
    with pytest.raises(LogGap):
        await taker(log, anew).run("b")
    assert (await log.extent()) == Extent("another", 1, 51, (await log.extent()).bytes)
    assert len(anew.objects) == 2, "nothing is deleted either, and nothing announced"


async def test_what_cannot_be_read_back_is_not_announced() -> None:
    class Forgetful(MemorySnapshots):
        async def write(self, name: str, data: bytes) -> None:
            await super().write(name, data[:-1] + b"!")

    log, store = await log_of(50), Forgetful()
    with pytest.raises(BadSnapshot):
        await taker(log, store).run("a")
    assert store.objects == {}
    assert (await log.extent()).last_seq == 50


async def test_a_lost_beginning_is_not_passed_over() -> None:
    log, store = await log_of(50), MemorySnapshots()
    await log.trim(10)
    with pytest.raises(HistoryLost):
        await taker(log, store).run("a")
    loader = SnapshotLoader(log, store)
    assert await loader.load() is None and loader.report.incomplete
    assert (await taker(log, store).run("b", accept_loss=True)).taken
    await loader.load()
    assert loader.report.incomplete, "it says so for as long as snapshots descend from it"
    assert (await taker(log, store).run("c")).taken


# --- having one taken -----------------------------------------------------------------------------


async def test_the_trigger_waits_longer_after_each_failure() -> None:
    log, store = await log_of(50), MemorySnapshots()
    tried: list[float] = []
    now_s = 0.0

    async def fail() -> Outcome:
        tried.append(now_s)
        raise SnapshotFailed("on purpose")

    snapshots = Snapshots(store, MemoryClaims(lambda: now_s), fail)
    trigger = SnapshotTrigger(log, snapshots, Due(messages=10), jitter=lambda: 1.0)
    for _ in range(100):
        await trigger.look(now_s)
        now_s += 1.0
    assert [later - at for at, later in pairwise(tried)] == [
        BACK_OFF_MIN_S,
        2 * BACK_OFF_MIN_S,
        4 * BACK_OFF_MIN_S,
    ]
    assert trigger.trouble == "no snapshot was taken: on purpose"
    assert trigger.outcomes == {"failed": 4}


async def test_the_trigger_leaves_it_to_who_holds_the_claim() -> None:
    log, store = await log_of(50), MemorySnapshots()
    claims = MemoryClaims(lambda: 0.0)
    trigger = SnapshotTrigger(
        log, Snapshots(store, claims, lambda: taker(log, store, claims).run("a")), Due(messages=10)
    )
    other = await claims.take("somebody")
    await trigger.look(0.0)
    assert trigger.outcomes == {}
    await other.release()
    await trigger.look(0.0)
    assert trigger.outcomes == {"taken": 1} and trigger.newest is None
    await trigger.look(0.0)
    assert trigger.outcomes == {"taken": 1}
    assert trigger.newest is not None and trigger.newest.seq == 50


def test_the_process_gets_the_same_settings() -> None:
    argv = (
        "--nats-url nats://u:p@h:1,h:2 --namespace n --router-snapshot-threshold 7 "
        "--router-snapshot-bytes none --router-snapshots-kept 5 --nats-wait-secs 2.5 "
        "--nats-tls-ca /a/ca.pem"
    ).split()
    env = {"DYN_LOG": "debug", "DYN_LOGGING_JSONL": "1", "NATS_AUTH_PASSWORD": "a b", "HOME": "/h"}
    ours = parse(FrontendSettings, argv, env)
    handed_on = environment_for(ours, env)
    theirs = parse(SnapshotterSettings, [], handed_on)
    for name in theirs.__struct_fields__:
        if hasattr(ours, name):
            assert getattr(theirs, name) == getattr(ours, name), name
    assert handed_on["HOME"] == "/h"
    assert theirs.router_snapshot_bytes is None and theirs.nats_tls_ca == Path("/a/ca.pem")


def test_the_process_finds_a_server_that_was_not_named() -> None:
    env: Mapping[str, str] = {}
    theirs = parse(SnapshotterSettings, [], environment_for(FrontendSettings(), env))
    assert theirs.nats_url == "nats://127.0.0.1:4222"
    assert theirs.namespace == "dynamo"


# --- starting from one ----------------------------------------------------------------------------


async def test_a_replica_starts_from_a_snapshot_and_says_so() -> None:
    log, store = await log_of(50), MemorySnapshots()
    before = [record async for record in log.read(1)]
    for name in ("a", "b", "c"):
        await taker(log, store).run(name)
    store.objects[name_of("memory", 53)] = b"damaged"
    restarts: list[int] = []
    replica = Replica(
        log,
        time.time_ns,
        restarted=lambda: restarts.append(replica.state.cursor),
        snapshots=SnapshotLoader(log, store),
    )
    running = asyncio.create_task(replica.run())
    await asyncio.wait_for(replica.wait_ready(), 5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    status = replica.status()
    assert status.phase is ReplicaPhase.READY and status.cursor == 53
    assert status.snapshot is not None and status.snapshot.seq == 52
    assert list(status.snapshot.skipped) == [name_of("memory", 53)]
    assert restarts == [52], "whoever holds slots of the old state is told"
    assert sum(replica.applied.values()) == 1
    whole = fold([*before, *[record async for record in log.read(51)]])
    assert replica.state.digest() == whole.digest()


async def test_a_start_waits_for_the_store() -> None:
    """Without an answer it is unknown whether there is a snapshot: beginning without is wrong."""
    log = await log_of(50)

    class Away(MemorySnapshots):
        async def refs(self) -> list[SnapshotRef]:
            raise LogUnavailable("the store is away")

    replica = Replica(log, time.time_ns, snapshots=SnapshotLoader(log, Away()))
    running = asyncio.create_task(replica.run())
    await eventually(lambda: replica.status().why == "the store is away")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert replica.status().phase is ReplicaPhase.STARTING and replica.state.cursor == 0


def test_progress_is_told_now_and_then() -> None:
    progress = Progress(100.0, 1000)
    assert progress.line(102.9, 2000, 10_000) is None
    line = progress.line(104.0, 5000, 10_000)
    assert line == "at record 5000 of 10000, 1000 records/s, about 5 s left"
    assert "standing still" in (progress.line(108.0, 5000, 10_000) or "")
    assert progress.line(120.0, 10_000, 10_000) is None
