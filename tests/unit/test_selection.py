"""The cost formula and the draw, on the worked numbers of the reference."""

import math
from collections import Counter
from random import Random

import pytest

from router.selection import (
    REASONS_MAX,
    Load,
    Prompt,
    best,
    costs,
    depth_by_slot,
    least_loaded,
    pick,
    power_of_two,
)


def test_worked_example_holder_against_stranger() -> None:
    """Block size 4, 18 tokens, one worker holds 2 blocks, both idle: 6.5 against 8.5."""
    prompt = Prompt(isl=18, block_size=4, block_count=4)
    assert costs(prompt, Load([0, 0], [0, 0], [0, 0]), [2, 0], [0, 0], 1.0) == [6.5, 8.5]


def test_load_and_weight_enter_the_cost() -> None:
    """weight 2: 2 * (100 + 32 - 16) / 16 + 7 + 2 - 1."""
    prompt = Prompt(isl=32, block_size=16, block_count=2)
    assert costs(prompt, Load([100], [7], [1]), [1], [1], 2.0) == [2 * (100 + 32 - 16) / 16 + 8]


def test_weight_zero_ignores_the_cache() -> None:
    prompt = Prompt(isl=64, block_size=16, block_count=4)
    assert costs(prompt, Load([500, 0], [3, 3], [1, 1]), [4, 0], [0, 0], 0.0) == [7, 7]


def test_depths_are_spread_over_slots_whatever_group_is_the_largest() -> None:
    assert depth_by_slot([], 3) == [0, 0, 0]
    assert depth_by_slot([(0b0010, 2)], 4) == [0, 2, 0, 0]
    assert depth_by_slot([(0b1011, 1), (0b0100, 7)], 5) == [1, 1, 7, 1, 0]


def test_lowest_cost_wins_then_smallest_cache_then_chance() -> None:
    rng = Random(1)
    assert pick([3.0, 1.0, 2.0], [0, 9, 0].__getitem__, 0.0, rng) == 1
    assert pick([1.0, 1.0, 2.0], [5, 4, 0].__getitem__, 0.0, rng) == 1
    assert {pick([1.0, 1.0], [4, 4].__getitem__, 0.0, rng) for _ in range(50)} == {0, 1}


@pytest.mark.parametrize(("temperature", "share"), [(0.5, 0.881), (1.0, 0.731), (2.0, 0.622)])
@pytest.mark.parametrize("gap", [0.001, 5000.0])
def test_temperature_does_not_depend_on_the_gap(
    temperature: float, share: float, gap: float
) -> None:
    """Of two candidates the better one gets 1 / (1 + e^(-1/T)), whatever lies between them."""
    assert math.isclose(1 / (1 + math.exp(-1 / temperature)), share, abs_tol=0.001)
    rng = Random(7)
    drawn = Counter(
        pick([10.0, 10.0 + gap], [0, 0].__getitem__, temperature, rng) for _ in range(20_000)
    )
    assert abs(drawn[0] / 20_000 - share) < 0.015


def test_equal_costs_are_drawn_uniformly_at_any_temperature() -> None:
    rng = Random(3)
    drawn = Counter(pick([4.0, 4.0, 4.0], [0, 1, 2].__getitem__, 0.7, rng) for _ in range(9_000))
    assert all(abs(count - 3_000) < 250 for count in drawn.values())


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to choose"):
        pick([], [].__getitem__, 0.0, Random(0))


def test_best_names_the_chosen_first_and_then_the_cheapest() -> None:
    by_index = [float(abs(index - 30)) for index in range(100)]
    recorded = best(by_index, 99)
    assert recorded[0] == 99
    assert set(recorded[1:]) <= set(range(26, 35))
    assert len(recorded) == REASONS_MAX
    assert best([2.0, 1.0], 0) == [0, 1]
    assert len(best([1.0] * 50, 3)) == REASONS_MAX


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-200, 1e-9])
@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300])
def test_a_tiny_temperature_takes_the_lowest(temperature: float, scale: float) -> None:
    """No division by zero and no NaN, where 1 / temperature is infinite."""
    costs_by_index = [3 * scale, scale, 2 * scale]
    rng = Random(1)
    drawn = {pick(costs_by_index, [0, 0, 0].__getitem__, temperature, rng) for _ in range(20)}
    assert drawn == {1}


@pytest.mark.parametrize("temperature", [1e300, 1e308])
def test_a_huge_temperature_is_chance(temperature: float) -> None:
    rng = Random(1)
    assert {pick([0.0, 1e300], [0, 0].__getitem__, temperature, rng) for _ in range(50)} == {0, 1}


def test_two_are_drawn_and_the_less_loaded_goes_first() -> None:
    rng = Random(2)
    assert power_of_two([7], rng) == [0]
    drawn = Counter(tuple(power_of_two([5, 1, 3], rng)) for _ in range(6_000))
    assert set(drawn) == {(1, 0), (1, 2), (2, 0)}, "the better one of every pair"
    assert all(abs(count - 2_000) < 200 for count in drawn.values())
    assert {tuple(power_of_two([4, 4], rng)) for _ in range(50)} == {(0, 1), (1, 0)}


def test_the_least_loaded_by_chance_where_several_are() -> None:
    rng = Random(2)
    drawn = Counter(least_loaded([2, 1, 3, 1], rng) for _ in range(2_000))
    assert set(drawn) == {1, 3}
    assert abs(drawn[1] - 1_000) < 150
