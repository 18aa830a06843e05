"""The cost in milliseconds by example: the priors, batches, interference, learning, bad input."""

import math
from collections.abc import Sequence

import msgspec
import pytest
from pytest import approx

from router.cost import PrefillModel, RankLoad, observe, predict_ms, time_costs
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


def load(
    ahead: Sequence[int] = (0, 0),
    new: Sequence[int] = (0, 0),
    running: Sequence[int] = (0, 0),
    active: Sequence[int] = (0, 0),
    grown: Sequence[int] = (0, 0),
    total: Sequence[float] = (math.inf, math.inf),
) -> RankLoad:
    """Of two ranks, idle where nothing else is said."""
    return RankLoad(ahead, new, running, active, grown, total)


TWO = [PrefillModel(), PrefillModel()]


def test_what_is_cached_there_and_what_is_ahead_there() -> None:
    costs = time_costs(TWO, load(ahead=(0, 9_000), new=(4_000, 500)))
    assert costs == [predict_ms(TWO[0], 4_000), predict_ms(TWO[0], 9_500)]


def test_those_beside_it_wait_for_its_prefill() -> None:
    idle, beside = time_costs(TWO, load(new=(500, 500), running=(0, 100)))
    assert beside - idle == approx(0.3 * 100 * (TWO[0].step_ms + 500 * TWO[0].token_ms))
    assert len(set(time_costs(TWO, load(new=(500, 500), running=(0, 100)), 0.0))) == 1


def test_its_blocks_make_every_decode_step_longer() -> None:
    """By what the timing of the engine says of so small a share of its cache, for 100 steps."""
    engine = TimingModel()
    per_block = engine.decode_ms(1e-6) - engine.decode_ms(0)
    per_block *= 1e6 / 16_384
    few, many = time_costs(TWO, load(running=(1, 10), grown=(90, 90), total=(16_384, 16_384)))
    beside = 0.3 * 9 * TWO[0].step_ms
    assert many - few - beside == approx(0.3 * 100 * 9 * 90 * per_block, rel=1e-4)
    empty, full = time_costs(TWO, load(active=(0, 8_000), total=(16_384, 16_384)))
    assert full - empty == approx(0.3 * 100 / 3 * 8_000 * per_block, rel=1e-4)


def test_a_slower_engine_is_slower_in_every_term() -> None:
    slow = PrefillModel(step_ms=2 * TWO[0].step_ms, token_ms=2 * TWO[0].token_ms)
    both = load((100, 100), (500, 500), (7, 7), (300, 300), (9, 9), (1_000, 1_000))
    fast_ms, slow_ms = time_costs([TWO[0], slow], both)
    assert slow_ms == approx(2 * fast_ms)


def test_equal_engines_that_learned_a_little_differently_stay_equal() -> None:
    other = PrefillModel(step_ms=1.01 * TWO[0].step_ms, token_ms=1.01 * TWO[0].token_ms)
    assert len(set(time_costs([TWO[0], other], load(new=(500, 500))))) == 1
    assert len(set(time_costs([TWO[0], other], load(new=(500, 600))))) == 2


def test_columns_of_unequal_length() -> None:
    with pytest.raises(ValueError):
        time_costs(TWO, load(new=(1,)))


def test_no_ranks() -> None:
    assert time_costs([], load((), (), (), (), (), ())) == []


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
