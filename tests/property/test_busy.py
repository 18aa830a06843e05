"""Busy marks against the definition, rank by rank."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.radix import WorkerRank
from router.busy import BATCHED_TOKENS_UNKNOWN, BusyLimits, Thresholds, why_busy
from router.errors import AllWorkersBusy

counts = st.one_of(st.integers(0, 120), st.integers(0, 2**50))
shares = st.one_of(st.integers(0, 100).map(lambda percent: percent / 100), st.floats(0, 1))
fracs = st.one_of(shares, st.floats(0, 1e300), st.just(float("inf")))
thresholds_st = st.builds(Thresholds, st.none() | shares, st.none() | counts, st.none() | fracs)
sizes = st.none() | st.sampled_from([0, 1, 3, 100]) | st.integers(0, 2**40)
ranks_st = st.lists(st.tuples(st.integers(0, 3), counts, counts, sizes, sizes), max_size=8)

Rank = tuple[int, int, int, int | None, int | None]


def limits_of(thresholds: Thresholds, ranks: list[Rank]) -> BusyLimits:
    names = [WorkerRank(rank[0], index) for index, rank in enumerate(ranks)]
    return BusyLimits(thresholds, "m", names, [r[3] for r in ranks], [r[4] for r in ranks])


def is_above(measured: int, whole: int, threshold: float) -> bool:
    """In exact numbers, but for the threshold: 29 of 100 is the float 0.29."""
    return threshold != float("inf") and measured / whole > threshold


@given(thresholds_st, counts, counts, sizes, sizes)
def test_busy_is_above_a_threshold_that_is_set(
    thresholds: Thresholds, blocks: int, tokens: int, total: int | None, batched: int | None
) -> None:
    """Strictly above; unknown sizes as defined; and the reason holds by itself."""
    share, most, frac = (
        thresholds.active_decode_blocks,
        thresholds.active_prefill_tokens,
        thresholds.active_prefill_tokens_frac,
    )
    above = {
        "active_decode_blocks_threshold": share is not None
        and bool(total)
        and is_above(blocks, total or 1, share),
        "active_prefill_tokens_threshold": most is not None and tokens > most,
        "active_prefill_tokens_threshold_frac": frac is not None
        and is_above(tokens, batched or BATCHED_TOKENS_UNKNOWN, frac),
    }
    busy = why_busy(
        thresholds,
        active_decode_blocks=blocks,
        active_prefill_tokens=tokens,
        total_kv_blocks=total,
        max_num_batched_tokens=batched,
    )
    assert (busy is not None) == any(above.values())
    if busy is not None:
        assert above[busy.threshold] and busy.measured > busy.value and busy.excess > 1


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_a_decimal_threshold_means_the_decimal(percent: int, whole: int, measured: int) -> None:
    """0.29 is 29 of 100, though the float product 0.29 * 100 is less than 29."""
    busy = why_busy(
        Thresholds(active_prefill_tokens_frac=percent / 100),
        active_decode_blocks=0,
        active_prefill_tokens=measured,
        total_kv_blocks=None,
        max_num_batched_tokens=whole,
    )
    assert (busy is not None) == (Fraction(measured, whole) > Fraction(percent, 100))


@given(thresholds_st, ranks_st)
def test_free_are_the_ranks_that_are_not_busy(thresholds: Thresholds, ranks: list[Rank]) -> None:
    """A busy rank is never chosen while another is free; a worker is busy when all its ranks are;
    the refusal names what one of the ranks exceeds."""
    reasons = [
        why_busy(
            thresholds,
            active_decode_blocks=blocks,
            active_prefill_tokens=tokens,
            total_kv_blocks=total,
            max_num_batched_tokens=batched,
        )
        for _, blocks, tokens, total, batched in ranks
    ]
    limits = limits_of(thresholds, ranks)
    blocks, tokens = [rank[1] for rank in ranks], [rank[2] for rank in ranks]
    free = [index for index, reason in enumerate(reasons) if reason is None]
    workers = {rank[0] for rank in ranks}
    assert limits.busy_workers(blocks, tokens) == workers - {ranks[index][0] for index in free}
    if free or not ranks:
        assert list(limits.free(blocks, tokens)) == free
        return
    with pytest.raises(AllWorkersBusy) as refusal:
        limits.free(blocks, tokens)
    assert refusal.value.workers == len(workers)
    assert refusal.value.busy in reasons


@given(st.integers(0, 100), st.lists(st.integers(0, 200), min_size=1))
def test_a_refusal_names_the_rank_that_is_least_above(most: int, tokens: list[int]) -> None:
    limits = limits_of(Thresholds(active_prefill_tokens=most), [(1, 0, t, 9, 9) for t in tokens])
    if min(tokens) <= most:
        return
    with pytest.raises(AllWorkersBusy) as refusal:
        limits.free([0] * len(tokens), tokens)
    assert (refusal.value.busy.value, refusal.value.busy.measured) == (most, min(tokens))
