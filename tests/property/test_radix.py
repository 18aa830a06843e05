"""Laws of the radix tree, against a model that keeps a set of hashes for each rank."""

from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from indexer.blocks import sequence_hashes
from indexer.dump import TreeDump, dump, load
from indexer.masks import match_depths, slots_of
from indexer.radix import RadixTree, WorkerRank

RANKS = [WorkerRank(9, 0), WorkerRank(9, 1), WorkerRank(1, 0)]
ranks = st.sampled_from(RANKS)
# A small forest, so that histories meet again and again; the hash 0 is in it.
PROMPTS = [
    sequence_hashes(local)
    for local in ([0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 2], [0, 1, 1], [1] * 4)
]
PARENTS = {
    block: parent
    for prompt in PROMPTS
    for parent, block in zip([None, *prompt], prompt, strict=False)
}
prompts = st.sampled_from(PROMPTS)


class Model:
    """What the tree promises, in the plainest form."""

    def __init__(self) -> None:
        self.held: dict[WorkerRank, set[int]] = {}

    def find_matches(self, prompt: list[int]) -> dict[WorkerRank, int]:
        overlaps = {}
        for rank, held in self.held.items():
            missing = (depth for depth, block in enumerate(prompt) if block not in held)
            if overlap := next(missing, len(prompt)):
                overlaps[rank] = overlap
        return overlaps

    def tree(self) -> RadixTree:
        """A tree of the same content and another history: block by block, nothing ever removed."""
        tree = RadixTree()
        for rank, held in sorted(self.held.items(), reverse=True):
            tree.add_rank(rank)
            for block in sorted(held):
                tree.store(rank, PARENTS.get(block), [block])
        return tree


class RadixTreeMachine(RuleBasedStateMachine):
    """Any history gives the model's answers; digest and dump depend on the content alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree()
        self.model = Model()

    @rule(rank=ranks)
    def register(self, rank: WorkerRank) -> None:
        self.tree.add_rank(rank)
        self.model.held.setdefault(rank, set())

    @rule(data=st.data(), prompt=prompts)
    @precondition(lambda self: self.model.held)
    def store(self, data: st.DataObject, prompt: list[int]) -> None:
        """Any piece of a chain, whether the rank holds what comes before or not."""
        rank = self.some_rank(data)
        start = data.draw(st.integers(0, len(prompt) - 1))
        blocks = prompt[start : data.draw(st.integers(start, len(prompt)))]
        added = len(set(blocks) - self.model.held[rank])
        self.model.held[rank].update(blocks)
        assert self.tree.store(rank, prompt[start - 1] if start else None, blocks) == added

    @rule(data=st.data(), prompt=prompts)
    @precondition(lambda self: self.model.held)
    def evict(self, data: st.DataObject, prompt: list[int]) -> None:
        """Any blocks of a chain, in any order, held or not."""
        rank = self.some_rank(data)
        blocks = data.draw(st.lists(st.sampled_from(prompt), max_size=3))
        removed = len(set(blocks) & self.model.held[rank])
        self.model.held[rank].difference_update(blocks)
        assert self.tree.remove(rank, blocks) == removed

    @rule(data=st.data())
    @precondition(lambda self: self.model.held)
    def clear(self, data: st.DataObject) -> None:
        rank = self.some_rank(data)
        assert self.tree.clear(rank) == len(self.model.held[rank])
        self.model.held[rank].clear()

    @rule(data=st.data())
    @precondition(lambda self: self.model.held)
    def forget(self, data: st.DataObject) -> None:
        rank = self.some_rank(data)
        assert self.tree.remove_rank(rank) == len(self.model.held.pop(rank))

    @rule()
    def reload(self) -> None:
        """A dump says everything: a tree made from it goes on as the first would have."""
        data = msgspec.msgpack.encode(dump(self.tree))
        self.tree = load(msgspec.msgpack.decode(data, type=TreeDump))
        assert msgspec.msgpack.encode(dump(self.tree)) == data

    @invariant()
    def finds_what_the_model_finds(self) -> None:
        for prompt in PROMPTS:
            assert self.tree.find_matches(prompt) == self.model.find_matches(prompt)

    @invariant()
    def sound(self) -> None:
        self.tree.check()
        held = self.model.held
        assert self.tree.ranks() == sorted(held)
        assert {rank: self.tree.blocks_of(rank) for rank in held} == {
            rank: len(blocks) for rank, blocks in held.items()
        }
        assert self.tree.block_count == len(set().union(*held.values()))
        assert self.tree.pair_count == sum(map(len, held.values()))
        other = self.model.tree()
        assert self.tree.digest() == other.digest()
        assert dump(self.tree) == dump(other)

    def some_rank(self, data: st.DataObject) -> WorkerRank:
        return data.draw(st.sampled_from(sorted(self.model.held)))


TestRadixTree = RadixTreeMachine.TestCase
TestRadixTree.settings = settings(max_examples=80, stateful_step_count=40)


stores = st.tuples(st.just("store"), prompts, st.integers(0, 6))
removals = st.tuples(st.just("remove"), prompts, st.integers(0, 6))
histories = st.lists(st.one_of(stores, stores, removals), max_size=8)


def apply(tree: RadixTree, rank: WorkerRank, event: tuple[str, list[int], int]) -> None:
    """Store a prompt from block `start` on, or remove one block of it."""
    kind, prompt, start = event
    start %= len(prompt)
    if kind == "store":
        tree.store(rank, prompt[start - 1] if start else None, prompt[start:])
    else:
        tree.remove(rank, [prompt[start]])


@given(st.lists(histories, min_size=2, max_size=3), st.randoms(use_true_random=False), prompts)
def test_events_of_different_ranks_commute(
    by_rank: list[list[tuple[str, list[int], int]]], random: Random, prompt: list[int]
) -> None:
    """However the ranks' histories interleave, the tree is the same, to the byte of its dump."""
    one, other = RadixTree(), RadixTree()
    turns = [place for place, history in enumerate(by_rank) for _ in history]
    for place, history in enumerate(by_rank):
        one.add_rank(RANKS[place])
        for event in history:
            apply(one, RANKS[place], event)
    random.shuffle(turns)
    for place in reversed(range(len(by_rank))):
        other.add_rank(RANKS[place])
    left = [iter(history) for history in by_rank]
    for place in turns:
        apply(other, RANKS[place], next(left[place]))
    other.check()
    assert one.digest() == other.digest()
    assert one.find_matches(prompt) == other.find_matches(prompt)
    assert msgspec.msgpack.encode(dump(one)) == msgspec.msgpack.encode(dump(other))


