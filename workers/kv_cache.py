"""The paged KV cache of one rank: which blocks exist, who uses them, which one goes next.

A block is *private* to a request until it is full and computed. Then it becomes *visible* under its
sequence hash: later requests with the same prefix share it, and the log is told (`BlockStored`).
A visible block that no request uses stays as *inactive*, until room is needed and the least
recently used one is evicted (`BlockRemoved`). No block holds any data, so private ones are a count.

Three rules keep it exact:

- A hash is a hint, equal tokens are the proof. Content whose hash is taken by other content is
  never shared and never announced; it stays private, with everything behind it.
- A block computed by two requests at once has one visible copy: the later request gives its own
  back and shares the first.
- A visible block's parent is visible. Who uses a block uses its parent, and what one request
  releases is inserted tail first, so a child is always evicted before its parent. Along a chain
  *visible* and *in use* are therefore prefixes, and their ends are found by bisection.

A visible block can also be *pinned*: until its time is over it is not evicted, used or not. Pins
cover chains from the root (`workers.kv_pins`), so *held*, in use or pinned, is a prefix as well.
"""

from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable

from eventstore.events import BlockRemoved, BlockStored, PrefixPinned
from workers.kv_pins import Pins

KvEvent = BlockStored | BlockRemoved | PrefixPinned


class BlockTable:
    """The blocks of one admitted request, in order: first `shared` visible ones, then `private`.

    `tokens` and `hashes` (the sequence hashes of its full blocks) are the owner's: it appends to
    them as the request grows, and never changes what is there.
    """

    __slots__ = ("hashes", "private", "shared", "tokens")

    def __init__(self, tokens: "array[int]", hashes: list[int]) -> None:
        self.tokens = tokens
        self.hashes = hashes
        self.shared = 0
        self.private = 0

    @property
    def blocks(self) -> int:
        return self.shared + self.private


class _Block:
    """A visible block. `content`: its tokens as bytes; `users`: block tables that share it."""

    __slots__ = ("content", "parent_hash", "users")

    def __init__(self, parent_hash: int | None, content: bytes) -> None:
        self.parent_hash = parent_hash
        self.content = content
        self.users = 1


