"""The KV cache against a naive model, with pins, also where hashes collide all the time."""

from array import array
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from eventstore.events import BlockRemoved, BlockStored, PrefixPinned
from indexer.blocks import prompt_hashes
from workers.kv_cache import BlockTable, KvCache

BLOCK_SIZE = 2
NUM_BLOCKS = 7
PINNED_MAX = 3

Prefix = tuple[int, ...]


def exact(tokens: Prefix) -> list[int]:
    return prompt_hashes(tokens, BLOCK_SIZE)


def colliding(tokens: Prefix) -> list[int]:
    """Chained hashes with three values: almost everything collides."""
    return [block_hash % 3 for block_hash in exact(tokens)]


class CacheMachine(RuleBasedStateMachine):
    """Requests come, grow, compute and go; what the cache says is replayed into plain dicts."""

    tables = Bundle("tables")

    @initialize(hashing=st.sampled_from([exact, colliding]))
    def start(self, hashing: Callable[[Prefix], list[int]]) -> None:
        self.hashing = hashing
        self.cache = KvCache(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            worker_id=7,
            dp_rank=1,
            pinned_max=PINNED_MAX,
        )
        self.now_ms = 0
        self.pinned: dict[int, tuple[int, int, int]] = {}
        """Hash → when its pin ends, minus its depth, its TTL."""
        self.live: list[BlockTable] = []
        self.parents: dict[int, int | None] = {}
        """What a log reader knows: visible hash → parent hash."""
        self.contents: dict[int, Prefix] = {}
        """Which prefix each visible hash really stands for."""

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def allocate(self, tokens: list[int]) -> object:
        """A request gets in exactly if its blocks fit, and shares exactly what is there."""
        table = BlockTable(array("I", tokens), self.hashing(tuple(tokens)))
        blocks = -(-len(tokens) // BLOCK_SIZE)
        depth = self.cached_depth(table)
        in_use, private = self.in_use()
        held = in_use | self.pinned.keys()
        needed = blocks - sum(one in held for one in table.hashes[:depth])
        fits = needed <= NUM_BLOCKS - len(held) - private
        assert self.cache.allocate(table, blocks) == fits
        if not fits:
            assert table.shared == table.private == 0
            return multiple()
        assert (table.shared, table.private) == (depth, blocks - depth)
        for one in table.hashes[:depth]:
            if one in self.pinned:
                until_ms, negative_depth, ttl_ms = self.pinned[one]
                self.pinned[one] = max(until_ms, self.now_ms + ttl_ms), negative_depth, ttl_ms
        self.live.append(table)
        self.replay(table)
        return table

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), ttl_ms=st.integers(1, 5))
    def pin(self, tokens: list[int], ttl_ms: int) -> None:
        """What is cached of a prompt is pinned, its head first where there is not room for all."""
        table = BlockTable(array("I", tokens), self.hashing(tuple(tokens)))
        kept = []
        for depth, one in enumerate(table.hashes[: self.cached_depth(table)]):
            until_ms, _, longest_ms = self.pinned.get(one, (0, 0, 0))
            if not until_ms and len(self.pinned) == PINNED_MAX:
                break
            until_ms = max(until_ms, self.now_ms + ttl_ms)
            self.pinned[one] = until_ms, -depth, max(longest_ms, ttl_ms)
            kept.append(one)
        assert self.cache.pin(table, ttl_ms) == kept

    @rule(ms=st.integers(0, 4))
    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self.pinned = {one: pin for one, pin in self.pinned.items() if pin[0] > self.now_ms}
        self.cache.advance(self.now_ms)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin_one(self) -> None:
        del self.pinned[min(self.pinned, key=lambda one: (*self.pinned[one][:2], one))]
        self.cache.unpin_one()

    @rule(table=tables, share=st.floats(0, 1))
    def publish(self, table: BlockTable, share: float) -> None:
        """Any further part of the full blocks is computed."""
        full = len(table.tokens) // BLOCK_SIZE
        self.cache.publish(table, table.shared + round((full - table.shared) * share))
        self.replay(table)

    @rule(table=tables, token=st.integers(0, 1))
    def grow(self, table: BlockTable, token: int) -> None:
        """One more token; at a block boundary it needs a block, there unless all are used."""
        if not len(table.tokens) % BLOCK_SIZE:
            in_use, private = self.in_use()
            possible = len(in_use | self.pinned.keys()) + private < NUM_BLOCKS
            assert self.cache.grow(table) == possible
            if not possible:
                return
        table.tokens.append(token)
        table.hashes[:] = self.hashing(tuple(table.tokens))
        self.replay(table)

    @rule(table=consumes(tables))
    def free(self, table: BlockTable) -> None:
        self.cache.free(table)
        self.live.remove(table)
        assert table.shared == table.private == 0

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check(self.live)

    @invariant()
    def what_is_in_use_and_what_is_pinned_are_told_apart(self) -> None:
        if hasattr(self, "cache"):
            in_use, private = self.in_use()
            assert self.cache.active_blocks == len(in_use) + private
            assert self.cache.held_blocks == len(in_use | self.pinned.keys()) + private
            assert self.cache.pinned_blocks == len(self.pinned)

    @invariant()
    def events_tell_what_is_visible(self) -> None:
        """Replayed events and `contents` both give exactly the visible blocks, as chains."""
        if hasattr(self, "cache"):
            assert len(self.parents) == self.cache.visible_blocks
            told: dict[int, int | None] = {}
            for run in self.cache.contents():
                chain = [run.parent_hash, *run.sequence_hashes]
                assert run.parent_hash is None or run.parent_hash in told
                told.update(zip(run.sequence_hashes, chain, strict=False))
            assert told == self.parents

    @invariant()
    def hits_are_never_wrong(self) -> None:
        """What a request shares is its own prefix, whatever the hashes say."""
        for table in getattr(self, "live", []):
            for index, block_hash in enumerate(table.hashes[: table.shared]):
                assert self.contents[block_hash] == self.prefix(table, index)

    def prefix(self, table: BlockTable, index: int) -> Prefix:
        return tuple(table.tokens[: (index + 1) * BLOCK_SIZE])

    def in_use(self) -> tuple[set[int], int]:
        """The visible blocks that requests use, and how many private ones they have."""
        shared = {used for table in self.live for used in table.hashes[: table.shared]}
        return shared, sum(table.private for table in self.live)

    def cached_depth(self, table: BlockTable) -> int:
        depth = 0
        while depth < len(table.hashes) and self.holds(table, depth):
            depth += 1
        return depth

    def holds(self, table: BlockTable, index: int) -> bool:
        return self.contents.get(table.hashes[index]) == self.prefix(table, index)

    def replay(self, table: BlockTable) -> None:
        """Fold the new events; what is stored now is a prefix of `table`."""
        for event in self.cache.take_events():
            assert (event.worker_id, event.dp_rank) == (7, 1)
            if isinstance(event, BlockRemoved):
                assert not self.pinned.keys() & event.sequence_hashes, "a pinned block is evicted"
                for block_hash in event.sequence_hashes:
                    del self.parents[block_hash], self.contents[block_hash]
                assert not self.parents.keys() & event.sequence_hashes
                assert all(
                    parent is None or parent in self.parents for parent in self.parents.values()
                ), "a child outlived its parent"
            else:
                assert isinstance(event, BlockStored)
                self.replay_stored(event, table)

    def replay_stored(self, event: BlockStored, table: BlockTable) -> None:
        parent = event.parent_hash
        assert event.sequence_hashes
        for block_hash in event.sequence_hashes:
            assert block_hash not in self.parents, "announced twice"
            assert parent is None or parent in self.parents, "announced before its parent"
            self.parents[block_hash] = parent
            self.contents[block_hash] = self.prefix(table, table.hashes.index(block_hash))
            parent = block_hash


