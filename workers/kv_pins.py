"""Which cached blocks are pinned and until when. Times are in ms, on the clock of the caller.

What is pinned, renewed or let go is always a chain from the root, or the rest of one. So a block is
pinned at least as long as its children, and its pin ends after theirs.
"""

from collections.abc import KeysView
from heapq import heapify, heappop, heappush, heapreplace


class _Pin:
    __slots__ = ("depth", "ttl_ms", "until_ms")

    def __init__(self, depth: int, ttl_ms: float, until_ms: float) -> None:
        self.depth = depth
        self.ttl_ms = ttl_ms
        self.until_ms = until_ms


class Pins:
    """At most `blocks_max` pinned blocks, by sequence hash."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self._pins: dict[int, _Pin] = {}
        self.ends: list[tuple[float, int, int]] = []
        """A heap with one entry for each pin: (not after its end, -depth, hash). A renewal leaves
        it, and the entry is put right when its turn comes."""

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def blocks(self) -> KeysView[int]:
        """The pinned blocks."""
        return self._pins.keys()

    @property
    def full(self) -> bool:
        return len(self._pins) >= self.blocks_max

    def until_ms(self, block_hash: int) -> float:
        """When the pin of a pinned block ends."""
        return self._pins[block_hash].until_ms

    def add(self, block_hash: int, depth: int, ttl_ms: float, now_ms: float) -> bool:
        """Pin a block, or pin it for longer; whether it was not pinned before. O(log n).

        depth: of the block in its chain; its parent must be pinned. The caller sees to `full`.
        """
        pin = self._pins.get(block_hash)
        if pin is not None:
            pin.ttl_ms = max(pin.ttl_ms, ttl_ms)
            pin.until_ms = max(pin.until_ms, now_ms + ttl_ms)
            return False
        self._pins[block_hash] = _Pin(depth, ttl_ms, now_ms + ttl_ms)
        heappush(self.ends, (now_ms + ttl_ms, -depth, block_hash))
        return True

    def renew(self, chain: list[int], now_ms: float) -> None:
        """A request hit `chain`, from the root on: what is pinned of it gets its time anew."""
        for block_hash in chain:
            pin = self._pins.get(block_hash)
            if pin is None:
                return
            pin.until_ms = max(pin.until_ms, now_ms + pin.ttl_ms)

    def expire(self, now_ms: float) -> list[int]:
        """End the pins whose time is over, and return their blocks, children first."""
        ended: list[int] = []
        while self.ends and self.ends[0][0] <= now_ms:
            if self._put_right():
                ended.append(self._pop())
        return ended

    def pop(self) -> int:
        """End the pin that ends first, children before parents, and return its block."""
        while not self._put_right():
            pass
        return self._pop()

    def check(self) -> None:
        """Assert every invariant. For tests: O(n)."""
        assert len(self._pins) <= self.blocks_max
        assert sorted(block_hash for *_, block_hash in self.ends) == sorted(self._pins)
        for end_ms, negative_depth, block_hash in self.ends:
            pin = self._pins[block_hash]
            assert end_ms <= pin.until_ms and -negative_depth == pin.depth
        heap = list(self.ends)
        heapify(heap)
        assert heap[:1] == self.ends[:1]

    def _put_right(self) -> bool:
        """Whether the first entry tells its pin's end; if not, now it does, at its place."""
        end_ms, negative_depth, block_hash = self.ends[0]
        until_ms = self._pins[block_hash].until_ms
        if end_ms < until_ms:
            heapreplace(self.ends, (until_ms, negative_depth, block_hash))
            return False
        return True

    def _pop(self) -> int:
        block_hash = heappop(self.ends)[2]
        del self._pins[block_hash]
        return block_hash
