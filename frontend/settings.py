"""The options of the frontend: those of the peer's page, by their names there, and a few of ours.

Two things differ from the page and are meant to: `--discovery-backend` is `nats` by default (the
page: etcd), and no `--namespace` means the namespace `dynamo` (the page: all of them).
"""

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from eventstore.options import Option
from eventstore.process_settings import NAMESPACE_DEFAULT
from eventstore.subjects import check_namespace
from router.settings import SnapshotSettings

Later = partial(Option, available=False)
"""An option of the page whose machinery is not built."""


def _path(name: str, endpoint: str, group: str = "") -> Option:
    # The page has the variables with _ENV; what the peer's programs read is without it.
    variables = (f"DYN_HTTP_SVC_{name}_PATH_ENV", f"DYN_HTTP_SVC_{name}_PATH")
    return Later(variables, f"Path of the {endpoint} endpoint.", group=group, flag=False)


class FrontendSettings(SnapshotSettings, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP server: routes each request to a worker, by the log."""

    program: ClassVar[str] = "python -m frontend"

    http_host: Annotated[
        str, Option("DYN_HTTP_HOST", "Address to listen on.", group="HTTP and networking")
    ] = "0.0.0.0"
    http_port: Annotated[
        int, Option("DYN_HTTP_PORT", "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    ] = 8000
    tls_cert_path: Annotated[
        Path | None,
        Later("DYN_TLS_CERT_PATH", "TLS certificate (PEM). Goes together with --tls-key-path."),
    ] = None
    tls_key_path: Annotated[
        Path | None,
        Later("DYN_TLS_KEY_PATH", "TLS private key (PEM). Goes together with --tls-cert-path."),
    ] = None
    http_body_limit_mb: Annotated[
        int,
        Option(
            "DYN_HTTP_BODY_LIMIT_MB",
            "The largest request body; a larger one is answered with 413.",
            flag=False,
            unit="MiB",
            ge=1,
        ),
    ] = 192
    http_graceful_shutdown_timeout_secs: Annotated[
        float,
        Option(
            "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
            "How long a shutdown waits for the requests that are running.",
            flag=False,
            unit="seconds",
            ge=0,
        ),
    ] = 5.0

    router_mode: Annotated[
        Literal["round-robin", "random", "kv", "direct"],
        Option(
            "DYN_ROUTER_MODE",
            "How a worker is chosen: in turn, at random, by prefix and load, or by the client.",
            group="Router",
        ),
    ] = "round-robin"
    router_kv_overlap_score_weight: Annotated[
        float,
        Option(
            "DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT",
            "Weight of the blocks to prefill in a worker's cost. Higher keeps prefixes together, "
            "lower spreads the load.",
            aliases=("--kv-overlap-score-weight",),
            ge=0,
        ),
    ] = 1.0
    router_temperature: Annotated[
        float,
        Option(
            "DYN_ROUTER_TEMPERATURE",
            "Temperature of the draw among the workers by cost; 0 always takes the lowest.",
            ge=0,
        ),
    ] = 0.0
    router_kv_events: Annotated[
        bool,
        Later(
            "DYN_ROUTER_USE_KV_EVENTS",
            "Follow the workers' KV cache events, instead of guessing what they hold.",
            aliases=("--kv-events",),
        ),
    ] = True
    router_ttl_secs: Annotated[
        float,
        Later(
            "DYN_ROUTER_TTL_SECS",
            "Without KV events: how long a block is believed to stay cached.",
            aliases=("--router-ttl",),
            unit="seconds",
            gt=0,
        ),
    ] = 120.0
    router_max_tree_size: Annotated[
        int,
        Later(
            "DYN_ROUTER_MAX_TREE_SIZE",
            "Without KV events: how many blocks are believed cached at most.",
            unit="blocks",
            ge=1,
        ),
    ] = 1_048_576
    router_prune_target_ratio: Annotated[
        float,
        Later(
            "DYN_ROUTER_PRUNE_TARGET_RATIO",
            "Without KV events: the share of --router-max-tree-size that pruning leaves.",
            ge=0,
            le=1,
        ),
    ] = 0.8
    router_replica_sync: Annotated[
        bool,
        Option(
            "DYN_ROUTER_REPLICA_SYNC",
            "Count the requests that other frontends routed in the load that this one sees.",
        ),
    ] = False
    router_snapshot_threshold: Annotated[
        int | None,
        Option(
            "DYN_ROUTER_SNAPSHOT_THRESHOLD",
            "Messages in the log after the last snapshot that make the next one due.",
            unit="messages",
            unset="only the bytes count",
            ge=1,
        ),
    ] = 1_000_000
    router_reset_states: Annotated[
        bool,
        Option(
            "DYN_ROUTER_RESET_STATES",
            "Empty the router's state at the start. It is an event in the log, so every replica "
            "empties its own at the same place; caches and running requests are told anew.",
        ),
    ] = False
    router_track_active_blocks: Annotated[
        bool,
        Later(
            "DYN_ROUTER_TRACK_ACTIVE_BLOCKS",
            "Count the blocks of running requests in a worker's cost.",
            aliases=("--track-active-blocks",),
        ),
    ] = True
    router_assume_kv_reuse: Annotated[
        bool,
        Later(
            "DYN_ROUTER_ASSUME_KV_REUSE",
            "Count an active block that several requests share once.",
            aliases=("--assume-kv-reuse",),
        ),
    ] = True
    router_track_output_blocks: Annotated[
        bool,
        Later(
            "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
            "Count the blocks that a request's output fills while it grows.",
            aliases=("--track-output-blocks",),
        ),
    ] = False
    router_event_threads: Annotated[
        int, Later("DYN_ROUTER_EVENT_THREADS", "Threads that apply KV events.", ge=1)
    ] = 4
    router_queue_threshold: Annotated[
        float | None,
        Later(
            "DYN_ROUTER_QUEUE_THRESHOLD",
            "A worker takes no more requests while its active prefill tokens are above this many "
            "times what it can batch.",
            unset="no queue",
            ge=0,
        ),
    ] = 2.0
    router_queue_policy: Annotated[
        Literal["fcfs", "wspt"],
        Later(
            "DYN_ROUTER_QUEUE_POLICY",
            "Order of the queue: first come, first served, for the slowest TTFTs; or by weighted "
            "shortest prefill, for the mean TTFT.",
        ),
    ] = "fcfs"
    enable_cache_control: Annotated[
        bool,
        Later(
            "DYN_ENABLE_CACHE_CONTROL",
            "Let clients pin a prefix in the cache for a time. Needs the kv mode.",
        ),
    ] = False
    decode_fallback: Annotated[
        bool,
        Later(
            "DYN_DECODE_FALLBACK", "Prefill on a decode worker while there is no prefill worker."
        ),
    ] = False

    migration_limit: Annotated[
        int,
        Later(
            "DYN_MIGRATION_LIMIT",
            "How many times a request may move on after it lost its worker; 0 is never.",
            group="Fault tolerance",
            ge=0,
            le=2**32 - 1,
        ),
    ] = 0
    active_decode_blocks_threshold: Annotated[
        float | None,
        Later(
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
            "A worker is busy above this share of its KV blocks.",
            ge=0,
            le=1,
        ),
    ] = None
    active_prefill_tokens_threshold: Annotated[
        int | None,
        Later(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
            "A worker is busy above this many active prefill tokens.",
            unit="tokens",
            ge=0,
        ),
    ] = None
    active_prefill_tokens_threshold_frac: Annotated[
        float | None,
        Later(
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
            "A worker is busy above this many times its max_num_batched_tokens in active prefill "
            "tokens. Either of the two prefill thresholds is enough.",
            ge=0,
        ),
    ] = None

    namespace: Annotated[
        str | None,
        Option(
            "DYN_NAMESPACE",
            "The deployment that this frontend belongs to: its log, its workers, its models.",
            group="Model discovery",
            unset=NAMESPACE_DEFAULT,
            check=check_namespace,
        ),
    ] = None
    namespace_prefix: Annotated[
        str | None,
        Later(
            "DYN_NAMESPACE_PREFIX", "Serve all namespaces that begin so. Goes before --namespace."
        ),
    ] = None
    model_name: Annotated[
        str | None, Later("DYN_MODEL_NAME", "Name of the model, in place of what its workers say.")
    ] = None
    model_path: Annotated[
        Path | None,
        Later(
            "DYN_MODEL_PATH", "Folder with the model's files, in place of those its workers bring."
        ),
    ] = None
    kv_cache_block_size: Annotated[
        int | None,
        Later(
            "DYN_KV_CACHE_BLOCK_SIZE",
            "Tokens in a KV block, in place of what the workers say.",
            unit="tokens",
            ge=1,
        ),
    ] = None

    discovery_backend: Annotated[
        Literal["nats", "kubernetes", "etcd", "file", "mem"],
        Option(
            "DYN_DISCOVERY_BACKEND",
            "Where workers are found.",
            group="Infrastructure",
            available_choices=("nats",),
        ),
    ] = "nats"
    request_plane: Annotated[
        Literal["tcp", "nats", "http"],
        Option("DYN_REQUEST_PLANE", "How requests reach the workers.", available_choices=("tcp",)),
    ] = "tcp"
    event_plane: Annotated[
        Literal["nats", "zmq"],
        Option(
            "DYN_EVENT_PLANE",
            "How events travel: in the log, which is a JetStream stream.",
            available_choices=("nats",),
        ),
    ] = "nats"

    kserve_grpc_server: Annotated[
        bool,
        Later(
            "DYN_KSERVE_GRPC_SERVER", "Serve KServe gRPC v2 instead of HTTP.", group="KServe gRPC"
        ),
    ] = False
    grpc_metrics_port: Annotated[
        int, Later("DYN_GRPC_METRICS_PORT", "HTTP port beside the gRPC server.", ge=0, le=65535)
    ] = 8788

    metrics_prefix: Annotated[
        str,
        Option(
            "DYN_METRICS_PREFIX",
            "What the names of the frontend's own metrics begin with. A character that Prometheus "
            "does not allow becomes an underscore.",
            group="Monitoring",
        ),
    ] = "dynamo_frontend"
    dump_config_to: Annotated[
        Path | None, Later("DYN_DUMP_CONFIG_TO", "File to write the resolved configuration to.")
    ] = None

    enable_anthropic_api: Annotated[
        bool,
        Later(
            "DYN_ENABLE_ANTHROPIC_API",
            "Serve the Anthropic Messages API at /v1/messages.",
            group="Experimental",
        ),
    ] = False
    dyn_chat_processor: Annotated[
        Literal["dynamo", "vllm"],
        Later("DYN_CHAT_PROCESSOR", "What renders chats and reads the output."),
    ] = "dynamo"
    dyn_debug_perf: Annotated[
        bool, Later("DYN_DEBUG_PERF", "Log how long each step of the vllm chat processor takes.")
    ] = False
    dyn_preprocess_workers: Annotated[
        int,
        Later(
            "DYN_PREPROCESS_WORKERS",
            "Processes for the vllm chat processor; 0 is none besides the main one.",
            ge=0,
        ),
    ] = 0
    interactive: Annotated[
        bool,
        Later("DYN_INTERACTIVE", "Chat on the terminal instead of serving HTTP.", aliases=("-i",)),
    ] = False

    chat_path: Annotated[str, _path("CHAT", "chat completions", "Endpoint paths")] = (
        "/v1/chat/completions"
    )
    completions_path: Annotated[str, _path("CMP", "completions")] = "/v1/completions"
    embeddings_path: Annotated[str, _path("EMB", "embeddings")] = "/v1/embeddings"
    responses_path: Annotated[str, _path("RESPONSES", "responses")] = "/v1/responses"
    models_path: Annotated[str, _path("MODELS", "models")] = "/v1/models"
    anthropic_path: Annotated[str, _path("ANTHROPIC", "Anthropic messages")] = "/v1/messages"
    health_path: Annotated[str, _path("HEALTH", "health")] = "/health"
    live_path: Annotated[str, _path("LIVE", "liveness")] = "/live"
    metrics_path: Annotated[str, _path("METRICS", "metrics")] = "/metrics"

    router_durable_kv_events: Annotated[
        bool,
        Later(
            "DYN_ROUTER_DURABLE_KV_EVENTS",
            "Deprecated by the page, and of no use here: KV events always are in the log.",
            group="Deprecated",
            aliases=("--durable-kv-events",),
        ),
    ] = False

    @property
    def log_namespace(self) -> str:
        """The namespace whose log this frontend reads."""
        return self.namespace or NAMESPACE_DEFAULT

    @property
    def http_body_limit_bytes(self) -> int:
        return self.http_body_limit_mb * 1024 * 1024
