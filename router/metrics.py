"""What a router measures: the peer's names where it has them, `reckon_` names for the rest."""

import time

from prometheus_client import CollectorRegistry

from eventstore.events import RequestRouted
from eventstore.metrics import Metric, build
from eventstore.publisher import Publisher
from router.replica import Replica, ReplicaStatus
from router.router import Router
from router.snapshot_trigger import SnapshotTrigger
from router.ticket import Timings

_FINE_MS = tuple(0.001 * 2**k for k in range(15))
_COARSE_MS = tuple(0.01 * 3**k for k in range(17))

METRICS: tuple[Metric, ...] = (
    Metric(
        "dynamo_router_overhead_block_hashing_ms",
        "histogram",
        "Time to hash a prompt's blocks, local and chained, in ms.",
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
        "Time to choose a rank once overlaps are known, in ms.",
        ("router_id",),
        _COARSE_MS,
    ),
    Metric(
        "dynamo_router_overhead_total_ms",
        "histogram",
        "Time of hashing, matching and choosing together, in ms.",
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
        self._built = build(METRICS, registry)
        self._replica = replica
        self._router = router
        self._publisher = publisher
        self._snapshots = snapshots
        self._counted: dict[tuple[str, str], float] = {}
        histograms, router_id = self._built.histograms, router.router_id
        overhead = "dynamo_router_overhead_"
        self._hashing = histograms[overhead + "block_hashing_ms"].labels(router_id)
        self._matching = histograms[overhead + "indexer_find_matches_ms"].labels(router_id)
        self._scheduling = histograms[overhead + "scheduling_ms"].labels(router_id)
        self._total = histograms[overhead + "total_ms"].labels(router_id)
        self._hit_rate = histograms["dynamo_router_kv_hit_rate"].labels(router_id)
        self._requests = self._built.counters["dynamo_router_requests_total"].labels(router_id)

    def hashed(self, seconds: float) -> None:
        """A prompt's blocks were hashed."""
        self._hashing.observe(seconds * 1e3)

    def routed(self, timings: Timings, routed: RequestRouted) -> None:
        """One decision."""
        self._requests.inc()
        self._matching.observe(timings.find_matches_s * 1e3)
        self._scheduling.observe((timings.scheduling_s + timings.queued_s) * 1e3)
        self._total.observe(timings.total_s * 1e3)
        if routed.sequence_hashes:
            self._hit_rate.observe(routed.overlap_blocks / len(routed.sequence_hashes))

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
        gauges["reckon_active_requests"].set(len(state.requests))
        gauges["reckon_overlay_bookings"].set(self._router.overlay_bookings)
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
