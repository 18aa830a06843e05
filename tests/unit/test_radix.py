"""The radix tree by example: matches, holes, ranks and slots, counts, digest, dump."""

from itertools import chain

import msgspec
import pytest

from indexer.dump import TreeDump, dump, load
from indexer.masks import match_depths, select, slots_of
from indexer.radix import RadixTree, WorkerRank
from indexer.rank_cache import RankCache

A, B, C = WorkerRank(7, 0), WorkerRank(7, 1), WorkerRank(2**64 - 1, 0)


@pytest.fixture
def tree() -> RadixTree:
    tree = RadixTree()
    for rank in (A, B, C):
        tree.add_rank(rank)
    return tree


def test_overlap_counts_leading_blocks(tree: RadixTree) -> None:
    tree.store(A, None, [1, 2, 3])
    tree.store(B, None, [1, 2])
    assert tree.find_matches([1, 2, 3, 4]) == {A: 3, B: 2}
    assert tree.find_matches([1]) == {A: 1, B: 1}
    assert tree.find_matches([2, 3]) == {A: 2, B: 1}, "a chain may begin anywhere"
    assert tree.find_matches([9]) == {}
    assert tree.find_matches([]) == {}


def test_ranks_that_part(tree: RadixTree) -> None:
    """Two chains with a common beginning: each rank counts on its own branch."""
    tree.store(A, None, [1, 2, 3, 4])
    tree.store(B, None, [1, 2])
    tree.store(B, 2, [30, 40])
    assert tree.find_matches([1, 2, 3, 4]) == {A: 4, B: 2}
    assert tree.find_matches([1, 2, 30, 40]) == {A: 2, B: 4}


def test_zero_is_a_hash_like_any_other(tree: RadixTree) -> None:
    tree.store(A, None, [5])
    tree.store(A, 5, [0])
    tree.store(A, 0, [6])
    assert tree.find_matches([5, 0, 6]) == {A: 3}
    tree.remove(A, [0])
    assert tree.find_matches([5, 0, 6]) == {A: 1}


def test_eviction_from_the_middle(tree: RadixTree) -> None:
    """What lies behind a hole does not count, until the hole is filled."""
    tree.store(A, None, [1, 2, 3, 4, 5])
    tree.store(B, None, [1, 2, 3, 4, 5])
    assert tree.remove(A, [2]) == 1
    assert tree.find_matches([1, 2, 3, 4, 5]) == {A: 1, B: 5}
    assert tree.holds(A, 5) and not tree.holds(A, 2)
    assert tree.store(A, 1, [2]) == 1
    assert tree.find_matches([1, 2, 3, 4, 5]) == {A: 5, B: 5}
    tree.check()


def test_a_hole_that_nobody_fills(tree: RadixTree) -> None:
    """The block disappears from the tree while what follows it stays."""
    tree.store(A, None, [1, 2, 3])
    tree.remove(A, [2])
    assert tree.block_count == 2
    tree.store(B, None, [1, 2])
    assert tree.find_matches([1, 2, 3]) == {A: 1, B: 2}
    tree.store(B, 2, [3])
    tree.remove(B, [2])
    assert tree.find_matches([1, 2, 3]) == {A: 1, B: 1}
    tree.check()


def test_store_below_a_block_not_held(tree: RadixTree) -> None:
    tree.store(A, None, [1, 2])
    tree.store(B, 2, [3])
    assert tree.find_matches([1, 2, 3]) == {A: 2}
    tree.store(B, None, [1, 2])
    assert tree.find_matches([1, 2, 3]) == {A: 2, B: 3}
    tree.check()


def test_the_second_branch_leaves_a_hole(tree: RadixTree) -> None:
    """A block's further children are remembered as well as its first."""
    tree.store(A, None, [1, 2])
    tree.store(A, 1, [3])
    tree.store(A, 1, [4])
    tree.remove(A, [2, 1])
    tree.store(B, None, [1, 4])
    assert tree.find_matches([1, 4]) == {B: 2}
    assert tree.find_matches([3]) == {A: 1}
    tree.check()


