"""Laws of the cost in milliseconds: it never falls with load, and learning is exact and safe."""

import math
from random import Random
from typing import NamedTuple

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytest import approx

from router.cost import (
    INTERFERENCE,
    MULTIPLE_MAX,
    MULTIPLE_MIN,
    RESOLUTION,
    SQUARES,
    STEP_MS,
    TOKEN_MS,
    PrefillModel,
    RankLoad,
    observe,
    predict_ms,
    time_costs,
)

counts = st.integers(0, 200_000)
batches = st.integers(1, 20_000)
multiples = st.floats(MULTIPLE_MIN, MULTIPLE_MAX)
models = st.builds(
    lambda batch_tokens, s, t: PrefillModel(batch_tokens, STEP_MS * s, TOKEN_MS * t),
    batches,
    multiples,
    multiples,
)


def engine_ms(tokens: int, batch_tokens: int, step_ms: float, token_ms: float) -> float:
    """Step by step, each as long as its tokens make it."""
    total = 0.0
    while tokens > 0:
        step = min(tokens, batch_tokens)
        total += step_ms + token_ms * (step + SQUARES * step * step)
        tokens -= step
    return total


class Rank(NamedTuple):
    """An item of each of `RankLoad`'s columns."""

    ahead: int = 0
    new: int = 0
    running: int = 0
    active: int = 0
    grown: int = 0
    total: float = math.inf


ranks = st.builds(
    Rank,
    counts,
    counts,
    st.integers(0, 500),
    st.integers(0, 20_000),
    st.integers(0, 3_000),
    st.one_of(st.integers(1, 100_000), st.just(math.inf)),
)


def cost_of(model: PrefillModel, rank: Rank, interference: float = INTERFERENCE) -> float:
    """Of a rank that is the only one, so that its cost is nowhere near another's."""
    columns = [[each] for each in rank]
    [cost] = time_costs([model], RankLoad(*columns), interference)  # type: ignore[arg-type]
    return cost


@given(models, ranks, st.floats(0, 2), st.integers(1, 10_000))
def test_cost_never_falls_with_load(
    model: PrefillModel, rank: Rank, interference: float, more: int
) -> None:
    cost = cost_of(model, rank, interference)
    assert 0 < predict_ms(model, rank.ahead + rank.new) <= cost * (1 + 1e-12)
    for name in ("ahead", "new", "running", "active", "grown"):
        higher = rank._replace(**{name: getattr(rank, name) + more})
        assert cost_of(model, higher, interference) >= cost * (1 - 1e-12)


@given(models, counts, counts)
def test_where_nothing_runs_the_cost_is_the_time_to_the_first_token(
    model: PrefillModel, ahead: int, new: int
) -> None:
    assert cost_of(model, Rank(ahead, new)) == predict_ms(model, ahead + new)


@given(st.lists(st.tuples(models, ranks), max_size=12))
def test_costs_near_the_lowest_are_the_lowest_and_all_others_their_own(
    drawn: list[tuple[PrefillModel, Rank]],
) -> None:
    columns = [list(column) for column in zip(*(rank for _, rank in drawn), strict=True)]
    load = RankLoad(*(columns or [[]] * len(Rank._fields)))
    found = time_costs([model for model, _ in drawn], load)
    alone = [cost_of(model, rank) for model, rank in drawn]
    lowest = min(alone, default=0.0)
    assert found == [lowest if each <= lowest * (1 + RESOLUTION) else each for each in alone]


@given(models, st.integers(0, 100_000))
def test_a_prediction_is_the_sum_over_the_steps(model: PrefillModel, tokens: int) -> None:
    assume(tokens < 1_000 * model.batch_tokens)
    step_by_step = engine_ms(max(1, tokens), model.batch_tokens, model.step_ms, model.token_ms)
    assert predict_ms(model, tokens) == approx(step_by_step)


@given(
    multiples=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)),
    batch_tokens=st.sampled_from([2_048, 8_192]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=25)
