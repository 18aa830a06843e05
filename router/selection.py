"""Choosing a rank: the peer's cost formula, temperature and tie rule, and the other modes.

For a request of `isl` tokens in `n` complete blocks of `bs` tokens, and a rank with `o` leading
blocks cached and `a` leading blocks already active:

    P = (active_prefill_tokens + max(0, isl - o * bs)) / bs
    D = active_blocks + n - a
    cost = overlap_weight * P + D                                            lowest wins

(the peer's router, its scheduler of March 2026). Everything here is pure: load comes in as lists by
slot, randomness as an rng.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import compress
from random import Random
from typing import NamedTuple

from indexer.masks import slots_of

REASONS_MAX = 8
"""Candidates recorded with a decision: the chosen rank and the best others."""


class RouterMode(StrEnum):
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    KV = "kv"
    POWER_OF_TWO = "power-of-two"
    LEAST_LOADED = "least-loaded"
    DIRECT = "direct"
    SESSION = "session"
    """No mode that can be set: the request's session is bound to the rank."""


class Load(NamedTuple):
    """Booked load, one item a rank."""

    prefill_tokens: Sequence[int]
    blocks: Sequence[int]
    requests: Sequence[int]


class Prompt(NamedTuple):
    """What the cost needs to know of a request. `block_count`: complete blocks only."""

    isl: int
    block_size: int
    block_count: int


def depth_by_slot(groups: Sequence[tuple[int, int]], slot_count: int) -> list[int]:
    """(mask of slots, depth) groups of disjoint masks → depth by slot, 0 where none says.

    Costs little where most slots share one depth, as under a common system prompt.
    """
    if not groups:
        return [0] * slot_count
    covered = 0
    for mask, _ in groups:
        covered |= mask
    rest = ((1 << slot_count) - 1) & ~covered
    every = [*groups, (rest, 0)]
    most = max(every, key=lambda group: group[0].bit_count())
    result = [most[1]] * slot_count
    for mask, depth in every:
        if mask != most[0]:
            for slot in slots_of(mask):
                result[slot] = depth
    return result


def costs(
    prompt: Prompt,
    load: Load,
    overlaps: Sequence[int],
    active_overlaps: Sequence[int],
    overlap_weight: float,
) -> list[float]:
    """The cost of each rank, in blocks. All sequences are parallel, one item a rank.

    overlaps, active_overlaps: leading blocks cached / active there. As only complete blocks count,
    `o * bs` is never more than `isl`, and the formula needs no maximum. About 80 ns a rank.
    """
    isl, block_size, block_count = prompt
    weight = overlap_weight / block_size
    base = weight * isl + block_count
    return [
        base + weight * tokens + blocks - overlap_weight * overlap - active
        for tokens, blocks, overlap, active in zip(
            load.prefill_tokens, load.blocks, overlaps, active_overlaps, strict=True
        )
    ]


def power_of_two(requests: Sequence[int], rng: Random) -> list[int]:
    """Indices of two candidates that are drawn, the one with fewer requests first; of equals the
    one drawn first. One index where there is one candidate."""
    if len(requests) == 1:
        return [0]
    first, second = rng.sample(range(len(requests)), 2)
    return [second, first] if requests[second] < requests[first] else [first, second]


def least_loaded(requests: Sequence[int], rng: Random) -> int:
    """Index of the candidate with the fewest requests; of equals a random one."""
    fewest = min(requests)
    return rng.choice([index for index, count in enumerate(requests) if count == fewest])


def pick(
    costs_by_index: Sequence[float],
    size_of: Callable[[int], int],
    temperature: float,
    rng: Random,
) -> int:
    """Index of the chosen candidate. `size_of`: blocks in the index of the candidate at an index.

    temperature 0: the lowest cost; of equals the one with the fewest cached blocks; of those a
    random one. Above: a draw with p ∝ exp(-cost / (range * temperature)), so that the scale of the
    costs does not matter. Any temperature above 0 will do, also one so small that only the lowest
    is left. ValueError for no candidates.
    """
    if not costs_by_index:
        raise ValueError("nothing to choose from")
    lowest = min(costs_by_index)
    if temperature <= 0:
        if costs_by_index.count(lowest) == 1:
            return costs_by_index.index(lowest)
        tied = [index for index, cost in enumerate(costs_by_index) if cost == lowest]
        sizes = [size_of(index) for index in tied]
        smallest = min(sizes)
        tied = [index for index, size in zip(tied, sizes, strict=True) if size == smallest]
        return tied[0] if len(tied) == 1 else rng.choice(tied)
    spread = max(costs_by_index) - lowest
    if spread == 0:
        return rng.randrange(len(costs_by_index))
    # In this order no intermediate value is 0 or infinite that must not be: the share of the range
    # is in 0 … 1, and at worst its quotient is minus infinity, whose exponential is 0.
    weights = [math.exp((lowest - cost) / spread / temperature) for cost in costs_by_index]
    return rng.choices(range(len(weights)), weights)[0]


def best(costs_by_index: Sequence[float], chosen: int, count: int = REASONS_MAX) -> list[int]:
    """Indices of the candidates worth recording: the chosen one, then the cheapest others."""
    # The cut keeps the sort short: with equal costs more than `count` may pass it.
    cut = heapq.nsmallest(count, costs_by_index)[-1]
    order = list(compress(range(len(costs_by_index)), map(cut.__ge__, costs_by_index)))
    order.sort(key=costs_by_index.__getitem__)
    return [chosen, *[index for index in order if index != chosen][: count - 1]]
