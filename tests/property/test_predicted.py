"""Laws of the predicted index, against a model that keeps one expiry for each (slot, block)."""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from indexer.blocks import sequence_hashes
from indexer.masks import slots_of
from indexer.predicted import PredictedIndex, Run
from indexer.radix import WorkerRank

SLOTS = 3
RANKS = [WorkerRank(9, 1), WorkerRank(9, 0), WorkerRank(1, 0)]
# A small forest, so that histories meet again and again; the hash 0 is in it.
PROMPTS = [
    sequence_hashes(local)
    for local in ([0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 2], [0, 1, 1], [1] * 4)
]
PREFIXES = {block: prompt[: at + 1] for prompt in PROMPTS for at, block in enumerate(prompt)}
slots = st.integers(0, SLOTS - 1)
times = st.integers(0, 12)


class Entry(NamedTuple):
    """What the model knows of a (slot, block)."""

    expires_ns: int
    depth: int


class Model:
    """What the index promises, in the plainest form."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], Entry] = {}

    def insert(self, slot: int, chain: Iterable[int], expires_ns: int) -> None:
        for depth, block in enumerate(chain):
            known = self.entries.get((slot, block))
            if known is None or known.expires_ns < expires_ns:
                self.entries[slot, block] = Entry(expires_ns, depth)

    def expire(self, now_ns: int) -> int:
        return self.keep(key for key, entry in self.entries.items() if entry.expires_ns > now_ns)

    def prune(self, max_blocks: int, kept_blocks: int) -> int:
        if len(self.entries) <= max_blocks:
            return 0

        def order(key: tuple[int, int]) -> tuple[int, int, int]:
            entry = self.entries[key]
            return entry.expires_ns, -entry.depth, key[1]

        last_first = sorted(self.entries, key=order, reverse=True)
        kept = max(0, min(kept_blocks, max_blocks))
        while kept and order(last_first[kept - 1]) == order(last_first[kept]):
            kept -= 1
        return self.keep(last_first[:kept])

    def keep(self, keys: Iterable[tuple[int, int]]) -> int:
        before = len(self.entries)
        self.entries = {key: self.entries[key] for key in keys}
        return before - len(self.entries)

    def overlaps(self, prompt: list[int]) -> dict[int, int]:
        found = {}
        for slot in range(SLOTS):
            missing = (at for at, block in enumerate(prompt) if (slot, block) not in self.entries)
            if overlap := next(missing, len(prompt)):
                found[slot] = overlap
        return found

    def at(self, now_ns: int) -> "Model":
        """What lasts at a time; nothing changes."""
        model = Model()
        model.entries = {k: each for k, each in self.entries.items() if each.expires_ns > now_ns}
        return model

    def index(self) -> PredictedIndex:
        """An index of the same content and another history: block by block, the oldest last."""
        index = PredictedIndex()
        for (slot, block), entry in sorted(self.entries.items(), key=lambda item: item[1]):
            index.insert(slot, PREFIXES[block], entry.expires_ns)
        return index


def overlaps(index: PredictedIndex, prompt: list[int], now_ns: int | None = None) -> dict[int, int]:
    depths = index.match_depths(prompt, now_ns)
    return {slot: depth for mask, depth in depths for slot in slots_of(mask)}


def contents(index: PredictedIndex) -> dict[tuple[int, int], Entry]:
    """By way of a snapshot of every slot."""
    entries = {}
    for slot in range(SLOTS):
        before = -1
        for run in index.runs(slot):
            assert run.expires_ns > before, "not in order"
            before = run.expires_ns
            depth = 0
            for at, step in enumerate(run.depth_steps):
                depth += step
                block = int.from_bytes(run.sequence_hashes[8 * at : 8 * at + 8], "little")
                entries[slot, block] = Entry(run.expires_ns, depth)
    return entries


def reloaded(index: PredictedIndex) -> PredictedIndex:
    """Through the bytes of a snapshot."""
    data = msgspec.msgpack.encode([list(index.runs(slot)) for slot in range(SLOTS)])
    other = PredictedIndex()
    for slot, runs in enumerate(msgspec.msgpack.decode(data, type=list[list[Run]])):
        for run in runs:
            other.restore(slot, run)
    assert msgspec.msgpack.encode([list(other.runs(slot)) for slot in range(SLOTS)]) == data
    return other


class PredictedIndexMachine(RuleBasedStateMachine):
    """Any history gives the model's answers; a replica that numbers its ranks the other way round,
    and was restored from a snapshot now and then, goes the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PredictedIndex()
        self.replica = PredictedIndex()
        self.model = Model()

    @rule(slot=slots, prompt=st.sampled_from(PROMPTS), length=st.integers(0, 6), expires_ns=times)
    def insert(self, slot: int, prompt: list[int], length: int, expires_ns: int) -> None:
        """Any whole prefix with any expiry, also an earlier one than before."""
        self.index.insert(slot, prompt[:length], expires_ns)
        self.replica.insert(SLOTS - 1 - slot, prompt[:length], expires_ns)
        self.model.insert(slot, prompt[:length], expires_ns)

    @rule(now_ns=times)
    def expire(self, now_ns: int) -> None:
        gone = self.model.expire(now_ns)
        assert self.index.expire(now_ns) == self.replica.expire(now_ns) == gone

    @rule(max_blocks=st.integers(-1, 20), kept_blocks=st.integers(-1, 25))
    def prune(self, max_blocks: int, kept_blocks: int) -> None:
        gone = self.model.prune(max_blocks, kept_blocks)
        assert self.index.prune(max_blocks, kept_blocks) == gone
        assert self.replica.prune(max_blocks, kept_blocks) == gone

    @rule(slot=slots, prompt=st.sampled_from(PROMPTS), start=st.integers(0, 6))
    def evict(self, slot: int, prompt: list[int], start: int) -> None:
        """A rank announces that it holds the end of a chain, and all that hangs on it, no more."""
        gone = [b for b, chain in PREFIXES.items() if chain[: start + 1] == prompt[: start + 1]]
        if start >= len(prompt):
            gone = []
        keys = {(slot, block) for block in gone}
        count = self.model.keep([key for key in self.model.entries if key not in keys])
        assert self.index.discard(slot, gone + gone) == count
        assert self.replica.discard(SLOTS - 1 - slot, gone[::-1]) == count

    @rule(slot=slots)
    def leave(self, slot: int) -> None:
        gone = self.model.keep([key for key in self.model.entries if key[0] != slot])
        assert self.index.drop_slot(slot) == self.replica.drop_slot(SLOTS - 1 - slot) == gone

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.replica.clear()
        self.model.entries.clear()

    @rule()
    def reload_replica(self) -> None:
        self.replica = reloaded(self.replica)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        entries = self.model.entries
        assert contents(self.index) == entries
        assert len(self.index) == len(entries)
        for slot in range(SLOTS):
            assert self.index.blocks_of_slot(slot) == sum(key[0] == slot for key in entries)
        for prompt in PROMPTS:
            assert overlaps(self.index, prompt) == self.model.overlaps(prompt)
            for now_ns in (-1, 3, 6, 9, 12):
                lasting = self.model.at(now_ns).overlaps(prompt)
                assert overlaps(self.index, prompt, now_ns) == lasting, "what is over counts"

    @invariant()
    def only_shrinks_along_a_chain(self) -> None:
        """The slots, and on each slot the time left."""
        entries = self.model.entries
        for slot in range(SLOTS):
            for prompt in PROMPTS:
                expiries = [
                    entries[slot, block].expires_ns if (slot, block) in entries else -1
                    for block in prompt
                ]
                assert expiries == sorted(expiries, reverse=True)

    @invariant()
    def sound(self) -> None:
        self.index.check()
        self.replica.check()
        digest = self.index.digest(RANKS.__getitem__)
        assert digest == self.replica.digest(RANKS[::-1].__getitem__)
        assert digest == self.model.index().digest(RANKS.__getitem__)
        assert digest == reloaded(self.index).digest(RANKS.__getitem__)


