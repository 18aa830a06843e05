"""Laws of snapshots: restored anywhere and folded on, the same log gives the same state."""

import asyncio
import os
import subprocess
import sys
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from eventstore import codec, events
from eventstore.claims import MemoryClaims
from eventstore.control import record_reset
from eventstore.errors import LogGap, LogUnavailable
from eventstore.log import EventLog, Record
from eventstore.marks import MARK_TTL_S, MemoryMarks
from eventstore.memory import MemoryLog
from eventstore.snapshots import BadSnapshot, MemorySnapshots, refs_of, unusable
from router.loading import SnapshotLoader
from router.refold import fold_to
from router.snapshot import encode, restored, snapshot_of
from router.snapshot_steps import SnapshotTaker, Step
from router.state import RouterState
from tests.property.test_fold import CHAINS, fold, history, logs

cuts = st.integers(0, 80)


def through_a_snapshot(state: RouterState) -> RouterState:
    return restored("s", snapshot_of(state, identity="i", version="v"))


@given(logs, cuts)
@example(history(3, 400), 200)
def test_a_snapshot_and_the_tail_are_the_whole(log: list[Record], cut: int) -> None:
    """For every cut: fold(b, restore(snapshot(fold(a)))) equals fold(a + b), and behaves so."""
    state = through_a_snapshot(fold(log[:cut]))
    state.check()
    whole = fold(log)
    for record in log[cut:]:
        fold([record], state)
    state.check()
    assert state.digest() == whole.digest()
    assert (state.cursor, state.time_ns) == (whole.cursor, whole.time_ns)
    for chain in CHAINS:
        assert state.tree.find_matches(chain) == whole.tree.find_matches(chain)
    assert loads(state) == loads(whole)
    assert encode(state) == encode(whole)


def loads(state: RouterState) -> list[tuple[int, int, int]]:
    """By rank: prefill tokens, blocks and requests booked there."""
    slots = [state.tree.slot_of(rank) for rank in state.tree.ranks()]
    active = state.active
    return [(active.prefill_tokens[s], active.blocks[s], active.requests[s]) for s in slots]


@given(logs)
def test_a_snapshot_is_the_state_and_nothing_else(log: list[Record]) -> None:
    """Taking one changes nothing, and equal states have equal bytes, wherever they come from."""
    state = fold(log)
    before = state.digest()
    data = snapshot_of(state, identity="i", version="v")
    assert state.digest() == before
    assert snapshot_of(restored("s", data), identity="i", version="v") == data


SAMPLE = snapshot_of(fold(history(8, 300)), identity="i", version="v")


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_always_noticed(place: int, flip: int) -> None:
    damaged = bytearray(SAMPLE)
    damaged[place] ^= flip
    with pytest.raises(BadSnapshot):
        restored("s", bytes(damaged))


@given(st.integers(0, len(SAMPLE) - 1), st.binary(max_size=3))
def test_a_cut_or_lengthened_object_is_always_noticed(size: int, more: bytes) -> None:
    with pytest.raises(BadSnapshot):
        restored("s", SAMPLE[:size] + more)
    with pytest.raises(BadSnapshot):
        restored("s", SAMPLE + b"x" + more)


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_snapshot_by_chance(data: bytes) -> None:
    with pytest.raises(BadSnapshot):
        restored("s", data)


