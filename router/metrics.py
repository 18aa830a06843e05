"""What a router measures: the peer's names where it has them, `reckon_` names for the rest."""

import time

from prometheus_client import CollectorRegistry

from eventstore.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    RequestRouted,
)
from eventstore.metrics import Metric, build
from eventstore.publisher import Publisher
from router.replica import Replica, ReplicaStatus
from router.router import Router
from router.snapshot_trigger import SnapshotTrigger
from router.ticket import Timings
from router.token_histogram import (
    INPUT_TOKENS,
    ITL_S,
    OUTPUT_TOKENS,
    TTFT_S,
    TokenHistogram,
    TokenTimes,
)

_FINE_MS = tuple(0.001 * 2**k for k in range(15))
_COARSE_MS = tuple(0.01 * 3**k for k in range(17))
_KV_EVENTS: dict[type[Event], str] = {
    BlockStored: "stored",
    BlockRemoved: "removed",
    AllBlocksCleared: "cleared",
}

METRICS: tuple[Metric, ...] = (
    Metric(
        "dynamo_router_overhead_block_hashing_ms",
        "histogram",
        "Time to hash each of a prompt's blocks, in ms.",
        ("router_id",),
        _FINE_MS,
    ),
    Metric(
        "dynamo_router_overhead_seq_hashing_ms",
        "histogram",
        "Time to chain these hashes, in ms.",
        ("router_id",),
        _FINE_MS,
    ),
    Metric(
        "dynamo_router_overhead_indexer_find_matches_ms",
        "histogram",
        "Time to find each rank's overlap with a prompt, in ms.",
        ("router_id",),
        _COARSE_MS,
    ),
    Metric(
        "dynamo_router_overhead_scheduling_ms",
        "histogram",
        "Time to choose a rank once overlaps are known, and to wait for one in the queue, in ms.",
        ("router_id",),
        _COARSE_MS,
    ),
    Metric(
        "dynamo_router_overhead_total_ms",
        "histogram",
        "Time of all of these together, in ms.",
        ("router_id",),
        _COARSE_MS,
    ),
    Metric(
        "dynamo_router_requests_total",
        "counter",
        "Requests routed.",
        ("router_id",),
    ),
    Metric(
        "dynamo_router_kv_hit_rate",
        "histogram",
        "Overlap that the index predicted on the chosen rank, as a share of the prompt's blocks.",
        ("router_id",),
        tuple(round(0.05 * k, 2) for k in range(21)),
    ),
    Metric(
        "dynamo_router_time_to_first_token_seconds",
        "histogram",
        "From the router's taking the request on: hashing, waiting in the queue and prefill.",
        ("router_id",),
        TTFT_S,
    ),
    Metric(
        "dynamo_router_inter_token_latency_seconds",
        "histogram",
        "Between two outputs, per token; counted when a request ends.",
        ("router_id",),
        ITL_S,
    ),
    Metric(
        "dynamo_router_input_sequence_tokens",
        "histogram",
        "Prompt tokens, of requests that got a first token.",
        ("router_id",),
        INPUT_TOKENS,
    ),
    Metric(
        "dynamo_router_output_sequence_tokens",
        "histogram",
        "Output tokens, of the same requests.",
        ("router_id",),
        OUTPUT_TOKENS,
    ),
    Metric(
        "dynamo_component_kv_cache_events_applied",
        "gauge",
        "KV events applied to the index; it only grows. `status` is always ok: what can't be "
        "applied is in reckon_anomalies_total.",
        ("status", "event_type"),
    ),
    Metric(
        "reckon_queue_wait_seconds",
        "histogram",
        "How long requests waited in the queue, of those that waited and were let on.",
        ("model",),
        TTFT_S,
    ),
    Metric(
        "reckon_requests_rejected_total",
        "counter",
        "Requests that found no worker, by the `error.code` of the answer.",
        ("model", "code"),
    ),
    Metric(
        "reckon_deadlines_exceeded_total",
        "counter",
        "Times that a request took too long: first_token, inter_token or total. It failed, or went "
        "on elsewhere.",
        ("kind",),
    ),
    Metric(
        "reckon_worker_set_aside_total",
        "counter",
        "Times that a worker was set aside, by the `error.code` of its last failure.",
        ("cause",),
    ),
    Metric("reckon_workers_set_aside", "gauge", "Workers that are set aside now."),
    Metric("reckon_replica_cursor", "gauge", "Sequence of the last log record applied."),
    Metric("reckon_replica_head", "gauge", "Last known sequence of the log."),
    Metric("reckon_replica_lag_records", "gauge", "Records between the cursor and the head."),
    Metric("reckon_replica_lag_seconds", "gauge", "Age of the last applied record while behind."),
    Metric("reckon_replica_ready", "gauge", "1 once the head seen at the start has been passed."),
    Metric(
        "reckon_replica_digest",
        "gauge",
        "The cursor, labelled with the digest of the state there: equal cursors, equal digests.",
        ("digest",),
    ),
    Metric("reckon_replica_restarts_total", "counter", "Times the state was thrown away."),
    Metric("reckon_events_applied_total", "counter", "Events applied, by tag.", ("type",)),
    Metric(
        "reckon_anomalies_total",
        "counter",
        "What the log said that could not be applied as said, by kind.",
        ("kind",),
    ),
    Metric("reckon_index_blocks", "gauge", "Distinct blocks in the index."),
    Metric("reckon_index_pairs", "gauge", "(block, rank) pairs in the index."),
    Metric(
        "reckon_predicted_pairs", "gauge", "(block, rank) pairs that are believed, not announced."
    ),
    Metric("reckon_pinned_pairs", "gauge", "(block, rank) pairs that workers promised to keep."),
    Metric("reckon_sessions", "gauge", "Sessions that are bound to a rank."),
    Metric("reckon_active_requests", "gauge", "Requests in the folded state that have not ended."),
    Metric("reckon_snapshot_seq", "gauge", "Sequence of the newest usable snapshot; 0 for none."),
    Metric(
        "reckon_snapshot_age_seconds",
        "gauge",
        "Age of the newest usable snapshot's last record; 0 for none.",
    ),
    Metric("reckon_snapshot_bytes", "gauge", "Size of the newest usable snapshot; 0 for none."),
    Metric(
        "reckon_snapshots_skipped",
        "gauge",
        "Snapshots that the last start of this replica found and could not use.",
    ),
    Metric(
        "reckon_snapshot_runs_total",
        "counter",
        "Snapshots that this frontend had taken, by outcome: taken, finished (what another left "
        "undone), elsewhere (another was at it) or failed.",
        ("outcome",),
    ),
    Metric("reckon_overlay_bookings", "gauge", "Own decisions that the fold does not count yet."),
    Metric(
        "reckon_event_process",
        "gauge",
        "1 while a process of its own receives the events (--router-event-threads above 1).",
    ),
    Metric("reckon_event_waiting_bytes", "gauge", "Received by that process, not applied yet."),
    Metric(
        "reckon_event_waiting_bytes_max",
        "gauge",
        "Beyond it no more is taken from that process, and soon the server stops sending.",
    ),
    Metric("reckon_log_buffered_events", "gauge", "Own facts that the log has not acknowledged."),
    Metric("reckon_log_buffered_events_max", "gauge", "Bound of that buffer."),
    Metric("reckon_log_appended_events_total", "counter", "Own facts acknowledged by the log."),
    Metric("reckon_log_append_retries_total", "counter", "Batches that had to be sent again."),
)


