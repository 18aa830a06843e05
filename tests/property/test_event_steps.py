"""Records applied in steps, and records handed over by another process: the same state results."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore import codec, frames
from eventstore.access import Access
from eventstore.events import AnyEvent, BlockRemoved, BlockStored, KvRebased, WorkerRegistered
from eventstore.frames import Gap, Line, Order, Records, Started, Unavailable
from eventstore.log import Record
from eventstore.relayed import WAITING_BYTES_MAX, FrameReader
from eventstore.subjects import kv_producer, subject, worker_producer
from indexer.radix import WorkerRank
from router.fold import apply
from router.state import RouterState
from router.steps import applying
from tests.property.test_fold import history
from tests.waiting import eventually

WORKER = 7
RANK = WorkerRank(WORKER, 0)
HASHES = st.integers(1, 40)


def record(seq: int, producer: str, first: int, *events: AnyEvent) -> Record:
    data = codec.encode(producer, 1, first, list(events))
    return Record(seq, seq * 1_000, subject("t", producer), data)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_any_history_in_steps_gives_the_same_state(seed: int, blocks_max: int) -> None:
    whole, cut = RouterState(), RouterState()
    for each in history(seed, 60):
        events = apply(whole, each)
        steps = applying(cut, each, blocks_max)
        try:
            while True:
                next(steps)
                cut.check()
        except StopIteration as done:
            assert repr(done.value) == repr(events)  # a NaN in it is no other
        assert cut.digest() == whole.digest()


cache_events: st.SearchStrategy[AnyEvent] = st.one_of(
    st.builds(
        BlockStored,
        st.just(WORKER),
        st.just(0),
        st.none() | HASHES,
        st.lists(HASHES, max_size=12),
    ),
    st.builds(BlockRemoved, st.just(WORKER), st.just(0), st.lists(HASHES, max_size=12)),
    st.builds(KvRebased, st.just(WORKER), st.just(0), st.just("asked")),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(cache_events, min_size=1, max_size=6), max_size=8), st.integers(1, 6))
def test_any_cut_of_any_events_holds_the_same_blocks(
    batches: list[list[AnyEvent]], blocks_max: int
) -> None:
    """Also those of hashes that repeat, of holes, and of parents that are not held."""
    whole, cut = RouterState(), RouterState()
    register = WorkerRegistered(WORKER, "m", "aggregated", 16)
    log = [record(1, worker_producer(WORKER), 0, register)]
    first = 0
    for batch in batches:
        log.append(record(len(log) + 1, kv_producer(WORKER, 0), first, *batch))
        first += len(batch)
    for each in log:
        apply(whole, each)
        for _ in applying(cut, each, blocks_max):
            pass
    assert cut.digest() == whole.digest()
    assert [h for h in range(1, 41) if cut.tree.holds(RANK, h)] == [
        h for h in range(1, 41) if whole.tree.holds(RANK, h)
    ]


def test_a_step_has_no_more_blocks_than_it_may() -> None:
    state = RouterState()
    apply(
        state,
        record(1, worker_producer(1), 0, WorkerRegistered(1, "m", "aggregated", 16)),
    )
    rng = Random(1)
    chain = [rng.getrandbits(64) for _ in range(1_000)]
    large = record(2, kv_producer(1, 0), 0, BlockStored(1, 0, None, chain))
    held = [0]
    for _ in applying(state, large, 100):
        held.append(state.tree.blocks_of(WorkerRank(1, 0)))
    assert held == list(range(0, 1_001, 100))


def test_a_large_cache_is_emptied_in_steps_too() -> None:
    rank = WorkerRank(1, 0)
    state = RouterState()
    log = [record(1, worker_producer(1), 0, WorkerRegistered(1, "m", "aggregated", 16))]
    log.append(record(2, kv_producer(1, 0), 0, BlockStored(1, 0, None, list(range(1, 1_001)))))
    for each in log:
        apply(state, each)
    held = []
    for _ in applying(state, record(3, kv_producer(1, 0), 1, KvRebased(1, 0, "asked")), 100):
        state.check()
        held.append(state.tree.blocks_of(rank))
    assert held == [*range(900, -1, -100), 0]
    assert rank not in state.unbased


def test_what_is_not_about_caches_is_never_cut() -> None:
    workers = [WorkerRegistered(number, "m", "aggregated", 16) for number in range(300)]
    mixed = record(1, "control", 0, *workers, BlockStored(1, 0, None, list(range(1, 1_000))))
    assert list(applying(RouterState(), mixed, 1)) == []


# --- frames ---------------------------------------------------------------------------------------

any_frame = st.one_of(
    st.just(Started()),
    st.lists(
        st.builds(
            Record, st.integers(1, 2**60), st.integers(0, 2**62), st.text(), st.binary(max_size=60)
        ),
        min_size=1,
        max_size=4,
    ).map(Records),
    st.builds(Line, st.integers(0, 50), st.text(), st.text()),
    st.builds(Gap, st.integers(0, 2**60), st.integers(0, 2**60)),
    st.builds(Unavailable, st.text(), st.text()),
)


def cut_up(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


class Process:
    """Stands for a transport; knows whether it may be read."""

    def __init__(self) -> None:
        self.reading = True

    def get_pipe_transport(self, fd: int) -> Any:
        def set_reading(to: bool) -> None:
            self.reading = to

        return SimpleNamespace(
            pause_reading=lambda: set_reading(False), resume_reading=lambda: set_reading(True)
        )


@settings(deadline=None, max_examples=80)
@given(st.lists(any_frame, max_size=6), st.lists(st.integers(0, 10_000), max_size=12))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[frames.Frame], cuts: list[int]
) -> None:
    async def run() -> list[frames.Frame]:
        reader = FrameReader()
        reader.connection_made(cast(asyncio.SubprocessTransport, Process()))
        for data in cut_up(b"".join(map(frames.encode, sent)), cuts):
            reader.pipe_data_received(1, data)
        reader.connection_lost(None)
        came = []
        while (frame := await reader.next()) is not None:
            came.append(frame)
        return came

    assert asyncio.run(run()) == sent


async def test_what_is_not_handled_is_bounded() -> None:
    reader, process = FrameReader(), Process()
    reader.connection_made(cast(asyncio.SubprocessTransport, process))
    one = frames.encode(Records([Record(1, 1, "s", bytes(60_000))]))
    sent = 0
    while process.reading:
        reader.pipe_data_received(1, one)
        sent += 1
    assert WAITING_BYTES_MAX < reader.waiting_bytes <= WAITING_BYTES_MAX + len(one)
    while not process.reading:
        await reader.next()
        sent -= 1
    assert reader.waiting_bytes <= WAITING_BYTES_MAX // 2
    assert sent > 0  # it is read again before there is nothing left to handle


async def test_a_frame_larger_than_what_may_wait_arrives() -> None:
    reader, process = FrameReader(), Process()
    reader.connection_made(cast(asyncio.SubprocessTransport, process))
    large = Records([Record(1, 1, "s", bytes(2 * WAITING_BYTES_MAX))])
    data = frames.encode(large)
    coming = asyncio.create_task(reader.next())
    for start in range(0, len(data), 100_000):
        await eventually(lambda: process.reading)
        reader.pipe_data_received(1, data[start : start + 100_000])
    assert await coming == large


def test_an_order_keeps_its_paths_and_secrets(tmp_path: Any) -> None:
    access = Access(user="u", password_file=tmp_path / "p", tls_ca=tmp_path / "ca")
    order = Order(("nats://a:1", "nats://b:2"), access, "ns", 3, 17, 20)
    data = frames.encode(order)
    assert frames.length(data[: frames.LENGTH_BYTES]) == len(data) - frames.LENGTH_BYTES
    assert frames.decode_order(data[frames.LENGTH_BYTES :]) == order
