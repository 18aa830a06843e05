"""Several registries as one text."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from frontend.exposition import Merged


def registry(count: int) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("asked_total", "Help.", ["model"], registry=made).labels("m").inc(count)
    Histogram("took_seconds", "Help.", buckets=(1,), registry=made).observe(count)
    return made


def test_each_sample_tells_its_namespace_and_each_family_stands_once() -> None:
    together = CollectorRegistry()
    together.register(Merged(registry(1), {"a": registry(2), "b": registry(3)}))
    text = generate_latest(together).decode()
    assert text.count("# TYPE asked_total counter") == 1
    assert 'asked_total{model="m"} 1.0' in text
    assert 'asked_total{dynamo_namespace="a",model="m"} 2.0' in text
    assert 'asked_total{dynamo_namespace="b",model="m"} 3.0' in text
    assert 'took_seconds_bucket{dynamo_namespace="b",le="+Inf"} 1.0' in text
    assert text.count("# TYPE took_seconds histogram") == 1