TestCache = CacheMachine.TestCase
TestCache.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


def test_a_block_of_equal_tokens_below_another_parent_is_not_shared() -> None:
    """Equal hash and equal tokens are no hit if what comes before differs."""
    cache = KvCache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, worker_id=7, dp_rank=1)
    first = BlockTable(array("I", [1, 1, 2, 2]), [10, 30])
    second = BlockTable(array("I", [5, 5, 2, 2]), [20, 30])
    for table in (first, second):
        assert cache.allocate(table, 2)
        cache.publish(table, 2)
    assert (first.shared, second.shared) == (2, 1)
    third = BlockTable(second.tokens, second.hashes)
    assert cache.allocate(third, 2)
    assert third.shared == 1
    cache.check([first, second, third])


def test_what_is_computed_twice_has_one_copy_and_one_announcement() -> None:
    """The later of two requests with one content gives its copy back and shares the first."""
    cache = KvCache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, worker_id=7, dp_rank=1)
    tables = [BlockTable(array("I", [1, 2, 3, 4, 5]), [10, 20]) for _ in range(2)]
    assert all(cache.allocate(table, 3) for table in tables)
    assert cache.active_blocks == 6
    for table in tables:
        cache.publish(table, 2)
    assert cache.take_events() == [BlockStored(7, 1, None, [10, 20])]
    assert cache.active_blocks == 4
    cache.free(tables[0])
    cache.check(tables)
    assert (cache.active_blocks, cache.visible_blocks) == (3, 2)