def test_learning_finds_the_engine(
    multiples: tuple[float, float], batch_tokens: int, seed: int
) -> None:
    """From short and long prompts: both coefficients, and with them every prediction."""
    rng = Random(seed)
    step_ms, token_ms = STEP_MS * multiples[0], TOKEN_MS * multiples[1]
    model = PrefillModel(batch_tokens)
    for _ in range(1_500):
        tokens = int(10 ** rng.uniform(0, 4.5))
        observe(model, tokens, engine_ms(tokens, batch_tokens, step_ms, token_ms))
    # The preferences pull a little, the more the farther apart the two multiples are.
    slack = 0.01 * max(multiples) / min(multiples)
    assert model.step_ms == approx(step_ms, rel=0.02 + slack)
    assert model.token_ms == approx(token_ms, rel=0.02 + slack)
    for tokens in (1, 100, 1_000, 10_000, 100_000):
        truth = engine_ms(tokens, batch_tokens, step_ms, token_ms)
        assert predict_ms(model, tokens) == approx(truth, rel=0.02 + slack)


@given(multiple=st.floats(0.1, 10), seed=st.integers(0, 1_000))
@settings(max_examples=25)
def test_an_engine_that_is_just_faster_is_known_soon(multiple: float, seed: int) -> None:
    """From prompts of one length, and to within a factor of two for any other length."""
    rng = Random(seed)
    model = PrefillModel()
    tokens = rng.randrange(1, 30_000)
    for _ in range(100):
        truth = engine_ms(tokens, 8_192, STEP_MS * multiple, TOKEN_MS * multiple)
        observe(model, tokens, truth)
    for other in (1, 1_000, 50_000):
        truth = engine_ms(other, 8_192, STEP_MS * multiple, TOKEN_MS * multiple)
        assert truth / 2 < predict_ms(model, other) < truth * 2


@given(
    multiple=st.floats(0.05, 20),
    outlier=st.sampled_from([0.0, 0.01, 100.0, 1e9, math.inf]),
    tokens=st.integers(1, 100_000),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=25)
def test_one_outlier_moves_little(multiple: float, outlier: float, tokens: int, seed: int) -> None:
    rng = Random(seed)
    model = PrefillModel()
    for _ in range(500):
        usual = int(10 ** rng.uniform(0, 4.5))
        observe(model, usual, engine_ms(usual, 8_192, STEP_MS * multiple, TOKEN_MS * multiple))
    lengths = (1, 1_000, 50_000)
    before = [predict_ms(model, length) for length in lengths]
    observe(model, tokens, outlier * predict_ms(model, tokens))
    assert [predict_ms(model, length) for length in lengths] == approx(before, rel=0.02)


observations = st.lists(
    st.tuples(
        st.one_of(st.integers(-1, 20_000), st.integers(-(2**64), 2**64)),
        st.one_of(st.floats(0, 10_000), st.floats()),
    ),
    max_size=40,
)


@given(observations, batches)
def test_whatever_is_observed(history: list[tuple[int, float]], batch_tokens: int) -> None:
    """Coefficients stay within bounds, and equal observations give equal bytes, also by way of
    bytes in between."""
    model, other = PrefillModel(batch_tokens), PrefillModel(batch_tokens)
    for tokens, ttft_ms in history:
        observe(model, tokens, ttft_ms)
        observe(other, tokens, ttft_ms)
        other = msgspec.msgpack.decode(msgspec.msgpack.encode(other), type=PrefillModel)
        assert MULTIPLE_MIN <= model.step_ms / STEP_MS * (1 + 1e-9)
        assert MULTIPLE_MIN <= model.token_ms / TOKEN_MS * (1 + 1e-9)
        assert model.step_ms / STEP_MS <= MULTIPLE_MAX * (1 + 1e-9)
        assert model.token_ms / TOKEN_MS <= MULTIPLE_MAX * (1 + 1e-9)
        assert all(map(math.isfinite, (model.deviation, *model.moments)))
    assert msgspec.msgpack.encode(model) == msgspec.msgpack.encode(other)
