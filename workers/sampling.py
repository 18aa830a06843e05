"""What the mock engine says: each token drawn from a seed and everything before it.

A request's *context* is one number that stands for its key and all its tokens so far. At a block
boundary it is made from the block's sequence hash, so a prompt of any length costs no more than its
last, partial block; between two boundaries each token is mixed in. Whoever has the same seed and
the same tokens has the same context, wherever the prompt ends and the output begins.
"""

import math
from collections.abc import Iterable, Sequence

from workers.protocol import TokenLogprobs

_U64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEELE = 0xD1342543DE82EF95
"""Odd multipliers of good spectral quality: Knuth's golden ratio, and Steele and Vigna's LCG."""

RANK_MAX = 40
"""Of a made-up sampled token: an unlikely one is not impossible."""
_LN_2 = math.log(2)


def _leading_zeros(value: int) -> int:
    return 64 - value.bit_length()


def _mix(context: int, value: int) -> int:
    product = ((context ^ value) * _GOLDEN) & _U64
    return product ^ (product >> 32)


class TokenSource:
    """Draws tokens from `token_ids`, each alike, and ends after `length_mean` ≥ 1 on average."""

    def __init__(self, *, seed: int, token_ids: Sequence[int], length_mean: float) -> None:
        self._seed = seed & _U64
        self._token_ids = token_ids
        self._end_below = int(2**32 / length_mean)

    def key(self, sampling_seed: int | None) -> int:
        """What tells this request's continuation from another of the same prompt. u64."""
        return _mix(self._seed, _GOLDEN if sampling_seed is None else sampling_seed & _U64)

    def context(self, key: int, sequence_hash: int, tail: Iterable[int]) -> int:
        """The context after the block `sequence_hash` (0: no full block) and `tail` behind it."""
        context = _mix(key, sequence_hash)
        for token in tail:
            context = _mix(context, token)
        return context

    def extended(self, context: int, token: int) -> int:
        """The context after one more token of a partial block."""
        return _mix(context, token)

    def token(self, context: int) -> int:
        """The token that follows."""
        draw = (context * _STEELE & _U64) >> 32
        return self._token_ids[draw % len(self._token_ids)]

    def logprobs(self, context: int, token: int, count: int) -> TokenLogprobs:
        """How likely `token` was after `context`, with the `count` likeliest ones; made up.

        Probabilities halve from one rank to the next, beginning at a half, so they sum to less than
        1; the sampled token is of rank r with a chance of 2^-(r+1).
        """
        size = len(self._token_ids)
        rank = min(RANK_MAX, size - 1, _leading_zeros(context * _GOLDEN & _U64))
        start = 1 + ((context * _STEELE & _U64) >> 32)
        likeliest = [self._token_ids[(start + i) % size] for i in range(min(count, size - 1))]
        if rank < count:
            likeliest.insert(rank, token)
        top = [(one, -(r + 1) * _LN_2) for r, one in enumerate(likeliest[:count])]
        return TokenLogprobs(-(rank + 1) * _LN_2, top)

    def ends(self, context: int) -> bool:
        """Whether the output ends here by itself: geometric, a chance of 1 / `length_mean`."""
        return context >> 32 < self._end_below