def test_the_least_recently_used_request_goes_first_its_tail_before_its_head() -> None:
    """Eviction takes as many blocks as are needed, and tells which."""
    cache = KvCache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, worker_id=7, dp_rank=1)
    for tokens, hashes in (([1, 1, 2, 2], [10, 20]), ([3, 3, 4, 4], [30, 40])):
        table = BlockTable(array("I", tokens), hashes)
        assert cache.allocate(table, 2)
        cache.publish(table, 2)
        cache.free(table)
    head = BlockTable(array("I", [1, 1, 9]), [10])
    assert cache.allocate(head, 2)  # 10 was used last now, 20 was not
    cache.free(head)
    cache.take_events()
    newcomer = BlockTable(array("I", [7] * 12), [70, 71, 72, 73, 74, 75])
    assert cache.allocate(newcomer, 6)
    assert cache.take_events() == [BlockRemoved(7, 1, [20, 40, 30])]


def test_without_prefix_caching_nothing_is_shared_or_announced() -> None:
    cache = KvCache(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, worker_id=7, dp_rank=1, prefix_caching=False
    )
    tables = [BlockTable(array("I", [1, 2, 3, 4]), [10, 20]) for _ in range(2)]
    for table in tables:
        assert cache.allocate(table, 2)
        cache.publish(table, 2)
        assert (table.shared, table.private) == (0, 2)
    assert cache.take_events() == cache.contents() == []
    cache.check(tables)


def test_pins_are_told_with_the_whole_seconds_that_are_left() -> None:
    cache = KvCache(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, worker_id=7, dp_rank=1, pinned_max=4
    )
    long = BlockTable(array("I", [1, 1, 2, 2, 3, 3]), [10, 20, 30])
    other = BlockTable(array("I", [4, 4]), [40])
    for table in (long, other):
        assert cache.allocate(table, len(table.hashes))
        cache.publish(table, len(table.hashes))
        cache.free(table)
    assert cache.pin(long, 5_000) == [10, 20, 30]
    assert cache.pin(BlockTable(array("I", [1, 1]), [10]), 9_500) == [10]
    assert cache.pin(other, 5_000) == [40]
    cache.advance(500)
    expected = [
        PrefixPinned(7, 1, [10], 9),
        PrefixPinned(7, 1, [20, 30], 4),
        PrefixPinned(7, 1, [40], 4),
    ]
    assert cache.pinned() == expected
    cache.advance(4_500)
    assert cache.pinned() == [PrefixPinned(7, 1, [10], 5)], "less than a second is nothing to tell"
    cache.advance(9_500)
    assert (cache.pinned(), cache.pinned_blocks) == ([], 0)
    cache.check([])