def test_bytes_and_digest_do_not_depend_on_the_hash_seed() -> None:
    """Two processes with different string hashing restore and write the same."""
    program = (
        "from hashlib import blake2b;"
        "from tests.property.test_fold import fold, history;"
        "from router.snapshot import restored, snapshot_of;"
        "data = snapshot_of(fold(history(5, 400)), identity='i', version='v');"
        "state = fold(history(5, 900), restored('s', data));"
        "again = snapshot_of(state, identity='i', version='v');"
        "print(blake2b(data).hexdigest(), blake2b(again).hexdigest(), state.digest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


# --- taking them, with crashes, while the log grows and others load -------------------------------


class Crash(BaseException):
    """The process dies here: nothing after this point runs."""


class World:
    """A log in memory with its snapshots, and the truth: every record that was ever appended."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_s = 0.0
        self.log = MemoryLog(lambda: int(self.now_s * 1e9))
        self.store = MemorySnapshots()
        self.marks = MemoryMarks(lambda: self.now_s)
        self.truth: list[Record] = []
        self.source = iter(history(seed, 2000))
        self.runs = 0

    async def append(self, count: int) -> None:
        for _ in range(count):
            data = next(self.source).data
            seq = (await self.log.extent()).last_seq
            await self.log.append("reckon.t.any", data, msg_id=f"m{seq}")
        self.now_s += 0.001 * count
        await self.note()

    async def note(self) -> None:
        """Learn what is new in the log, before anything of it can be trimmed."""
        self.truth += [record async for record in self.log.read(len(self.truth) + 1)]

    async def snapshot(self, crash_after: Step | None) -> Step | None:
        """One run of a process of its own; returns where it crashed."""
        self.runs += 1

        def reached(step: Step) -> None:
            if step is crash_after:
                raise Crash(step)

        claims = MemoryClaims(lambda: self.now_s)  # that of a run that crashed has expired
        taker = SnapshotTaker(
            self.log,
            "t",
            self.store,
            claims,
            kept=2,
            version="v",
            marks=self.marks,
            reached=reached,
        )
        crashed = None
        try:
            await taker.run(f"run {self.runs}")
        except Crash:
            crashed = crash_after
        await self.note()
        return crashed

    async def check(self) -> RouterState:
        """Whoever starts now gets the state of the whole history."""
        loaded = await SnapshotLoader(self.log, self.store).load()
        extent = await self.log.extent()
        if loaded is None:
            assert extent.first_seq == 1, "trimmed, and no snapshot in its place"
        state = RouterState() if loaded is None else loaded.state
        if loaded is not None:
            assert loaded.header.digest == fold(self.truth[: loaded.header.seq]).digest()
        await fold_to(self.log, state, extent.last_seq)
        assert state.digest() == fold(self.truth).digest()
        return state


@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([None, *Step])), min_size=1, max_size=10
    ),
)
@example(1, [(10, step) for step in Step])
@settings(max_examples=30)
def test_a_crash_between_any_two_steps_loses_nothing(
    seed: int, runs: list[tuple[int, Step | None]]
) -> None:
    async def scenario() -> None:
        world = World(seed)
        await world.append(1)
        for grow, crash_after in runs:
            await world.append(grow)
            crashed = await world.snapshot(crash_after)
            await world.check()
            if crashed is None:
                # Nothing is left behind: at most the kept ones, and the log begins at the oldest.
                refs = await world.store.refs()
                extent = await world.log.extent()
                assert len(refs) <= 2
                assert extent.first_seq == (refs[0].seq if len(refs) == 2 else 1)
                assert all(unusable(ref, extent) is None for ref in refs)

    asyncio.run(scenario())


class TrimmedUnderTheReader(MemorySnapshots):
    """Others take snapshots, delete and trim, whenever somebody reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.left = 0
        self.busy = False

    async def read(self, name: str, first_bytes: int = 2**32) -> bytes:
        if self.world is not None and self.left and not self.busy:
            self.busy = True
            for _ in range(self.world.rng.randrange(4)):
                self.left -= 1
                await self.world.append(3)
                await self.world.snapshot(None)
            self.busy = False
        return await super().read(name, first_bytes)


@given(st.integers(0, 2**32), st.integers(1, 8))
@settings(max_examples=20)
def test_loading_ends_however_often_the_log_is_trimmed_meanwhile(seed: int, snapshots: int) -> None:
    """A replica that finds its tail trimmed begins again, further on each time."""

    async def scenario() -> None:
        world = World(seed)
        world.store = store = TrimmedUnderTheReader()
        await world.append(10)
        for _ in range(3):
            await world.append(3)
            await world.snapshot(None)
        store.world, store.left = world, snapshots
        begun: list[int] = []
        for _ in range(snapshots + 4):
            try:
                loaded = await SnapshotLoader(world.log, store).load()
            except LogUnavailable:
                continue  # all that were listed were deleted: the replica tries again
            assert loaded is not None
            state = loaded.state
            begun.append(state.cursor)
            if await caught_up(world.log, state):
                break
        assert begun == sorted(set(begun)), "begun twice at the same place"
        assert state.digest() == fold(world.truth).digest()

    asyncio.run(scenario())


async def caught_up(log: EventLog, state: RouterState) -> bool:
    """Fold up to the head; False if records are missing."""
    try:
        await fold_to(log, state, (await log.extent()).last_seq)
    except LogGap:
        return False
    return True


class Replicas(RuleBasedStateMachine):
    """Two replicas, snapshots with and without crashes, trims, resets, restarts, in any order: each
    replica believes, at every record, what a fold of the whole history does; and none is overtaken
    by a trim while it catches up and its mark lives."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0)
        self.states = [RouterState(), RouterState()]
        self.catching_up: dict[int, tuple[int, float]] = {}
        """Which holds a mark → the head that it saw at its start, and when the mark ends."""

    @rule(seed=st.integers(0, 50), count=st.integers(1, 8))
    def append(self, seed: int, count: int) -> None:
        self.world.source = iter(history(seed, 20))
        asyncio.run(self.world.append(count))

    @rule()
    def reset(self) -> None:
        self.world.runs += 1
        asyncio.run(record_reset(self.world.log, "t", "test", self.world.runs))
        asyncio.run(self.world.note())

    @rule(crash_after=st.sampled_from([None, None, *Step]))
    def snapshot(self, crash_after: Step | None) -> None:
        asyncio.run(self.world.snapshot(crash_after))

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.states[which] = asyncio.run(self.begun(which))

    @rule(seconds=st.sampled_from([1.0, 10.0, 20.0]))
    def sleep(self, seconds: float) -> None:
        """A mark may end meanwhile."""
        self.world.now_s += seconds

    @rule(which=st.integers(0, 1), count=st.integers(1, 30))
    def read(self, which: int, count: int) -> None:
        asyncio.run(self.read_on(which, count))

    async def begun(self, which: int) -> RouterState:
        await self.world.marks.put(f"replica-{which}", 1)
        loaded = await SnapshotLoader(self.world.log, self.world.store).load()
        state = RouterState() if loaded is None else loaded.state
        await self.renew(which, state, (await self.world.log.extent()).last_seq)
        return state

    async def renew(self, which: int, state: RouterState, target: int) -> None:
        """Until it has passed the head that it saw."""
        self.catching_up.pop(which, None)
        if state.cursor >= target:
            await self.world.marks.remove(f"replica-{which}")
        else:
            await self.world.marks.put(f"replica-{which}", state.follow_from)
            self.catching_up[which] = target, self.world.now_s + MARK_TTL_S

    async def read_on(self, which: int, count: int) -> None:
        state = self.states[which]
        end_seq = min(state.cursor + count, (await self.world.log.extent()).last_seq)
        target, ends_s = self.catching_up.get(which, (0, 0.0))
        try:
            await fold_to(self.world.log, state, end_seq)
        except LogGap:
            assert ends_s <= self.world.now_s, "overtaken while its mark lived"
            self.states[which] = await self.begun(which)
        else:
            await self.renew(which, state, target)

    @invariant()
    def replicas_believe_what_the_log_says(self) -> None:
        for state in self.states:
            assert state.digest() == fold(self.world.truth[: state.cursor]).digest()

    def teardown(self) -> None:
        """In the end all are at the head, and agree."""
        for which in (0, 1):
            for _ in range(2):  # one that finds a gap begins again, and then there is none
                asyncio.run(self.read_on(which, 10_000))
        digest = fold(self.world.truth).digest()
        assert [state.digest() for state in self.states] == [digest, digest]


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_second_announcement_changes_nothing_but_the_count() -> None:
    state = fold(history(2, 50))
    taken = events.SnapshotTaken("s", 40, "d")
    for epoch, duplicates in ((40, 0), (40, 1), (30, 2)):
        before = state.anomalies.duplicates
        data = codec.encode("control.snapshot", epoch, 0, [taken])
        fold([Record(state.cursor + 1, 0, "reckon.t.control", data)], state)
        assert state.anomalies.duplicates - before == min(duplicates, 1)


def test_names_sort_by_seq() -> None:
    names = ["state-00000000-00000000000000000010", "state-ffffffff-00000000000000000009", "x"]
    assert [ref.seq for ref in refs_of(names)] == [9, 10]