class RouterMetrics:
    """Histograms are fed as decisions are made; the rest is read from the parts at a scrape."""

    def __init__(
        self,
        registry: CollectorRegistry,
        replica: Replica,
        router: Router,
        publisher: Publisher,
        snapshots: SnapshotTrigger | None = None,
    ) -> None:
        itl = next(m for m in METRICS if m.name == "dynamo_router_inter_token_latency_seconds")
        self._built = build([m for m in METRICS if m is not itl], registry)
        self._itl = TokenHistogram(registry, itl)
        self._replica = replica
        self._router = router
        self._publisher = publisher
        self._snapshots = snapshots
        self._counted: dict[tuple[str, str], float] = {}
        self._router_id = router.router_id
        histograms, router_id = self._built.histograms, router.router_id
        overhead = "dynamo_router_overhead_"
        self._hashing = histograms[overhead + "block_hashing_ms"].labels(router_id)
        self._chaining = histograms[overhead + "seq_hashing_ms"].labels(router_id)
        self._matching = histograms[overhead + "indexer_find_matches_ms"].labels(router_id)
        self._scheduling = histograms[overhead + "scheduling_ms"].labels(router_id)
        self._total = histograms[overhead + "total_ms"].labels(router_id)
        self._hit_rate = histograms["dynamo_router_kv_hit_rate"].labels(router_id)
        self._ttft = histograms["dynamo_router_time_to_first_token_seconds"].labels(router_id)
        self._input = histograms["dynamo_router_input_sequence_tokens"].labels(router_id)
        self._output = histograms["dynamo_router_output_sequence_tokens"].labels(router_id)
        self._queue_wait = histograms["reckon_queue_wait_seconds"]
        counters = self._built.counters
        self._requests = counters["dynamo_router_requests_total"].labels(router_id)
        self._rejected = counters["reckon_requests_rejected_total"]
        self._late = counters["reckon_deadlines_exceeded_total"]

    def hashed(self, blocks_s: float, chain_s: float) -> None:
        """A prompt's blocks were hashed, and the hashes chained."""
        self._hashing.observe(blocks_s * 1e3)
        self._chaining.observe(chain_s * 1e3)

    def routed(self, timings: Timings, routed: RequestRouted, hashing_s: float = 0.0) -> None:
        """One decision. hashing_s: what was spent before it on hashing the prompt for it."""
        self._requests.inc()
        self._matching.observe(timings.find_matches_s * 1e3)
        self._scheduling.observe((timings.scheduling_s + timings.queued_s) * 1e3)
        self._total.observe((hashing_s + timings.total_s) * 1e3)
        if timings.queued_s:
            self._queue_wait.labels(routed.model).observe(timings.queued_s)
        if routed.sequence_hashes:
            self._hit_rate.observe(routed.overlap_blocks / len(routed.sequence_hashes))

    def first_token(self, ttft_s: float, isl: int) -> None:
        """A request got its first token, `ttft_s` after it was taken on."""
        self._ttft.observe(ttft_s)
        self._input.observe(isl)

    def output_ended(self, osl: int, times: TokenTimes) -> None:
        """A request that got a first token has ended, in whatever way."""
        self._output.observe(osl)
        self._itl.add(self._router_id, times)

    def rejected(self, model: str, code: str) -> None:
        """A request found no worker. model: a served one."""
        self._rejected.labels(model, code).inc()

    def deadline_exceeded(self, kind: str) -> None:
        """A request took longer than a limit, once or again."""
        self._late.labels(kind).inc()

    def collect(self) -> None:
        """Bring gauges and counters up to date; called once a scrape."""
        status, state = self._replica.status(), self._replica.state
        gauges = self._built.gauges
        gauges["reckon_replica_cursor"].set(status.cursor)
        gauges["reckon_replica_head"].set(status.head)
        gauges["reckon_replica_lag_records"].set(status.lag_records)
        gauges["reckon_replica_lag_seconds"].set(status.lag_s)
        gauges["reckon_replica_ready"].set(self._replica.is_ready)
        gauges["reckon_replica_digest"].clear()
        gauges["reckon_replica_digest"].labels(status.digest).set(status.cursor)
        gauges["reckon_index_blocks"].set(state.tree.block_count)
        gauges["reckon_index_pairs"].set(state.tree.pair_count)
        gauges["reckon_predicted_pairs"].set(len(state.predicted))
        gauges["reckon_pinned_pairs"].set(len(state.pinned))
        gauges["reckon_sessions"].set(len(state.sessions))
        applied = gauges["dynamo_component_kv_cache_events_applied"]
        for event, name in _KV_EVENTS.items():
            applied.labels("ok", name).set(self._replica.applied[event])
        gauges["reckon_workers_set_aside"].set(len(self._router.workers_set_aside()))
        for cause, count in self._router.set_aside.items():
            self._advance("reckon_worker_set_aside_total", cause, count)
        gauges["reckon_active_requests"].set(len(state.requests))
        gauges["reckon_overlay_bookings"].set(self._router.overlay_bookings)
        events = self._replica.events
        gauges["reckon_event_process"].set(events.process is not None)
        gauges["reckon_event_waiting_bytes"].set(events.waiting_bytes)
        gauges["reckon_event_waiting_bytes_max"].set(events.waiting_bytes_max)
        gauges["reckon_log_buffered_events"].set(self._publisher.buffered)
        gauges["reckon_log_buffered_events_max"].set(self._publisher.events_max)
        self._advance("reckon_replica_restarts_total", "", self._replica.restarts)
        self._advance("reckon_log_appended_events_total", "", self._publisher.appended_events)
        self._advance("reckon_log_append_retries_total", "", self._publisher.retries)
        for tag, count in self._replica.applied_by_tag().items():
            self._advance("reckon_events_applied_total", tag, count)
        for kind in state.anomalies.__struct_fields__:
            self._advance("reckon_anomalies_total", kind, getattr(state.anomalies, kind))
        self._collect_snapshots(status)

    def _collect_snapshots(self, status: ReplicaStatus) -> None:
        gauges = self._built.gauges
        if status.snapshot is not None:
            gauges["reckon_snapshots_skipped"].set(len(status.snapshot.skipped))
        if self._snapshots is None:
            return
        newest = self._snapshots.newest
        gauges["reckon_snapshot_seq"].set(newest.seq if newest else 0)
        gauges["reckon_snapshot_bytes"].set(newest.size if newest else 0)
        age_s = max(0.0, time.time() - newest.time_ns / 1e9) if newest else 0.0
        gauges["reckon_snapshot_age_seconds"].set(age_s)
        for outcome, count in self._snapshots.outcomes.items():
            self._advance("reckon_snapshot_runs_total", outcome, count)

    def _advance(self, name: str, label: str, value: float) -> None:
        """Raise a counter to `value`; a smaller value (state restarted) begins a new count."""
        counter = self._built.counters[name]
        before = self._counted.get((name, label), 0)
        self._counted[(name, label)] = value
        (counter.labels(label) if label else counter).inc(
            value - before if value >= before else value
        )
