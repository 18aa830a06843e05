"""What the frontend measures, under the peer's names, labels and buckets."""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from eventstore.metrics import Built, Metric, build, full_name
from router.replica import Replica
from workers.card import ModelCard

PREFIX = "dynamo_frontend"

_TTFT_S = (
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
_ITL_S = (0, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2)
_DURATION_S = (0, 1.9, 3.4, 6.3, 12, 22, 40, 75, 140, 260)
_INPUT_TOKENS = (0, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000)
_OUTPUT_TOKENS = (0, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000)
_TOKENIZER_MS = tuple(0.5 * 2**k for k in range(11))
_WORKER = ("worker_id", "dp_rank", "worker_type")

METRICS: tuple[Metric, ...] = (
    Metric("inflight_requests", "gauge", "Requests whose response has not ended.", ("model",)),
    Metric("queued_requests", "gauge", "Requests without a first token yet.", ("model",)),
    Metric("disconnected_clients", "gauge", "Clients that went away; it only grows."),
    Metric(
        "requests_total",
        "counter",
        "Requests by outcome. `unknown_model` stands for every name that is not served.",
        ("model", "endpoint", "request_type", "status", "error_type"),
    ),
    Metric("output_tokens_total", "counter", "Output tokens received.", ("model",)),
    Metric("request_duration_seconds", "histogram", "Whole request.", ("model",), _DURATION_S),
    Metric(
        "time_to_first_token_seconds", "histogram", "From the handler's start.", ("model",), _TTFT_S
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Between two outputs, per token.",
        ("model",),
        _ITL_S,
    ),
    Metric("input_sequence_tokens", "histogram", "Prompt tokens.", ("model",), _INPUT_TOKENS),
    Metric("output_sequence_tokens", "histogram", "Output tokens.", ("model",), _OUTPUT_TOKENS),
    Metric(
        "cached_tokens",
        "histogram",
        "Prompt tokens reused, as workers say.",
        ("model",),
        _INPUT_TOKENS,
    ),
    Metric("tokenizer_latency_ms", "histogram", "In ms.", ("operation",), _TOKENIZER_MS),
    Metric("model_total_kv_blocks", "gauge", "KV blocks of a rank.", ("model",)),
    Metric("model_max_num_seqs", "gauge", "Sequences a rank runs at once.", ("model",)),
    Metric("model_max_num_batched_tokens", "gauge", "Tokens of a step.", ("model",)),
    Metric("model_context_length", "gauge", "Prompt and output tokens at most.", ("model",)),
    Metric("model_kv_cache_block_size", "gauge", "Tokens of a KV block.", ("model",)),
    Metric("model_migration_limit", "gauge", "Times a request may move on.", ("model",)),
    Metric(
        "model_migration_total",
        "counter",
        "Requests that moved on to another worker: new_request before any output, ongoing_request "
        "in the middle of it.",
        ("model", "migration_type"),
    ),
    Metric("worker_active_decode_blocks", "gauge", "Active blocks booked.", _WORKER),
    Metric("worker_active_prefill_tokens", "gauge", "Prefill tokens booked.", _WORKER),
)

UNKNOWN_MODEL = "unknown_model"


class TokenHistogram(Collector):
    """A histogram by model that takes a request's observations in one go.

    Every streamed token is an observation, so it must cost well under a microsecond: the gaps of a
    request are counted into a plain list, which is added here when the request ends.
    """

    def __init__(self, registry: CollectorRegistry, metric: Metric, prefix: str) -> None:
        self._metric = metric
        self._name = full_name(prefix, metric.name)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def add(self, model: str, counts: list[int], total: float) -> None:
        """counts: observations per bucket, +Inf last; total: their sum."""
        mine = self._counts.setdefault(model, [0] * len(counts))
        for index, count in enumerate(counts):
            mine[index] += count
        self._sums[model] = self._sums.get(model, 0.0) + total

    def collect(self) -> Iterator[Family]:
        family = HistogramMetricFamily(self._name, self._metric.help, labels=self._metric.labels)
        bounds = [*(str(float(bound)) for bound in self._metric.buckets), "+Inf"]
        for model, counts in self._counts.items():
            running, buckets = 0, []
            for bound, count in zip(bounds, counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric([model], buckets, self._sums[model])
        yield family


class TokenTimes:
    """The inter-token gaps of one request, counted into buckets."""

    __slots__ = ("counts", "first_s", "last_s", "total_s")

    def __init__(self, now_s: float) -> None:
        self.first_s = now_s
        self.counts = [0] * (len(_ITL_S) + 1)
        self.total_s = 0.0
        self.last_s = now_s

    def tokens(self, now_s: float, count: int) -> None:
        """`count` tokens arrived: each took an equal share of the time since the last ones."""
        gap_s = now_s - self.last_s
        self.last_s = now_s
        self.counts[bisect_left(_ITL_S, gap_s / count)] += count
        self.total_s += gap_s


class FrontendMetrics:
    """The live metrics, with the per-model children looked up once."""

    def __init__(self, registry: CollectorRegistry, prefix: str = PREFIX) -> None:
        itl = next(m for m in METRICS if m.name == "inter_token_latency_seconds")
        self._built = build([m for m in METRICS if m is not itl], registry, prefix=prefix)
        self._itl = TokenHistogram(registry, itl, prefix)
        self._models: dict[str, ModelMetrics] = {}

    def migrated(self, model: str, ongoing: bool) -> None:
        """A request moved on to another worker; ongoing: with output behind it."""
        kind = "ongoing_request" if ongoing else "new_request"
        self._built.counters["model_migration_total"].labels(model, kind).inc()

    def of_model(self, model: str) -> "ModelMetrics":
        """`model`: a served one, or UNKNOWN_MODEL; names that clients make up are not series."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelMetrics(model, self._built, self._itl)
        return known

    def client_disconnected(self) -> None:
        self._built.gauges["disconnected_clients"].inc()

    def tokenizer_took(self, operation: str, duration_s: float) -> None:
        """operation: tokenize or detokenize."""
        self._built.histograms["tokenizer_latency_ms"].labels(operation).observe(duration_s * 1e3)

    def set_card(self, card: ModelCard, migration_limit: int) -> None:
        for name, value in (
            ("total_kv_blocks", card.total_kv_blocks),
            ("max_num_seqs", card.max_num_seqs),
            ("max_num_batched_tokens", card.max_num_batched_tokens),
            ("context_length", card.context_length),
            ("kv_cache_block_size", card.block_size),
            ("migration_limit", migration_limit),
        ):
            if value is not None:
                self._built.gauges[f"model_{name}"].labels(card.name).set(value)

    def collect(self, replica: Replica) -> None:
        """Bring the workers' load gauges up to date; called once a scrape."""
        state = replica.state
        blocks = self._built.gauges["worker_active_decode_blocks"]
        tokens = self._built.gauges["worker_active_prefill_tokens"]
        blocks.clear()
        tokens.clear()
        for rank in state.tree.ranks():
            slot = state.tree.slot_of(rank)
            kind = state.workers[rank.worker_id].worker_type
            labels = (str(rank.worker_id), str(rank.dp_rank), kind)
            blocks.labels(*labels).set(state.active.blocks[slot])
            tokens.labels(*labels).set(state.active.prefill_tokens[slot])


class ModelMetrics:
    """One model's metrics, each already bound to the model's label."""

    def __init__(self, model: str, built: Built, itl: TokenHistogram) -> None:
        self._model = model
        self._requests = built.counters["requests_total"]
        self._outcomes: dict[tuple[str, str, str, str], Counter] = {}
        self._itl = itl
        self.inflight = built.gauges["inflight_requests"].labels(model)
        self.queued = built.gauges["queued_requests"].labels(model)
        self._output_total = built.counters["output_tokens_total"].labels(model)
        self._duration = built.histograms["request_duration_seconds"].labels(model)
        self._ttft = built.histograms["time_to_first_token_seconds"].labels(model)
        self._input = built.histograms["input_sequence_tokens"].labels(model)
        self._output = built.histograms["output_sequence_tokens"].labels(model)
        self._cached = built.histograms["cached_tokens"].labels(model)

    def ended(self, endpoint: str, request_type: str, error_type: str, duration_s: float) -> None:
        """A request was answered. error_type: empty for success."""
        status = "error" if error_type else "success"
        labels = (endpoint, request_type, status, error_type)
        counter = self._outcomes.get(labels)
        if counter is None:
            counter = self._outcomes[labels] = self._requests.labels(self._model, *labels)
        counter.inc()
        self._duration.observe(duration_s)

    def first_token(self, ttft_s: float, isl: int, cached_tokens: int | None) -> None:
        self._ttft.observe(ttft_s)
        self._input.observe(isl)
        if cached_tokens is not None:
            self._cached.observe(cached_tokens)

    def output_ended(self, osl: int, times: TokenTimes | None) -> None:
        """times: None where no token came."""
        self._output_total.inc(osl)
        self._output.observe(osl)
        if times is not None:
            self._itl.add(self._model, times.counts, times.total_s)
