"""Prometheus metrics, declared as data: what `/metrics` shows and the docs list is one table.

A module that measures declares `METRICS: tuple[Metric, ...]` and, where all of its names share one,
`PREFIX: str`; `build` makes the live objects in a registry of the caller's. There is no global
registry, so that two replicas can live in one process.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


class Metric(Struct, frozen=True):
    """One metric.

    Raises ValueError for a counter whose name does not end in `_total` (the client library adds
    it), and unless exactly the histograms have buckets.
    """

    name: str
    """Without the prefix."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, rising; +Inf is added."""

    def __post_init__(self) -> None:
        if self.kind == "counter" and not self.name.endswith("_total"):
            raise ValueError(f"{self.name}: a counter's name ends in _total")
        if (self.kind == "histogram") != bool(self.buckets):
            raise ValueError(f"{self.name}: exactly the histograms have buckets")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"{self.name}: buckets do not rise")


class Built(Struct, frozen=True):
    """The live metrics, each under its declared name."""

    counters: Mapping[str, Counter]
    gauges: Mapping[str, Gauge]
    histograms: Mapping[str, Histogram]


def build(metrics: Sequence[Metric], registry: CollectorRegistry, *, prefix: str = "") -> Built:
    """Make `metrics` in `registry`. Raises ValueError for a name that the registry already has."""
    counters: dict[str, Counter] = {}
    gauges: dict[str, Gauge] = {}
    histograms: dict[str, Histogram] = {}
    for each in metrics:
        name = full_name(prefix, each.name)
        match each.kind:
            case "counter":
                counters[each.name] = Counter(name, each.help, each.labels, registry=registry)
            case "gauge":
                gauges[each.name] = Gauge(name, each.help, each.labels, registry=registry)
            case "histogram":
                histograms[each.name] = Histogram(
                    name, each.help, each.labels, registry=registry, buckets=each.buckets
                )
    return Built(counters, gauges, histograms)


def full_name(prefix: str, name: str) -> str:
    """`prefix_name`, with `_` for what Prometheus does not allow in a name; `name` if no prefix."""
    cleaned = re.sub(r"[^a-zA-Z0-9_:]", "_", prefix)
    if cleaned[:1].isdigit():
        cleaned = f"_{cleaned}"
    return f"{cleaned}_{name}" if cleaned else name


METRICS: tuple[Metric, ...] = (
    Metric("reckon_nats_connected", "gauge", "1 while the connection to NATS stands."),
    Metric("reckon_nats_disconnects_total", "counter", "Times that it was lost."),
    Metric("reckon_nats_reconnects_total", "counter", "Times that it came back."),
    Metric(
        "reckon_nats_errors_total",
        "counter",
        "Errors of the connection, each failed attempt to reconnect included.",
    ),
    Metric(
        "reckon_nats_denials_total", "counter", "What the server did not permit this account to do."
    ),
)
"""Of the connection to NATS, which all namespaces share."""


class ConnectionFacts(Protocol):
    """What `eventstore.connect.Nats` knows of itself."""

    disconnects: int
    reconnects: int
    errors: int
    denials: int

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""


class ConnectionMetrics(Collector):
    """Reads the facts at every scrape."""

    def __init__(self, connection: ConnectionFacts) -> None:
        self._connection = connection

    def collect(self) -> Iterator[Family]:
        facts = self._connection
        values = (facts.connected, facts.disconnects, facts.reconnects, facts.errors, facts.denials)
        for metric, value in zip(METRICS, values, strict=True):
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            yield kind(metric.name, metric.help, value=value)
