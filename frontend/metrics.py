"""What the frontend measures, under the peer's names, labels and buckets."""

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter

from eventstore.metrics import Built, Metric, build
from indexer.radix import WorkerRank
from router.parking import Parking
from router.replica import Replica
from router.token_histogram import (
    INPUT_TOKENS,
    ITL_S,
    OUTPUT_TOKENS,
    TTFT_S,
    TokenHistogram,
    TokenTimes,
)
from workers.card import ModelCard

PREFIX = "dynamo_frontend"

_DURATION_S = (0, 1.9, 3.4, 6.3, 12, 22, 40, 75, 140, 260)
_TOKENIZER_MS = tuple(0.5 * 2**k for k in range(11))
_WORKER = ("worker_id", "dp_rank", "worker_type")
_QUEUE = ("model", "worker_type", "policy_class")
POLICY_CLASS = "default"
"""The peer can have several queues of a model. Here there is one."""
RANKS_MAX = 4096
"""Ranks of which the last request is remembered; `collect` forgets those that left."""

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
        "time_to_first_token_seconds", "histogram", "From the handler's start.", ("model",), TTFT_S
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Between two outputs, per token.",
        ("model",),
        ITL_S,
    ),
    Metric("input_sequence_tokens", "histogram", "Prompt tokens.", ("model",), INPUT_TOKENS),
    Metric("output_sequence_tokens", "histogram", "Output tokens.", ("model",), OUTPUT_TOKENS),
    Metric(
        "cached_tokens",
        "histogram",
        "Prompt tokens reused, as workers say.",
        ("model",),
        INPUT_TOKENS,
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
    Metric(
        "model_rejection_total",
        "counter",
        "Requests refused because the workers are busy.",
        ("endpoint", "model"),
    ),
    Metric("worker_active_decode_blocks", "gauge", "Active blocks booked.", _WORKER),
    Metric("worker_active_prefill_tokens", "gauge", "Prefill tokens booked.", _WORKER),
    Metric(
        "worker_last_time_to_first_token_seconds",
        "gauge",
        "From the handler's start, of the last request whose prompt the rank computed for this "
        "frontend.",
        _WORKER,
    ),
    Metric("worker_last_input_sequence_tokens", "gauge", "Prompt tokens of that one.", _WORKER),
    Metric(
        "worker_last_inter_token_latency_seconds",
        "gauge",
        "Mean over the last request of this frontend that ended on the rank.",
        _WORKER,
    ),
    Metric("router_queue_pending_requests", "gauge", "Requests that wait in the queue.", _QUEUE),
    Metric("router_queue_pending_isl_tokens", "gauge", "Tokens of their prompts.", _QUEUE),
    Metric(
        "router_queue_pending_cached_tokens",
        "gauge",
        "Those of them that the best worker had when the request came.",
        _QUEUE,
    ),
    Metric(
        "router_queue_backpressure_total",
        "counter",
        "Requests refused at a bound of the queue: request_limit, for its length, or wait_limit.",
        (*_QUEUE, "reason"),
    ),
)

UNKNOWN_MODEL = "unknown_model"


class FrontendMetrics:
    """The live metrics, with the per-model children looked up once."""

    def __init__(self, registry: CollectorRegistry, prefix: str = PREFIX) -> None:
        itl = next(m for m in METRICS if m.name == "inter_token_latency_seconds")
        self._built = build([m for m in METRICS if m is not itl], registry, prefix=prefix)
        self._itl = TokenHistogram(registry, itl, prefix)
        self._models: dict[str, ModelMetrics] = {}
        self._last: dict[WorkerRank, _Last] = {}
        self._refused: dict[tuple[str, str, str], int] = {}

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

    def first_token(self, rank: WorkerRank, ttft_s: float, isl: int) -> None:
        """The rank has computed a prompt."""
        last = self._last_of(rank)
        last.ttft_s, last.isl = ttft_s, isl

    def output_ended(self, rank: WorkerRank, itl_s: float) -> None:
        """A request has ended on the rank. itl_s: the mean of its inter-token gaps."""
        self._last_of(rank).itl_s = itl_s

    def _last_of(self, rank: WorkerRank) -> "_Last":
        last = self._last.get(rank)
        if last is None:
            if len(self._last) >= RANKS_MAX:
                del self._last[next(iter(self._last))]
            last = self._last[rank] = _Last()
        return last

    def collect(self, replica: Replica, parking: Parking) -> None:
        """Bring the gauges of the workers and the queues up to date; called once a scrape."""
        self._collect_workers(replica)
        self._collect_queues(parking)

    def _collect_workers(self, replica: Replica) -> None:
        state, gauges = replica.state, self._built.gauges
        for name in gauges:
            if name.startswith("worker_"):
                gauges[name].clear()
        before, self._last = self._last, {}
        for rank in state.tree.ranks():
            slot = state.tree.slot_of(rank)
            kind = state.workers[rank.worker_id].worker_type
            labels = (str(rank.worker_id), str(rank.dp_rank), kind)
            values: dict[str, float | None] = {
                "active_decode_blocks": state.active.blocks[slot],
                "active_prefill_tokens": state.active.prefill_tokens[slot],
            }
            last = before.get(rank)
            if last is not None:
                self._last[rank] = last
                values["last_time_to_first_token_seconds"] = last.ttft_s
                values["last_input_sequence_tokens"] = last.isl
                values["last_inter_token_latency_seconds"] = last.itl_s
            for name, value in values.items():
                if value is not None:
                    gauges[f"worker_{name}"].labels(*labels).set(value)

    def _collect_queues(self, parking: Parking) -> None:
        gauges = self._built.gauges
        for (model, role), queue in parking.queues.items():
            labels = (model, role, POLICY_CLASS)
            gauges["router_queue_pending_requests"].labels(*labels).set(len(queue))
            gauges["router_queue_pending_isl_tokens"].labels(*labels).set(queue.isl_tokens)
            gauges["router_queue_pending_cached_tokens"].labels(*labels).set(queue.cached_tokens)
        counter = self._built.counters["router_queue_backpressure_total"]
        for key, count in parking.refused.items():
            model, role, reason = key
            new = count - self._refused.get(key, 0)
            counter.labels(model, role, POLICY_CLASS, reason).inc(new)
            self._refused[key] = count


class _Last(Struct):
    """Of the last request on a rank; None where there was none yet."""

    ttft_s: float | None = None
    isl: int | None = None
    itl_s: float | None = None


class ModelMetrics:
    """One model's metrics, each already bound to the model's label."""

    def __init__(self, model: str, built: Built, itl: TokenHistogram) -> None:
        self._model = model
        self._requests = built.counters["requests_total"]
        self._rejected = built.counters["model_rejection_total"]
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

    def rejected(self, endpoint: str) -> None:
        """The workers were too busy for a request."""
        self._rejected.labels(endpoint, self._model).inc()

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
            self._itl.add(self._model, times)
