"""Which roles a model lacks."""

import pytest

from frontend.disaggregation import Disaggregation

A, P, D = "aggregated", "prefill", "decode"


@pytest.mark.parametrize(
    ("counting", "listed", "missing", "missing_with_fallback"),
    [
        ({A}, {A}, (), ()),
        ({P, D}, {P, D}, (), ()),
        ({D}, {D}, (P,), ()),
        ({D}, {P, D}, (P,), ()),
        ({P}, {P}, (D,), (D,)),
        ({A, P}, {A, P}, (), ()),
        (set(), {A}, (A,), (A,)),
        (set(), set(), (A,), (A,)),
        (set(), {P}, (P, D), (D,)),
        (set(), {P, D}, (P, D), (D,)),
        ({P}, {A, P}, (D,), (D,)),
    ],
)
def test_missing_roles(
    counting: set[str],
    listed: set[str],
    missing: tuple[str, ...],
    missing_with_fallback: tuple[str, ...],
) -> None:
    counts = counting.__contains__
    assert Disaggregation().missing_roles(counts, lambda: listed) == missing
    with_fallback = Disaggregation(decode_fallback=True)
    assert with_fallback.missing_roles(counts, lambda: listed) == missing_with_fallback
