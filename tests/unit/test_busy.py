"""Busy marks by example: the comparisons, what is unknown, and what a refusal says."""

import pytest

from eventstore.events import BusyThresholdChanged
from indexer.radix import WorkerRank
from router.busy import Busy, BusyLimits, Thresholds, prefill_cap, why_busy
from router.errors import AllWorkersBusy


def reason(
    thresholds: Thresholds,
    blocks: int = 0,
    tokens: int = 0,
    total: int | None = 1000,
    batched: int | None = 8192,
) -> Busy | None:
    return why_busy(
        thresholds,
        active_decode_blocks=blocks,
        active_prefill_tokens=tokens,
        total_kv_blocks=total,
        max_num_batched_tokens=batched,
    )


def test_equal_is_free() -> None:
    assert reason(Thresholds(active_decode_blocks=0.85), blocks=850) is None
    assert reason(Thresholds(active_decode_blocks=0.85), blocks=851) == Busy(
        "active_decode_blocks_threshold", 0.85, 0.851
    )
    assert reason(Thresholds(active_prefill_tokens=0)) is None
    assert reason(Thresholds(active_prefill_tokens=0), tokens=1) is not None
    assert reason(Thresholds(active_prefill_tokens_frac=2.0), tokens=16_384) is None
    assert reason(Thresholds(active_prefill_tokens_frac=2.0), tokens=16_385) is not None


def test_what_a_worker_does_not_tell() -> None:
    everything = Thresholds(0.0, None, 1.0)
    assert reason(everything, blocks=10**6, total=None) is None
    assert reason(everything, tokens=10_000_000, batched=None) is None
    assert reason(everything, tokens=10_000_001, batched=None) is not None
    assert prefill_cap(2.0, 8192) == 16_384
    assert prefill_cap(2.0, None) == 20_000_000


def test_of_several_the_one_exceeded_most_is_named() -> None:
    busy = reason(Thresholds(0.5, 1000, None), blocks=600, tokens=3000)
    assert busy == Busy("active_prefill_tokens_threshold", 1000, 3000)


def test_thresholds_are_those_of_the_event() -> None:
    assert Thresholds.of(BusyThresholdChanged("m", 0.5, None, 2.0)) == Thresholds(0.5, None, 2.0)
    assert not Thresholds.of(BusyThresholdChanged("m", None, None, None)).are_set
    assert Thresholds(active_prefill_tokens=0).are_set


def limits(thresholds: Thresholds, worker_ids: list[int]) -> BusyLimits:
    ranks = [WorkerRank(worker_id, index) for index, worker_id in enumerate(worker_ids)]
    sizes = [1000] * len(ranks)
    return BusyLimits(thresholds, "tiny", ranks, sizes, sizes)


def test_a_worker_is_busy_when_all_its_ranks_are() -> None:
    """The free rank of a worker with a busy one remains a candidate, and the busy one does not."""
    marked = limits(Thresholds(0.5), [1, 1, 2, 2])
    blocks, tokens = [501, 500, 900, 501], [0, 0, 0, 0]
    assert list(marked.free(blocks, tokens)) == [1]
    assert marked.busy_workers(blocks, tokens) == {2}


def test_a_refusal_says_which_threshold_which_value_and_how_many_workers() -> None:
    with pytest.raises(AllWorkersBusy) as refusal:
        limits(Thresholds(0.85), [1, 1, 2]).free([920, 910, 930], [0, 0, 0])
    assert str(refusal.value) == (
        "all 2 workers of tiny are busy: the one that is least so has 0.91, and "
        "active_decode_blocks_threshold is 0.85"
    )
    with pytest.raises(AllWorkersBusy) as refusal:
        limits(Thresholds(None, 12_345_678), [1]).free([0], [12_345_679])
    assert str(refusal.value) == (
        "the worker of tiny is busy: it has 12345679, and active_prefill_tokens_threshold is "
        "12345678"
    )


def test_without_thresholds_or_candidates_nobody_is_busy() -> None:
    unset = limits(Thresholds(), [1, 2])
    assert list(unset.free([10**9] * 2, [10**9] * 2)) == [0, 1]
    assert unset.busy_workers([10**9] * 2, [10**9] * 2) == set()
    assert list(limits(Thresholds(0.0), []).free([], [])) == []


def test_loads_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="loads of 3 and 3 of 2 ranks"):
        limits(Thresholds(0.5), [1, 2]).free([0, 0, 0], [0, 0, 0])
    with pytest.raises(ValueError):
        BusyLimits(Thresholds(), "tiny", [WorkerRank(1, 0)], [], [])