TestPredictedIndex = PredictedIndexMachine.TestCase
TestPredictedIndex.settings = settings(max_examples=60, stateful_step_count=25)


insertions = st.tuples(slots, st.lists(st.integers(0, 5), max_size=8), times)


@given(st.lists(insertions, max_size=15), times, st.integers(0, 10))
@example([(1, [1, 2, 3], 0), (1, [2, 3, 0, 1], 1)], 0, 0)
def test_any_chains_at_all(
    history: list[tuple[int, list[int], int]], now_ns: int, max_blocks: int
) -> None:
    """Repeats, rings, blocks at several depths: what is held until when stays exact."""
    index, model = PredictedIndex(), Model()
    for slot, chain, expires_ns in history:
        index.insert(slot, chain, expires_ns)
        model.insert(slot, dict.fromkeys(chain), expires_ns)
        index.check()
    expiries = {key: entry.expires_ns for key, entry in model.entries.items()}
    assert {key: entry.expires_ns for key, entry in contents(index).items()} == expiries
    assert reloaded(index).digest(RANKS.__getitem__) == index.digest(RANKS.__getitem__)
    assert index.expire(now_ns) == model.expire(now_ns)
    assert contents(index).keys() == model.entries.keys()
    index.prune(max_blocks, max_blocks // 2)
    index.check()
    assert len(index) <= max_blocks