events = st.tuples(
    ranks,
    st.sampled_from(["store", "remove"]),
    st.one_of(st.none(), st.integers(0, 5)),
    st.lists(st.integers(0, 5), max_size=6),
)


@given(st.lists(events, max_size=12), st.lists(st.integers(0, 5), max_size=6))
def test_any_events_at_all(
    history: list[tuple[WorkerRank, str, int | None, list[int]]], prompt: list[int]
) -> None:
    """Blocks that follow several others, rings, repeats: what is held stays exact, and a match is
    at most too deep."""
    tree, model = RadixTree(), Model()
    for rank in RANKS:
        tree.add_rank(rank)
        model.held[rank] = set()
    for rank, kind, parent, blocks in history:
        if kind == "store":
            tree.store(rank, parent, blocks)
            model.held[rank].update(blocks)
        else:
            tree.remove(rank, blocks)
            model.held[rank].difference_update(blocks)
    for rank in RANKS:
        assert {block for block in range(6) if tree.holds(rank, block)} == model.held[rank]
    assert tree.digest() == model.tree().digest() == load(dump(tree)).digest()
    found = tree.find_matches(prompt)
    for rank, overlap in model.find_matches(prompt).items():
        assert overlap <= found[rank] <= len(prompt)


@given(st.lists(st.integers(0, 31), max_size=12))
def test_where_masks_grow_depths_are_upper_bounds(masks: list[int]) -> None:
    groups = match_depths(masks.__getitem__, range(len(masks)))
    covered = 0
    for mask, depth in groups:
        assert mask and not mask & covered
        covered |= mask
        for slot in slots_of(mask):
            held = [bool(mask >> slot & 1) for mask in masks]
            assert depth >= (held.index(False) if False in held else len(held))
    assert covered == (masks[0] if masks else 0)
    assert [depth for _, depth in groups] == sorted({depth for _, depth in groups})


@given(st.lists(st.integers(0, 300), max_size=70), st.integers(1, 300))
def test_match_depths_follow_their_definition(depths: list[int], length: int) -> None:
    """Slot i holds the first `depths[i]` of `length` keys; each look-up finds a distinct key."""
    masks = [
        sum(1 << slot for slot, depth in enumerate(depths) if depth > key) for key in range(length)
    ]
    asked: list[int] = []

    def get(key: int) -> int | None:
        asked.append(key)
        return masks[key] or None

    groups = match_depths(get, range(length))
    reached = [min(depth, length) for depth in depths]
    assert [depth for _, depth in groups] == sorted(set(reached) - {0})
    for mask, depth in groups:
        assert mask == sum(1 << slot for slot, d in enumerate(reached) if d == depth)
    assert len(asked) <= 2 + len(groups) * length.bit_length()
