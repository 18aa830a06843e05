"""Busy thresholds: which ranks take no more requests, and what a refusal says of it.

A rank is busy if one of the thresholds that are set is exceeded there; reaching it is not enough:

    active_decode_blocks / total_kv_blocks         >  active_decode_blocks_threshold
    active_prefill_tokens                          >  active_prefill_tokens_threshold
    active_prefill_tokens / max_num_batched_tokens >  active_prefill_tokens_threshold_frac

A worker that does not tell its total_kv_blocks can't exceed the first one, and one that does not
tell its max_num_batched_tokens counts as batching 10,000,000 (the peer's worker monitor of March
2026). A worker is busy when all its ranks are. In every mode, busy ranks are no candidates, and
when no other is left the request is refused.

Dividing what is measured, rather than multiplying the threshold, makes 29 of 100 equal to 0.29;
0.29 * 100 is less than 29.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from operator import ge, not_, or_, truediv

from msgspec import Struct

from eventstore.events import BusyThresholdChanged
from indexer.radix import WorkerRank
from router.errors import AllWorkersBusy

BATCHED_TOKENS_UNKNOWN = 10_000_000
"""Stands for the max_num_batched_tokens of a worker that does not tell it."""

_EXACT_MAX = 2.0**52
"""Up to here floats tell neighbouring integers apart. No rank has as many blocks or tokens."""


class Thresholds(Struct, frozen=True):
    """The busy thresholds of a model. None: not set. Fractions and tokens, none below 0."""

    active_decode_blocks: float | None = None
    active_prefill_tokens: int | None = None
    active_prefill_tokens_frac: float | None = None

    @classmethod
    def of(cls, changed: BusyThresholdChanged) -> "Thresholds":
        return cls(
            changed.active_decode_blocks,
            changed.active_prefill_tokens,
            changed.active_prefill_tokens_frac,
        )

    @property
    def are_set(self) -> bool:
        """Whether any is."""
        return self != _NOT_SET


_NOT_SET = Thresholds()


class Busy(Struct, frozen=True):
    """A threshold that is exceeded: its name in the API, its value, and what was measured, both in
    the threshold's unit. `measured` is greater than `value`."""

    threshold: str
    value: float
    measured: float

    @property
    def excess(self) -> float:
        """How many times the value was measured; infinite for a value of 0."""
        return self.measured / self.value if self.value else math.inf

    def __str__(self) -> str:
        return f"{_shown(self.measured)}, and {self.threshold} is {_shown(self.value)}"


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def prefill_cap(threshold: float, max_num_batched_tokens: int | None) -> float:
    """Active prefill tokens above which a rank has no room for a request of the queue.

    threshold: times what the rank can batch, 0 or more.
    """
    return threshold * (max_num_batched_tokens or BATCHED_TOKENS_UNKNOWN)


def why_busy(
    thresholds: Thresholds,
    *,
    active_decode_blocks: int,
    active_prefill_tokens: int,
    total_kv_blocks: int | None,
    max_num_batched_tokens: int | None,
) -> Busy | None:
    """The threshold that a rank exceeds by the most; None if it exceeds none."""
    measured = []
    if thresholds.active_decode_blocks is not None and total_kv_blocks:
        share = active_decode_blocks / total_kv_blocks
        value: float = thresholds.active_decode_blocks
        measured.append(Busy("active_decode_blocks_threshold", value, share))
    if thresholds.active_prefill_tokens is not None:
        value = thresholds.active_prefill_tokens
        measured.append(Busy("active_prefill_tokens_threshold", value, active_prefill_tokens))
    if thresholds.active_prefill_tokens_frac is not None:
        share = active_prefill_tokens / (max_num_batched_tokens or BATCHED_TOKENS_UNKNOWN)
        value = thresholds.active_prefill_tokens_frac
        measured.append(Busy("active_prefill_tokens_threshold_frac", value, share))
    exceeded = [each for each in measured if each.measured > each.value]
    return max(exceeded, key=lambda busy: busy.excess, default=None)


