"""The share of each namespace in the requests for a model that several have."""

from hypothesis import given
from hypothesis import strategies as st

from frontend.spread import draw

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
WEIGHTS = st.dictionaries(NAMES, st.integers(0, 1000), min_size=1)
KEYS = st.text(max_size=20)


@given(WEIGHTS, KEYS)
def test_one_of_those_with_a_share_is_drawn_and_always_the_same(
    weights: dict[str, int], key: str
) -> None:
    drawn = draw(weights, key)
    assert weights[drawn] > 0 or not any(weights.values())
    assert draw(dict(reversed(weights.items())), key) == drawn


@given(WEIGHTS, KEYS, NAMES, st.integers(1, 1000))
def test_where_a_share_grows_keys_go_there_and_nowhere_else(
    weights: dict[str, int], key: str, name: str, more: int
) -> None:
    """So a namespace that comes, or gets workers, leaves the sessions of the others together."""
    grown = weights | {name: weights.get(name, 0) + more}
    if any(weights.values()):
        assert draw(grown, key) in (draw(weights, key), name)


def test_shares_are_in_proportion() -> None:
    weights = {"small": 1, "large": 3, "empty": 0}
    drawn = [draw(weights, str(number)) for number in range(8000)]
    assert abs(drawn.count("large") - 6000) < 200
    assert "empty" not in drawn
