"""Laws of reading marks: who holds one reads on, and it is in the way of no more than it needs."""

import asyncio
import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore.errors import LogUnavailable
from eventstore.log import Extent
from eventstore.marks import HELD_BYTES_MAX, MARK_TTL_S, MemoryMarks, cut_at
from router.loading import SnapshotLoader
from router.refold import fold_to
from tests.property.test_fold import fold
from tests.property.test_snapshots import TrimmedUnderTheReader, World


@given(
    st.integers(1, 1000),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 4 * HELD_BYTES_MAX),
    st.lists(st.integers(1, 2500), max_size=4),
)
def test_a_cut_leaves_what_is_needed_and_holds_back_no_more_than_is_allowed(
    first_seq: int, removed: int, left: int, size: int, needed: list[int]
) -> None:
    async def scenario() -> None:
        marks = MemoryMarks(lambda: 0.0)
        for number, seq in enumerate(needed):
            await marks.put(f"r{number}", seq)
        before_seq = first_seq + removed
        extent = Extent("i", first_seq, before_seq + left, size)
        cut = await cut_at(marks, extent, before_seq)
        assert first_seq <= cut.before_seq <= before_seq
        assert bool(cut.held_back) == (cut.before_seq < before_seq)
        mean = size / (removed + left + 1)
        wanted = max(first_seq, min([before_seq, *needed]))
        if mean * (before_seq - wanted) > HELD_BYTES_MAX * 1.001:
            assert cut.before_seq == before_seq
        elif mean * (before_seq - wanted) < HELD_BYTES_MAX * 0.999:
            assert cut.before_seq == wanted

    asyncio.run(scenario())


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 5))
@settings(max_examples=20)
def test_a_replica_whose_mark_lives_is_never_overtaken(
    seed: int, snapshots: int, step: int
) -> None:
    """Others take snapshots and trim while it loads, and after every few records that it reads."""

    async def scenario() -> None:
        world = World(seed)
        world.store = store = TrimmedUnderTheReader()
        for _ in range(3):
            await world.append(5)
            await world.snapshot(None)
        await world.marks.put("a", 1)
        store.world, store.left = world, snapshots
        loaded = None
        while loaded is None:
            with contextlib.suppress(LogUnavailable):  # all that were listed were deleted
                loaded = await SnapshotLoader(world.log, store).load()
        store.world, state = None, loaded.state
        target = (await world.log.extent()).last_seq
        while state.cursor < target:
            await world.marks.put("a", state.follow_from)
            world.now_s += world.rng.uniform(0.0, MARK_TTL_S / 2)
            await world.append(world.rng.randrange(3))
            await world.snapshot(None)
            await fold_to(world.log, state, min(state.cursor + step, target))
        assert state.digest() == fold(world.truth[:target]).digest()
        await world.marks.remove("a")
        await world.append(1)
        await world.snapshot(None)
        assert (await world.log.extent()).first_seq == (await store.refs())[0].seq

    asyncio.run(scenario())
