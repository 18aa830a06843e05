"""Metrics are declared as data and made in a registry of the caller's."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eventstore.metrics import Metric, build, full_name

METRICS = (
    Metric("requests_total", "counter", "Requests.", ("model",)),
    Metric("inflight", "gauge", "Now."),
    Metric("duration_seconds", "histogram", "How long.", (), (0.1, 1.0)),
)


def test_what_is_built_is_what_is_shown() -> None:
    registry = CollectorRegistry()
    built = build(METRICS, registry, prefix="my-app")
    built.counters["requests_total"].labels("m").inc()
    built.gauges["inflight"].set(3)
    built.histograms["duration_seconds"].observe(0.5)
    page = generate_latest(registry).decode()
    assert 'my_app_requests_total{model="m"} 1.0' in page
    assert "my_app_inflight 3.0" in page
    assert 'my_app_duration_seconds_bucket{le="0.1"} 0.0' in page
    assert 'my_app_duration_seconds_bucket{le="1.0"} 1.0' in page
    assert 'my_app_duration_seconds_bucket{le="+Inf"} 1.0' in page


def test_two_sets_live_in_one_process_but_not_in_one_registry() -> None:
    registry = CollectorRegistry()
    build(METRICS, registry)
    build(METRICS, CollectorRegistry())
    with pytest.raises(ValueError, match="uplicated"):
        build(METRICS, registry)


@pytest.mark.parametrize(
    ("prefix", "full"),
    [("", "x"), ("dynamo_frontend", "dynamo_frontend_x"), ("a-b.c", "a_b_c_x"), ("1a", "_1a_x")],
)
def test_prefixes_are_cleaned(prefix: str, full: str) -> None:
    assert full_name(prefix, "x") == full


@pytest.mark.parametrize(
    ("name", "kind", "buckets"),
    [
        ("requests", "counter", ()),
        ("seconds", "histogram", ()),
        ("seconds", "gauge", (1.0,)),
        ("seconds", "histogram", (2.0, 1.0)),
        ("seconds", "histogram", (1.0, 1.0)),
    ],
)
def test_wrong_declarations(name: str, kind: str, buckets: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=name):
        Metric(name, kind, "", (), buckets)  # type: ignore[arg-type]
