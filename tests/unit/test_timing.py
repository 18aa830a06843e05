"""The timing model against its measured coefficients."""

import pytest

from workers.timing import TimingModel


@pytest.mark.parametrize(
    ("new_tokens", "expected_ms"),
    [(1, 16.51660386), (1_000, 32.1058489), (8_192, 169.136918)],
)
def test_prefill_follows_the_measured_parabola(new_tokens: int, expected_ms: float) -> None:
    assert TimingModel().prefill_ms(new_tokens) == pytest.approx(expected_ms, rel=1e-6)


@pytest.mark.parametrize(("active_ratio", "expected_ms"), [(0, 5.74), (0.5, 26.31), (1, 34.01)])
def test_decode_follows_the_measured_parabola(active_ratio: float, expected_ms: float) -> None:
    assert TimingModel().decode_ms(active_ratio) == pytest.approx(expected_ms)


def test_a_step_costs_what_it_does() -> None:
    timing = TimingModel()
    assert timing.step_ms(100, None) == timing.prefill_ms(100)
    assert timing.step_ms(0, 0.25) == timing.decode_ms(0.25)
    assert timing.step_ms(100, 0.25) == timing.prefill_ms(100) + timing.decode_ms(0.25)


def test_speedup_divides_everything() -> None:
    assert TimingModel(speedup=10).step_ms(100, 0.25) == pytest.approx(
        TimingModel().step_ms(100, 0.25) / 10
    )


def test_a_transfer_takes_its_bits_over_the_speed_of_the_link() -> None:
    # A gigabyte, at 400 gigabits a second: a 50th of a second.
    timing = TimingModel(kv_bytes_per_token=1_000_000)
    assert timing.transfer_ms(1_000) == pytest.approx(20)
    assert timing.transfer_ms(0) == 0
    assert TimingModel(2, 1_000_000, 100).transfer_ms(1_000) == pytest.approx(40)


@pytest.mark.parametrize("speedup", [0, -1, float("nan")])
def test_speedup_is_above_zero(speedup: float) -> None:
    with pytest.raises(ValueError, match="speedup"):
        TimingModel(speedup)