class BusyLimits:
    """The thresholds worked out for the candidates of one model.

    ranks, total_kv_blocks, max_num_batched_tokens: parallel, one item a candidate; good as long as
    these and the thresholds are. Loads are parallel to the ranks too. Building takes about 0.5 µs
    a rank; asking about 1,000 ranks then 20 µs, or 50 with both kinds of thresholds, and 80 where
    some of them are busy. A refusal takes 200.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        model: str,
        ranks: Sequence[WorkerRank],
        total_kv_blocks: Sequence[int | None],
        max_num_batched_tokens: Sequence[int | None],
    ) -> None:
        self._thresholds = thresholds
        self._model = model
        self._worker_ids = [rank.worker_id for rank in ranks]
        self._ranks_of = Counter(self._worker_ids)
        self._facts = list(zip(total_kv_blocks, max_num_batched_tokens, strict=True))
        if len(self._facts) != len(ranks):
            raise ValueError(f"facts of {len(self._facts)} ranks, but {len(ranks)} ranks")
        self._every = range(len(ranks))
        # From how many blocks or tokens on a rank is busy; None where that can't make any busy.
        self._blocks_from: list[float] | None = None
        self._tokens_from: list[float] | None = None
        share, tokens = thresholds.active_decode_blocks, thresholds.active_prefill_tokens
        frac = thresholds.active_prefill_tokens_frac
        if share is not None:
            self._blocks_from = [_first_above(share, total) for total, _ in self._facts]
        if tokens is not None or frac is not None:
            most = math.inf if tokens is None else tokens + 1
            self._tokens_from = [
                min(most, _first_above(frac, batched or BATCHED_TOKENS_UNKNOWN))
                for _, batched in self._facts
            ]

    def free(
        self, active_decode_blocks: Sequence[int], active_prefill_tokens: Sequence[int]
    ) -> Sequence[int]:
        """Indices of the candidates that may be chosen, ascending; never none of some.

        Raises AllWorkersBusy. Where no threshold is set, nothing is computed.
        """
        busy = self._busy(active_decode_blocks, active_prefill_tokens)
        if True not in busy:
            return self._every
        free = list(compress(self._every, map(not_, busy)))
        if not free:
            reason = self._least_exceeded(active_decode_blocks, active_prefill_tokens)
            raise AllWorkersBusy(self._model, len(self._ranks_of), reason)
        return free

    def busy_workers(
        self, active_decode_blocks: Sequence[int], active_prefill_tokens: Sequence[int]
    ) -> set[int]:
        """Ids of the workers all of whose ranks are busy."""
        busy = self._busy(active_decode_blocks, active_prefill_tokens)
        if True not in busy:
            return set()
        counted = Counter(compress(self._worker_ids, busy))
        return {worker for worker, count in counted.items() if count == self._ranks_of[worker]}

    def _busy(self, blocks: Sequence[int], tokens: Sequence[int]) -> Sequence[bool]:
        """Whether each rank is busy; empty where none can be."""
        if not len(blocks) == len(tokens) == len(self._facts):
            raise ValueError(
                f"loads of {len(blocks)} and {len(tokens)} of {len(self._facts)} ranks"
            )
        if self._blocks_from is None:
            return [] if self._tokens_from is None else list(map(ge, tokens, self._tokens_from))
        by_blocks = map(ge, blocks, self._blocks_from)
        if self._tokens_from is None:
            return list(by_blocks)
        return list(map(or_, by_blocks, map(ge, tokens, self._tokens_from)))

    def _least_exceeded(self, blocks: Sequence[int], tokens: Sequence[int]) -> Busy:
        """What keeps the rank busy that is the nearest to not being so; all of them are."""
        never = [math.inf] * len(self._facts)
        by_blocks = map(truediv, blocks, self._blocks_from or never)
        by_tokens = map(truediv, tokens, self._tokens_from or never)
        excess = list(map(max, by_blocks, by_tokens))
        index = excess.index(min(excess))
        total_kv_blocks, max_num_batched_tokens = self._facts[index]
        reason = why_busy(
            self._thresholds,
            active_decode_blocks=blocks[index],
            active_prefill_tokens=tokens[index],
            total_kv_blocks=total_kv_blocks,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        assert reason is not None
        return reason


def _first_above(share: float | None, whole: int | None) -> float:
    """The least n with n / whole > share; infinite where it is beyond all counts."""
    if share is None or not whole or share * whole >= _EXACT_MAX:
        return math.inf
    n = math.floor(share * whole)
    while n / whole <= share:  # at most three times: the product is off by less than a half
        n += 1
    return n
