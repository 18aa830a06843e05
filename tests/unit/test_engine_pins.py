"""What the mock engine keeps for those who ask it to, by example."""

import pytest

from eventstore.events import BlockRemoved, PrefixPinned
from indexer.blocks import prompt_hashes
from tests.unit.test_engine import engine, request, said, step


def test_a_pinned_prefix_outlives_what_evicts_the_rest() -> None:
    one = engine(num_gpu_blocks=6)
    said(one, request("a", range(8), 1))
    said(one, request("b", range(50, 58), 1))
    kept = one.pin(range(9), 60_000, 1000)
    assert kept == prompt_hashes(range(8), 4)
    assert one.pinned(1500) == [PrefixPinned(9, 2, kept, 59)]
    assert one.active_blocks == 0
    said(one, request("c", range(100, 116), 1))  # 4 blocks: all that is not pinned
    assert one.pinned(2000) == [PrefixPinned(9, 2, kept, 59)]
    one.submit(request("a again", range(9), 1))
    assert step(one).outputs[0].cached_tokens == 8


def test_a_pin_ends_with_its_time_and_a_hit_renews_it() -> None:
    one = engine()
    said(one, request("a", range(8), 1))
    kept = one.pin(range(8), 10_000, 0)
    one.submit(request("b", range(9), 1))
    assert one.step(9_000) is not None
    assert one.pinned(10_000) == [PrefixPinned(9, 2, kept, 9)]
    assert one.pinned(19_000) == []
    assert len(one.cache_contents()) == 1, "still cached, only not pinned"


def test_pins_end_at_their_share_of_the_cache() -> None:
    one = engine(num_gpu_blocks=10, max_pinned_ratio=0.3)
    said(one, request("a", range(16), 1))
    said(one, request("b", range(50, 58), 1))
    hashes = prompt_hashes(range(16), 4)
    assert one.pin(range(16), 1000, 0) == hashes[:3]
    assert one.pin(range(50, 58), 1000, 0) == []
    assert one.pin(range(16), 2000, 0) == hashes[:3], "those that are pinned may stay longer"
    one.check()
    off = engine(max_pinned_ratio=0)
    said(off, request("a", range(16), 1))
    assert off.pin(range(16), 1000, 0) == []


def test_only_what_is_cached_is_pinned() -> None:
    one = engine()
    assert one.pin(range(8), 1000, 0) == []
    said(one, request("a", range(8), 1))
    assert one.pin([*range(4), 9, 9, 9, 9], 1000, 0) == prompt_hashes(range(4), 4)
    with pytest.raises(OverflowError):
        one.pin([-1], 1000, 0)


def test_pins_give_way_to_a_request_that_only_they_keep_out() -> None:
    one = engine(num_gpu_blocks=4)
    said(one, request("a", range(8), 1))
    first, second = one.pin(range(8), 60_000, 0)
    one.submit(request("b", range(50, 62), 1))  # 3 blocks, and 2 are pinned
    assert step(one).kv_events[0] == BlockRemoved(9, 2, [second])
    assert one.pinned(0) == [PrefixPinned(9, 2, [first], 59)]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_the_share_is_within_its_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="max_pinned_ratio"):
        engine(max_pinned_ratio=ratio)
