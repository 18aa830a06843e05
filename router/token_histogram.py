"""Latencies and lengths of requests: the peer's buckets, and a histogram that tokens can afford.

Both of the peer's sets of request metrics, its frontend's and its router's, have these buckets.
"""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from eventstore.metrics import Metric, full_name

TTFT_S = (
    0,
    0.0022,
    0.0047,
    0.01,
    0.022,
    0.047,
    0.1,
    0.22,
    0.47,
    1,
    2.2,
    4.7,
    10,
    22,
    48,
    100,
    220,
    480,
)
ITL_S = (0, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2)
INPUT_TOKENS = (0, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000)
OUTPUT_TOKENS = (0, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000)


class TokenTimes:
    """The inter-token gaps of one request, counted into buckets."""

    __slots__ = ("counts", "first_s", "last_s", "total_s")

    def __init__(self, now_s: float) -> None:
        self.first_s = now_s
        self.counts = [0] * (len(ITL_S) + 1)
        self.total_s = 0.0
        self.last_s = now_s

    def tokens(self, now_s: float, count: int) -> None:
        """`count` tokens arrived: each took an equal share of the time since the last ones."""
        gap_s = now_s - self.last_s
        self.last_s = now_s
        self.counts[bisect_left(ITL_S, gap_s / count)] += count
        self.total_s += gap_s

    @property
    def mean_s(self) -> float | None:
        """The mean gap; None before the second token."""
        gaps = sum(self.counts)
        return self.total_s / gaps if gaps else None


class TokenHistogram(Collector):
    """A histogram with one label that takes a request's observations in one go.

    Every streamed token is an observation, so it must cost well under a microsecond: the gaps of a
    request are counted into a plain list, which is added here when the request ends.
    """

    def __init__(self, registry: CollectorRegistry, metric: Metric, prefix: str = "") -> None:
        self._metric = metric
        self._name = full_name(prefix, metric.name)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def add(self, label: str, times: TokenTimes) -> None:
        """The gaps of a request that has ended."""
        counts = self._counts.setdefault(label, [0] * len(times.counts))
        for index, count in enumerate(times.counts):
            counts[index] += count
        self._sums[label] = self._sums.get(label, 0.0) + times.total_s

    def collect(self) -> Iterator[Family]:
        family = HistogramMetricFamily(self._name, self._metric.help, labels=self._metric.labels)
        bounds = [*(str(float(bound)) for bound in self._metric.buckets), "+Inf"]
        for label, counts in self._counts.items():
            running, buckets = 0, []
            for bound, count in zip(bounds, counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric([label], buckets, self._sums[label])
        yield family