class KvCache:
    """`num_blocks` blocks of `block_size` tokens. Events gather until `take_events`.

    prefix_caching: if off, every block stays private: no reuse, no events. pinned_max: blocks that
    may be pinned at once; 0: none.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        worker_id: int,
        dp_rank: int,
        prefix_caching: bool = True,
        pinned_max: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.worker_id = worker_id
        self.dp_rank = dp_rank
        self._prefix_caching = prefix_caching
        self._visible: dict[int, _Block] = {}
        """By sequence hash, in the order of becoming visible, so a parent precedes its children."""
        self._inactive: OrderedDict[int, None] = OrderedDict()
        """Visible blocks without users or pins, the next to evict first."""
        self._pins = Pins(pinned_max)
        self._idle_pinned = 0
        """Pinned blocks without users."""
        self._now_ms = 0.0
        self._private = 0
        self._events: list[KvEvent] = []

    @property
    def active_blocks(self) -> int:
        """Blocks in use by requests. O(1)."""
        return self.held_blocks - self._idle_pinned

    @property
    def held_blocks(self) -> int:
        """Blocks that nothing can evict now: in use or pinned. O(1)."""
        return len(self._visible) - len(self._inactive) + self._private

    @property
    def pinned_blocks(self) -> int:
        return len(self._pins)

    @property
    def visible_blocks(self) -> int:
        """Blocks that a request with the right prefix could share. O(1)."""
        return len(self._visible)

    def allocate(self, table: BlockTable, blocks: int) -> bool:
        """Give an empty `table` its first `blocks` blocks, sharing every cached prefix block.

        False, and nothing changed, if they don't fit beside the blocks that are held. That answer
        takes O(log n), so a request that cannot enter may be tried at every step; True takes O(n).
        A hit on pinned blocks renews their time.
        """
        depth = self._cached_depth(table)
        room = self.num_blocks - self.held_blocks
        if blocks - self._held_depth(table, depth) > room:
            return False
        confirmed = self._confirmed(table, 0, depth)
        if confirmed < depth and blocks - self._held_depth(table, confirmed) > room:
            return False
        hits = table.hashes[:confirmed]
        self._use(hits)
        if self._pins:
            self._pins.renew(hits, self._now_ms)
        table.shared = confirmed
        self._make_private(table, blocks - confirmed)
        return True

    def grow(self, table: BlockTable) -> bool:
        """Add one private block. False, and nothing changed, if all blocks are held."""
        if self.held_blocks == self.num_blocks:
            return False
        self._make_private(table, 1)
        return True

    def publish(self, table: BlockTable, computed_blocks: int) -> None:
        """Make the first `computed_blocks` blocks of `table`, now full and computed, visible.

        O(1) a block. Content that is visible already is shared, its own copy given back. At a
        hash taken by other content it stops, and the rest stays private.
        """
        if not self._prefix_caching:
            return
        visible = self._visible
        first = self._confirmed(table, table.shared, computed_blocks)
        self._use(table.hashes[table.shared : first])
        stored: list[int] = []
        parent_hash = below = table.hashes[first - 1] if first else None
        for index in range(first, computed_blocks):
            block_hash = table.hashes[index]
            if block_hash in visible:
                break
            visible[block_hash] = _Block(parent_hash, self._content(table, index))
            stored.append(block_hash)
            parent_hash = block_hash
        if stored:
            self._events.append(BlockStored(self.worker_id, self.dp_rank, below, stored))
        taken = first + len(stored) - table.shared
        table.shared += taken
        table.private -= taken
        self._private -= taken

    def free(self, table: BlockTable) -> None:
        """Take all blocks from `table`: the private ones are gone, the visible ones may be evicted.

        They become the most recently used, in such order that the tail goes before the head.
        """
        visible, inactive, pinned = self._visible, self._inactive, self._pins.blocks
        for block_hash in reversed(table.hashes[: table.shared]):
            block = visible[block_hash]
            block.users -= 1
            if not block.users:
                if block_hash in pinned:
                    self._idle_pinned += 1
                else:
                    inactive[block_hash] = None
        self._private -= table.private
        table.shared = table.private = 0

    def advance(self, now_ms: float) -> None:
        """It is `now_ms`, on a clock that never goes back: end the pins whose time is over.

        What no request uses may then be evicted, as if it had been used just now. O(1) if none is.
        """
        self._now_ms = now_ms
        ends = self._pins.ends
        if ends and ends[0][0] <= now_ms:
            for block_hash in self._pins.expire(now_ms):
                self._unpinned(block_hash)

    def pin(self, table: BlockTable, ttl_ms: float) -> list[int]:
        """Keep the cached leading blocks of `table`, which holds none, for `ttl_ms`; which are so.

        Fewer if there are `pinned_max` pins: then the leading part that fits. A block that is
        pinned already stays so at least as long. O(blocks · log pins).
        """
        kept: list[int] = []
        cached = self._confirmed(table, 0, self._cached_depth(table))
        for depth, block_hash in enumerate(table.hashes[:cached]):
            if block_hash not in self._pins.blocks and self._pins.full:
                break
            is_new = self._pins.add(block_hash, depth, ttl_ms, self._now_ms)
            if is_new and not self._visible[block_hash].users:
                del self._inactive[block_hash]
                self._idle_pinned += 1
            kept.append(block_hash)
        return kept

    def unpin_one(self) -> None:
        """End the pin that would end first, children before parents; there must be one."""
        self._unpinned(self._pins.pop())

    def take_events(self) -> list[KvEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def contents(self) -> list[BlockStored]:
        """All visible blocks as runs, parents first: what a log that knows nothing must be told."""
        runs: list[BlockStored] = []
        last: int | None = None
        for block_hash, block in self._visible.items():
            if runs and block.parent_hash == last:
                runs[-1].sequence_hashes.append(block_hash)
            else:
                run = BlockStored(self.worker_id, self.dp_rank, block.parent_hash, [block_hash])
                runs.append(run)
            last = block_hash
        return runs

    def pinned(self) -> list[PrefixPinned]:
        """All pins with the whole seconds that are left to them, as runs, parents first."""
        runs: list[PrefixPinned] = []
        last: int | None = None
        for block_hash, block in self._visible.items() if self._pins else ():
            if block_hash not in self._pins.blocks:
                continue
            left_s = int((self._pins.until_ms(block_hash) - self._now_ms) / 1000)
            if runs and block.parent_hash == last and runs[-1].ttl_s == left_s:
                runs[-1].sequence_hashes.append(block_hash)
            elif left_s:
                runs.append(PrefixPinned(self.worker_id, self.dp_rank, [block_hash], left_s))
            last = block_hash
        return runs

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert every invariant, given all tables that hold blocks. For tests: O(all blocks)."""
        users: Counter[int] = Counter()
        private = 0
        for table in tables:
            assert table.shared >= 0 and table.private >= 0
            held = table.hashes[: table.shared]
            assert self._confirmed(table, 0, table.shared) == table.shared, "shares other content"
            users.update(held)
            private += table.private
        assert private == self._private, "private blocks leaked"
        assert len(self._visible) + private <= self.num_blocks, "more blocks than there are"
        for block_hash, block in self._visible.items():
            assert block.users == users.pop(block_hash, 0), "users leaked"
            idle = not block.users and block_hash not in self._pins.blocks
            assert (block_hash in self._inactive) == idle
        assert not users, "a request uses blocks that are gone"
        self._pins.check()
        pinned = {each: block for each, block in self._visible.items() if each in self._pins.blocks}
        assert len(pinned) == len(self._pins), "pinned blocks are gone"
        assert self._idle_pinned == sum(not block.users for block in pinned.values())
        for block_hash, block in pinned.items():
            assert self._pins.until_ms(block_hash) > self._now_ms, "pinned for too long"
            if block.parent_hash is not None:
                until_ms = self._pins.until_ms(block.parent_hash)
                assert until_ms >= self._pins.until_ms(block_hash), "pinned longer than its parent"
        seen: set[int | None] = {None}
        for block_hash, block in self._visible.items():
            assert block.parent_hash in seen, "a block before its parent"
            seen.add(block_hash)
        seen = set()
        for block_hash in self._inactive:
            assert self._visible[block_hash].parent_hash not in seen, "evicted before its child"
            seen.add(block_hash)
        assert seen <= self._visible.keys()

    def _cached_depth(self, table: BlockTable) -> int:
        """How many leading hashes of `table` are visible; more only if hashes collide."""
        if not self._prefix_caching:
            return 0
        visible = self._visible
        return bisect_left(table.hashes, True, key=lambda block_hash: block_hash not in visible)

    def _held_depth(self, table: BlockTable, depth: int) -> int:
        """How many of the first `depth` blocks are held; more only if hashes collide."""
        visible, inactive = self._visible, self._inactive

        def evictable(block_hash: int) -> bool:
            return block_hash in inactive or block_hash not in visible

        return bisect_left(table.hashes, True, hi=depth, key=evictable)

    def _use(self, hashes: list[int]) -> None:
        """One more request uses these visible blocks."""
        visible, inactive = self._visible, self._inactive
        for block_hash in hashes:
            block = visible[block_hash]
            if not block.users:
                if block_hash in inactive:
                    del inactive[block_hash]
                else:
                    self._idle_pinned -= 1
            block.users += 1

    def _unpinned(self, block_hash: int) -> None:
        if not self._visible[block_hash].users:
            self._idle_pinned -= 1
            self._inactive[block_hash] = None

    def _confirmed(self, table: BlockTable, start: int, end: int) -> int:
        """The first index in `start … end` whose block is not visible with this very content.

        Everything before `start` is taken as confirmed. The parent's hash must agree too: it
        names a block that is visible since before this one, and was just compared itself.
        """
        parent_hash = table.hashes[start - 1] if start else None
        for index in range(start, end):
            block_hash = table.hashes[index]
            block = self._visible.get(block_hash)
            if (
                block is None
                or block.parent_hash != parent_hash
                or block.content != self._content(table, index)
            ):
                return index
            parent_hash = block_hash
        return end

    def _content(self, table: BlockTable, index: int) -> bytes:
        start = index * self.block_size
        return table.tokens[start : start + self.block_size].tobytes()

    def _make_private(self, table: BlockTable, blocks: int) -> None:
        free = self.num_blocks - len(self._visible) - self._private
        if blocks > free:
            removed = [self._inactive.popitem(last=False)[0] for _ in range(blocks - free)]
            for block_hash in removed:
                del self._visible[block_hash]
            self._events.append(BlockRemoved(self.worker_id, self.dp_rank, removed))
        table.private += blocks
        self._private += blocks
