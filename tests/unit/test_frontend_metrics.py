"""Metrics that a request adds to in one go, and what is remembered of workers' last requests."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eventstore.metrics import Metric
from frontend import metrics
from frontend.metrics import FrontendMetrics
from indexer.radix import WorkerRank
from router.token_histogram import ITL_S, TokenHistogram, TokenTimes


def page_of(registry: CollectorRegistry) -> list[str]:
    return generate_latest(registry).decode().splitlines()


def test_tokens_of_one_frame_share_the_time_since_the_last_one() -> None:
    times = TokenTimes(10.0)
    assert times.mean_s is None
    times.tokens(10.4, 4)
    times.tokens(12.4, 1)
    assert times.mean_s == pytest.approx(2.4 / 5)
    assert times.counts[ITL_S.index(0.16)] == 4, "0.1 s each"
    assert times.counts[ITL_S.index(2)] == 1
    assert (times.first_s, times.last_s) == (10.0, 12.4)
    assert times.total_s == pytest.approx(2.4)


def test_a_token_histogram_is_one_to_prometheus() -> None:
    registry = CollectorRegistry()
    histogram = TokenHistogram(
        registry, Metric("itl_seconds", "histogram", "Gaps.", ("model",), ITL_S), "my"
    )
    for _ in range(2):
        times = TokenTimes(0.0)
        times.tokens(0.3, 3)
        times.tokens(9.3, 1)
        histogram.add("m", times)
    page = page_of(registry)
    assert "# TYPE my_itl_seconds histogram" in page
    assert 'my_itl_seconds_bucket{le="0.084",model="m"} 0.0' in page
    assert 'my_itl_seconds_bucket{le="0.16",model="m"} 6.0' in page
    assert 'my_itl_seconds_bucket{le="+Inf",model="m"} 8.0' in page
    assert 'my_itl_seconds_count{model="m"} 8.0' in page
    assert 'my_itl_seconds_sum{model="m"} 18.6' in page


def test_of_workers_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frontend that nobody scrapes must not keep every worker that ever served."""
    monkeypatch.setattr(metrics, "RANKS_MAX", 3)
    made = FrontendMetrics(CollectorRegistry())
    for worker_id in range(10):
        made.first_token(WorkerRank(worker_id, 0), 0.1, 5)
        made.output_ended(WorkerRank(worker_id, 0), 0.01)
    assert [rank.worker_id for rank in made._last] == [7, 8, 9]