def test_counts_are_of_what_changed(tree: RadixTree) -> None:
    assert tree.store(A, None, [1, 2, 3]) == 3
    assert tree.store(A, None, [1, 2, 3]) == 0
    assert tree.store(A, None, [1, 2, 3, 4]) == 1
    assert tree.store(A, None, [8, 8, 9, 8]) == 2, "repeated hashes count once"
    assert tree.store(A, None, []) == 0
    assert tree.remove(A, [4, 77, 4]) == 1, "hashes not held are ignored"
    assert tree.remove(A, [4]) == 0
    assert tree.remove(B, [1, 2]) == 0, "another rank's blocks are not this one's"
    assert tree.remove(A, []) == 0
    assert (tree.blocks_of(A), tree.blocks_of(B)) == (5, 0)
    assert tree.store(B, None, [1, 2]) == 2
    assert (tree.block_count, tree.pair_count) == (5, 7)
    assert tree.clear(A) == 5
    assert tree.clear(A) == 0
    assert (tree.block_count, tree.pair_count) == (2, 2)
    tree.check()


def test_unknown_ranks(tree: RadixTree) -> None:
    stranger = WorkerRank(1, 0)
    before = tree.digest()
    for ask in (tree.blocks_of, tree.slot_of, tree.clear, tree.remove_rank):
        with pytest.raises(KeyError):
            ask(stranger)
    with pytest.raises(KeyError):
        tree.store(stranger, None, [1])
    with pytest.raises(KeyError):
        tree.remove(stranger, [1])
    with pytest.raises(KeyError):
        tree.holds(stranger, 1)
    assert tree.digest() == before


def test_slots_are_dense_and_reused(tree: RadixTree) -> None:
    assert [tree.slot_of(rank) for rank in (A, B, C)] == [0, 1, 2]
    tree.store(B, None, [1, 2])
    tree.store(C, None, [1])
    assert tree.remove_rank(B) == 2
    assert tree.ranks() == [A, C]
    assert tree.find_matches([1, 2]) == {C: 1}
    late = WorkerRank(1, 0)
    assert tree.add_rank(late) == 1
    assert tree.add_rank(late) == 1, "known already"
    assert tree.find_matches([1, 2]) == {C: 1}, "nothing of the rank before is left"
    assert tree.ranks() == [late, A, C]
    tree.check()


def test_digest_tells_what_is_held_apart(tree: RadixTree) -> None:
    """Every rank counts, also an empty one, and hashes of equal sum but other number differ."""
    seen = {tree.digest()}
    for parent, chain_ in ((None, [0]), (0, [1]), (1, [3]), (3, [2**64 - 4])):
        tree.store(A, parent, chain_)
        seen.add(tree.digest())
    assert len(seen) == 5
    tree.clear(A)
    assert tree.digest() in seen
    tree.remove_rank(A)
    assert tree.digest() not in seen


def test_branches_that_died_are_forgotten(tree: RadixTree) -> None:
    """A long-lived prefix below which blocks come and go does not grow, and loses no child."""
    cache = RankCache()
    tree.store(A, None, [0, 1, 2])
    tree.store(A, 1, [3])
    cache.store(None, [0, 1, 2])
    for block in range(1000, 2000):
        tree.store(A, 1, [block])
        tree.remove(A, [block])
        cache.store(1, [block])
        cache.remove([block])
    parents: dict[int | None, int] = {}
    cache.add_edges(parents)
    assert len(parents) < 100
    tree.check()
    tree.remove(A, [2, 1])
    tree.store(B, None, [0, 1, 3])
    assert tree.find_matches([0, 1, 3]) == {A: 1, B: 3}


