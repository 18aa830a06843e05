"""Sets of slots as integers: bit i of a mask stands for slot i.

Plain ints beat every set type here: thousands of blocks share one mask, a union or intersection of
a thousand slots takes some 40 ns, and equal masks compare at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def match_depths(get: Callable[[K], int | None], keys: Sequence[K]) -> list[tuple[int, int]]:
    """Group the slots that hold `keys[0]` by how many leading keys they hold.

    get: the mask of the slots that hold a key; None or 0 for none. Along `keys` the masks only
        shrink: every slot in the mask of a key is in the mask of the key before it. (Where they do
        not, the depths are upper bounds.)
    Returns (mask, depth): depths strictly ascending, 1..len(keys), masks disjoint and none 0.
    O(g · log(n / g)) look-ups for n keys and g groups.
    """
    if not keys or not (mask := get(keys[0])):
        return []
    groups: list[tuple[int, int]] = []
    # All keys up to `low` have the slots of `mask`; the key at `high` has only those of `above`,
    # and `farther` are such pairs beyond it, nearest last.
    low, high = 0, len(keys) - 1
    above = (get(keys[high]) or 0) & mask
    farther: list[tuple[int, int]] = []
    while True:
        while above != mask:
            if high == low + 1:
                groups.append((mask ^ above, high))
                if not above:
                    return groups
                mask = above
                break
            middle = (low + high) // 2
            between = (get(keys[middle]) or 0) & mask
            if between == mask:
                low = middle
            else:
                farther.append((high, above))
                high, above = middle, between
        if not farther:
            groups.append((mask, len(keys)))
            return groups
        low = high
        high, above = farther.pop()
        above &= mask


def select(mask: int, items: Sequence[T]) -> list[T]:
    """The items at the mask's bits, in order: `items[i]` for each bit i.

    items: one per slot, at least up to the mask's highest. About 10 ns a slot, or 150 ns a bit
    where few are set.
    """
    if mask.bit_count() * 16 > mask.bit_length() + 48:
        return list(compress(items, f"{mask:b}".encode().translate(_ZERO_ONE)[::-1]))
    selected = []
    while mask:
        slot = mask.bit_length() - 1
        selected.append(items[slot])
        mask ^= 1 << slot
    return selected[::-1]


def slots_of(mask: int) -> list[int]:
    """The slots in a mask, ascending. Cost as `select`."""
    return select(mask, range(mask.bit_length()))


def add_holder(masks: dict[K, int], bit: int, keys: Sequence[K]) -> None:
    """Add a slot, as its bit, to the masks of these distinct keys, which it did not hold."""
    if not keys:
        return
    before = list(map(masks.get, keys))
    first = before[0]
    if before.count(first) == len(before):
        # The usual case, and all keys share one mask object.
        masks.update(dict.fromkeys(keys, (first or 0) | bit))
    else:
        after = {mask: (mask or 0) | bit for mask in set(before)}
        masks.update(zip(keys, map(after.__getitem__, before), strict=True))


def drop_holder(masks: dict[K, int], bit: int, keys: Sequence[K]) -> None:
    """Take a slot, as its bit, from the masks of these distinct keys, which it held; forget the
    keys that nobody holds then."""
    if not keys:
        return
    before = list(map(masks.__getitem__, keys))
    first = before[0]
    dead = keys
    if before.count(first) != len(before):
        after = {mask: mask ^ bit for mask in set(before)}
        masks.update(zip(keys, map(after.__getitem__, before), strict=True))
        dead = [key for key, mask in zip(keys, before, strict=True) if mask == bit]
    elif first != bit:
        masks.update(dict.fromkeys(keys, first ^ bit))
        return
    deque(map(masks.pop, dead), maxlen=0)


_ZERO_ONE = bytes(code == ord("1") for code in range(256))
"""Translates binary digits to truth values."""
