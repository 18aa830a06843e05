"""The cost in milliseconds by example: the priors, batches, interference, learning, bad input."""

import math

import msgspec
import pytest
from pytest import approx

from router.cost import PrefillModel, observe, predict_ms, time_costs
from workers.timing import TimingModel


@pytest.mark.parametrize("tokens", [1, 100, 8_192])
def test_before_anything_is_learned_a_step_is_the_mock_engines(tokens: int) -> None:
    assert predict_ms(PrefillModel(), tokens) == approx(TimingModel().prefill_ms(tokens))


def test_more_than_a_batch_takes_more_steps() -> None:
    step_ms = TimingModel().prefill_ms
    assert predict_ms(PrefillModel(), 8_193) == approx(step_ms(8_192) + step_ms(1))
    assert predict_ms(PrefillModel(1_000), 2_500) == approx(2 * step_ms(1_000) + step_ms(500))
    assert predict_ms(PrefillModel(1_000), 2_000) == approx(2 * step_ms(1_000))


def test_a_cached_prompt_still_takes_a_step() -> None:
    assert predict_ms(PrefillModel(), 0) == predict_ms(PrefillModel(), 1) > 16
    assert time_costs([PrefillModel()], [0], [0], [5]) == [predict_ms(PrefillModel(), 1)]


def test_cost_of_each_rank() -> None:
    """Idle and nothing cached; idle and cached; cached but behind others; cached but decoding."""
    model = PrefillModel()
    costs = time_costs([model] * 4, [0, 0, 9_000, 0], [4_000, 500, 500, 500], [0, 0, 0, 100])
    assert costs[:3] == [predict_ms(model, tokens) for tokens in (4_000, 500, 9_500)]
    assert costs[3] == approx(predict_ms(model, 500) + 0.3 * 100 * 500 * model.token_ms)
    assert costs[1] < costs[0] < costs[2]
    no_interference = time_costs([model] * 2, [0, 0], [500, 500], [0, 100], 0.0)
    assert no_interference[0] == no_interference[1]


def test_columns_of_unequal_length() -> None:
    with pytest.raises(ValueError):
        time_costs([PrefillModel()], [0], [1, 2], [0])


def test_learning_from_a_faster_engine() -> None:
    model = PrefillModel()
    engine = TimingModel(speedup=10)
    for turn in range(200):
        tokens = 37 * turn % 4_000 + 1
        observe(model, tokens, engine.prefill_ms(tokens))
    for tokens in (10, 1_000, 8_000):
        assert predict_ms(model, tokens) == approx(engine.prefill_ms(tokens), rel=0.05)
    assert model.deviation < 0.05


def test_it_learns_anew_when_the_engine_changes() -> None:
    model = PrefillModel()
    for speedup in (10, 1):
        engine = TimingModel(speedup)
        for turn in range(1_000):
            tokens = 37 * turn % 4_000 + 1
            observe(model, tokens, engine.prefill_ms(tokens))
        assert predict_ms(model, 2_000) == approx(engine.prefill_ms(2_000), rel=0.05)


def test_an_engine_without_a_quadratic_term() -> None:
    model = PrefillModel()
    for turn in range(500):
        tokens = 3_701 * turn % 40_000 + 1
        observe(model, tokens, 20 * math.ceil(tokens / 8_192) + 0.02 * tokens)
    for tokens in (500, 4_000, 8_192, 30_000):
        truth = 20 * math.ceil(tokens / 8_192) + 0.02 * tokens
        assert predict_ms(model, tokens) == approx(truth, rel=0.1)


@pytest.mark.parametrize("ttft_ms", [math.nan, -1.0, -math.inf])
def test_a_time_that_is_none_teaches_nothing(ttft_ms: float) -> None:
    model = PrefillModel()
    observe(model, 100, ttft_ms)
    assert model == PrefillModel()


@pytest.mark.parametrize("batch_tokens", [0, -1])
def test_a_batch_that_is_none(batch_tokens: int) -> None:
    with pytest.raises(ValueError):
        PrefillModel(batch_tokens)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([batch_tokens]), type=PrefillModel)