def test_a_hole_ends_with_its_last_orphan() -> None:
    """By filling the gap, by evicting what lies behind it, or by starting again."""
    cache = RankCache()
    cache.store(None, [1, 2, 3, 4])
    cache.remove([2])
    assert cache.orphans == {3: 2}
    cache.store(1, [2])
    cache.store(None, [1, 2, 3])
    assert cache.orphans == {}
    cache.remove([2])
    cache.remove([3])
    assert cache.orphans == {4: 3}
    cache.store(None, [1, 2, 3, 4])
    assert cache.orphans == {}
    cache.remove([3])
    cache.remove([4])
    assert cache.orphans == {}
    cache.store(8, [9])
    assert cache.orphans == {9: 8}
    cache.clear()
    assert cache.orphans == {} and not cache.held


def test_rings_and_liars_do_no_harm(tree: RadixTree) -> None:
    """Events that no real chain can produce are held, counted, dumped and removed like others."""
    tree.store(A, 1, [1])
    tree.store(A, 2, [3])
    tree.store(A, 3, [2])
    tree.store(B, None, [4, 5, 4])
    tree.store(B, 5, [4])
    assert (tree.blocks_of(A), tree.blocks_of(B)) == (3, 2)
    assert load(dump(tree)).digest() == tree.digest()
    assert tree.remove(A, [3, 2, 1]) == 3
    assert tree.remove_rank(B) == 2
    assert tree.block_count == 0


def test_dump_is_compact_and_in_order(tree: RadixTree) -> None:
    """One chain for each run of blocks with the same holders, below the chain it continues."""
    tree.store(C, None, range(16))
    tree.store(A, None, range(16))
    tree.store(A, 15, range(100, 116))
    tree.store(B, 300, [301])
    dumped = dump(tree)
    assert dumped.ranks == [A, B, C]
    assert [(chain.holders, chain.parent_hash) for chain in dumped.chains] == [
        ([0, 2], None),
        ([0], 15),
        ([1], 300),
    ]
    data = msgspec.msgpack.encode(dumped)
    assert len(data) < 12 * tree.pair_count
    loaded = load(msgspec.msgpack.decode(data, type=TreeDump))
    loaded.check()
    assert loaded.find_matches([*range(16), 100]) == {A: 17, C: 16}
    assert loaded.find_matches([300, 301]) == {}


def test_match_depths_on_any_mapping() -> None:
    masks = {"a": 0b1111, "b": 0b1110, "c": 0b1110, "d": 0b1000, "e": 0}
    assert match_depths(masks.get, "abcdef") == [(0b1, 1), (0b110, 3), (0b1000, 4)]
    assert match_depths(masks.get, "abc") == [(0b1, 1), (0b1110, 3)]
    assert match_depths(masks.get, "a") == [(0b1111, 1)]
    assert match_depths(masks.get, "ea") == match_depths(masks.get, "") == []


@pytest.mark.parametrize("slots", [[], [0], [5], [0, 63, 999], range(1000), range(0, 1000, 3)])
def test_slots_of(slots: list[int]) -> None:
    mask = sum(1 << slot for slot in slots)
    assert slots_of(mask) == list(slots)
    names = [f"rank {slot}" for slot in range(1000)]
    assert select(mask, names) == [names[slot] for slot in slots]


def test_a_wide_tree(tree: RadixTree) -> None:
    """A thousand ranks behind one prefix: few groups, and each rank its own depth."""
    ranks = [WorkerRank(1000 + number, 0) for number in range(1000)]
    prompt = list(range(1, 101))
    for number, rank in enumerate(ranks):
        tree.add_rank(rank)
        tree.store(rank, None, prompt[: 50 + number % 5])
    assert [depth for _, depth in tree.match_depths(prompt)] == [50, 51, 52, 53, 54]
    masks = [mask for mask, _ in tree.match_depths(prompt)]
    assert sorted(chain.from_iterable(map(tree.ranks_of, masks))) == ranks
    assert tree.find_matches(prompt) == {rank: 50 + number % 5 for number, rank in enumerate(ranks)}
