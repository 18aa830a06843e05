"""The predicted index by example: expiry and renewal, pruning, slots, digest, snapshots, bounds."""

import struct

import pytest

from indexer.predicted import DEAD_LEASES_MIN, PredictedIndex, Run
from indexer.radix import WorkerRank

RANKS = [WorkerRank(7, 0), WorkerRank(7, 1)]


@pytest.fixture
def index() -> PredictedIndex:
    return PredictedIndex()


def test_a_prompt_is_believed_where_it_was_sent(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    index.insert(1, [1, 2], 100)
    assert index.match_depths([1, 2, 3, 4]) == [(0b10, 2), (0b01, 3)]
    assert index.match_depths([9]) == index.match_depths([]) == []
    assert len(index) == 5
    assert [index.blocks_of_slot(slot) for slot in range(3)] == [3, 2, 0]


def test_it_expires_at_its_time(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    assert index.expire(99) == 0
    assert index.expire(100) == 3
    assert index.match_depths([1, 2, 3]) == []
    assert len(index) == 0
    assert index.expire(100) == 0


def test_the_next_prompt_renews_what_it_shares(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3, 4], 100)
    index.insert(0, [1, 2, 30], 200)
    assert index.expire(100) == 2
    assert index.match_depths([1, 2, 3, 4]) == [(1, 2)]
    assert index.match_depths([1, 2, 30]) == [(1, 3)]


def test_an_earlier_expiry_shortens_nothing(index: PredictedIndex) -> None:
    index.insert(0, [1, 2], 200)
    index.insert(0, [1, 2, 3], 100)
    assert index.expire(150) == 1
    assert index.match_depths([1, 2, 3]) == [(1, 2)]
    assert index.expire(200) == 2


def test_slots_renew_by_themselves(index: PredictedIndex) -> None:
    index.insert(0, [1, 2], 100)
    index.insert(1, [1, 2], 200)
    assert index.expire(100) == 2
    assert index.match_depths([1, 2]) == [(0b10, 2)]


def test_prune_down_to_what_is_kept(index: PredictedIndex) -> None:
    for prompt in range(128):
        index.insert(prompt % 2, range(8 * prompt, 8 * prompt + 8), prompt)
    assert index.prune(1024, 819) == 0, "the bound itself is allowed"
    index.insert(0, [10_000], 128)
    assert index.prune(1024, 819) == 1025 - 819
    assert len(index) == 819
    # 819 = 1 + 102 whole prompts + the first two blocks of the oldest that is left.
    assert index.match_depths(range(8 * 25, 8 * 26)) == [(0b10, 2)]
    assert index.match_depths(range(8 * 24, 8 * 25)) == []
    assert index.match_depths(range(8 * 26, 8 * 27)) == [(0b01, 8)]
    index.check()


@pytest.mark.parametrize(("max_blocks", "kept_blocks"), [(0, 0), (0, 5), (2, 0), (2, -1), (-1, 9)])
def test_prune_to_nothing(index: PredictedIndex, max_blocks: int, kept_blocks: int) -> None:
    index.insert(0, [1, 2, 3], 100)
    assert index.prune(max_blocks, kept_blocks) == 3
    assert len(index) == 0
    index.check()


def test_prune_does_not_choose_between_slots(index: PredictedIndex) -> None:
    """Slots are numbered differently on each replica, so nothing may depend on the number."""
    index.insert(0, [1, 2, 3], 100)
    index.insert(1, [1, 2, 3], 100)
    assert index.prune(5, 5) == 2
    assert index.match_depths([1, 2, 3]) == [(0b11, 2)]


def test_what_is_over_does_not_count_before_it_is_taken_out(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    index.insert(0, [1], 300)
    index.insert(1, [1, 2], 200)
    assert index.match_depths([1, 2, 3], 99) == [(0b10, 2), (0b01, 3)]
    assert index.match_depths([1, 2, 3], 100) == [(0b01, 1), (0b10, 2)]
    assert index.match_depths([1, 2, 3], 200) == [(0b01, 1)]
    assert index.match_depths([1, 2, 3], 300) == []
    assert len(index) == 5, "asking changes nothing"


def test_what_a_rank_evicts_is_believed_no_more(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    index.insert(1, [1, 2, 3], 100)
    assert index.discard(0, [3, 2, 9]) == 2
    assert index.discard(7, [1]) == 0
    assert index.match_depths([1, 2, 3]) == [(0b01, 1), (0b10, 3)]
    index.check()
    assert index.discard(0, [1]) == 1
    assert index.expire(100) == 3
    index.check()


def test_a_rank_leaves(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    index.insert(1, [1, 2], 100)
    assert index.drop_slot(0) == 3
    assert index.drop_slot(0) == index.drop_slot(5) == 0
    assert index.match_depths([1, 2, 3]) == [(0b10, 2)]
    index.insert(0, [1], 300)
    assert index.expire(100) == 2, "nothing of the old rank is left to expire"
    assert index.match_depths([1, 2, 3]) == [(0b01, 1)]


def test_the_digest_tells_rank_block_and_expiry(index: PredictedIndex) -> None:
    def digest(slot: int, chain: list[int], expires_ns: int) -> str:
        other = PredictedIndex()
        other.insert(slot, chain, expires_ns)
        return other.digest(RANKS.__getitem__)

    digests = [digest(0, [1, 2], 5), digest(1, [1, 2], 5), digest(0, [1, 2], 6)]
    digests += [digest(0, [1, 3], 5), digest(0, [0], 5), digest(0, [0], 6), digest(0, [], 5)]
    assert len(set(digests)) == len(digests)
    assert digest(0, [], 5) == index.digest(RANKS.__getitem__)


def test_runs_say_all(index: PredictedIndex) -> None:
    index.insert(0, [1, 2, 3], 100)
    index.insert(0, [1, 2, 4], 100)
    index.insert(0, [1], 300)
    assert list(index.runs(0)) == [
        Run(100, struct.pack("<3Q", 2, 3, 4), [1, 1, 0]),
        Run(300, struct.pack("<Q", 1), [0]),
    ]
    assert list(index.runs(1)) == []


@pytest.mark.parametrize(
    "run", [Run(1, bytes(8), []), Run(1, bytes(7), [0]), Run(1, bytes(8), [-1])]
)
def test_a_run_that_is_not_one(index: PredictedIndex, run: Run) -> None:
    with pytest.raises((ValueError, struct.error)):
        index.restore(0, run)
    assert len(index) == 0
    index.check()


def test_a_hash_that_is_not_one(index: PredictedIndex) -> None:
    with pytest.raises(OverflowError):
        index.insert(0, [1, 2**64], 100)
    assert len(index) == 0
    index.check()


def test_old_timers_do_not_pile_up(index: PredictedIndex) -> None:
    """A conversation renewed again and again, each time a little longer, and side branches."""
    system_prompt = list(range(100))
    for turn in range(1_000):
        index.insert(0, system_prompt[: 50 + turn % 50], turn)
        index.insert(0, [*system_prompt, 1_000 + turn], 10_000)
        if turn % 50 == 0:
            index.check()  # which holds stale references and dead leases to their bounds
    index.check()
    assert len(index) == 1_100
    for turn in range(4 * DEAD_LEASES_MIN):
        index.insert(1, system_prompt, turn)
    index.check()
    assert index.expire(10_000) == 1_200
    index.check()
