"""What a run of requests comes to in numbers."""

import json
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulations.report import Outcome, percentile, spread_ms, summarize, table

SAMPLES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("sample", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 90, 4.6),
        ([0.0, 10.0], 0, 0.0),
        ([0.0, 10.0], 100, 10.0),
    ],
)
def test_a_percentile_lies_between_ranks_linearly(
    sample: list[float], percent: float, expected: float
) -> None:
    assert percentile(sample, percent) == pytest.approx(expected)


@given(SAMPLES, st.floats(0, 100), st.floats(0, 100))
def test_percentiles_ascend_and_stay_within_the_sample(
    sample: list[float], one: float, other: float
) -> None:
    ordered = sorted(sample)
    low, high = percentile(ordered, min(one, other)), percentile(ordered, max(one, other))
    slack = 1e-9 * ordered[-1]  # an interpolation may round up
    assert ordered[0] - slack <= low <= high + slack <= ordered[-1] + 2 * slack


def test_an_empty_sample_has_no_percentiles() -> None:
    spread = spread_ms([])
    assert (spread.p50, spread.p90, spread.p99, spread.mean) == (None, None, None, None)


def test_a_spread_is_in_milliseconds() -> None:
    spread = spread_ms([0.003, 0.001, 0.002])
    assert (spread.p50, spread.mean) == (2.0, 2.0)


def answered(**changes: object) -> Outcome:
    fields: dict[str, object] = {
        "url": "http://a",
        "send_lag_s": 0.0,
        "ttft_s": 0.1,
        "latency_s": 0.5,
        "output_tokens": 5,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "predicted_cached_tokens": 48,
        "worker": "00000000000000aa.0",
    }
    return Outcome(**{**fields, **changes})  # type: ignore[arg-type]


FAILED = Outcome(url="http://b", send_lag_s=2.0, prompt_tokens=100, error="http_503_overloaded")


def test_the_token_gap_of_a_request_does_not_count_its_first_token() -> None:
    assert answered(ttft_s=0.1, latency_s=0.5, output_tokens=5).itl_s == pytest.approx(0.1)


@pytest.mark.parametrize("changes", [{"output_tokens": 1}, {"ttft_s": None, "latency_s": None}])
def test_a_request_without_a_second_token_has_no_token_gap(changes: dict[str, object]) -> None:
    assert answered(**changes).itl_s is None


def test_failed_requests_count_as_errors_and_in_no_time_or_share() -> None:
    report = summarize([answered(), FAILED], [0.1, 0.3], elapsed_s=2.0, unfinished=3)
    assert (report.requests, report.errors, report.unfinished) == (2, 1, 3)
    assert report.errors_by_kind == {"http_503_overloaded": 1}
    assert report.ttft_ms.p99 == 100.0
    assert report.cached_share_reported == 0.64
    assert report.cached_share_predicted == 0.48
    assert report.output_tokens_per_s == 2.5
    assert report.frame_gap_ms.mean == 200.0
    assert report.send_lag_ms.mean == 1000.0
    assert report.requests_by_url == {"http://a": 1, "http://b": 1}
    assert report.requests_by_worker == {"00000000000000aa.0": 1}


def test_a_share_is_unknown_only_if_no_answer_told() -> None:
    silent = answered(cached_tokens=None, predicted_cached_tokens=None)
    nobody = summarize([silent], [], elapsed_s=1.0)
    assert (nobody.cached_share_reported, nobody.cached_share_predicted) == (None, None)
    one = summarize([silent, answered()], [], elapsed_s=1.0)
    assert (one.cached_share_reported, one.cached_share_predicted) == (0.32, 0.24)


def test_a_run_without_requests_has_a_report() -> None:
    report = summarize([], [], elapsed_s=0.0)
    assert (report.requests, report.errors, report.output_tokens_per_s) == (0, 0, 0.0)


def test_the_json_form_is_one_line_with_the_promised_keys() -> None:
    text = summarize([answered()], [], elapsed_s=1.0).to_json()
    assert "\n" not in text
    decoded = json.loads(text)
    for key in ("ttft_ms", "itl_ms", "latency_ms"):
        assert decoded[key].keys() >= {"p50", "p90", "p99"}
    assert decoded.keys() >= {
        "requests",
        "errors",
        "output_tokens_per_s",
        "cached_share_reported",
        "cached_share_predicted",
    }


def test_the_table_names_every_error_and_fits_a_narrow_terminal() -> None:
    out = StringIO()
    Console(file=out, width=72).print(table(summarize([answered(), FAILED], [], elapsed_s=2.0)))
    text = out.getvalue()
    assert "2 requests, 1 errors" in text
    assert "error http_503_overloaded" in text
    assert "64.0 %" in text and "48.0 %" in text
    assert max(map(len, text.splitlines())) <= 72
