"""The options of the frontend: those of the peer's page, by their names there, and a few of ours.

Two things differ from the page and are meant to: `--discovery-backend` is `nats` by default (the
page: etcd), and no `--namespace` means the namespace `dynamo` (the page: all of them).
"""

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec.structs import astuple

from eventstore.options import Option
from eventstore.process_settings import NAMESPACE_DEFAULT
from eventstore.settings import SettingsError
from eventstore.subjects import check_namespace
from frontend.paths import Paths, check_apart, check_path
from frontend.tolerance_settings import ToleranceSettings

Later = partial(Option, available=False)
"""An option of the page whose machinery is not built."""


def check_directory(path: Path) -> None:
    """Raises ValueError if it is not there."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")


def _path(name: str, endpoint: str, group: str = "", available: bool = True) -> Option:
    # The page has the variables with _ENV; what the peer's programs read is without it.
    return Option(
        (f"DYN_HTTP_SVC_{name}_PATH_ENV", f"DYN_HTTP_SVC_{name}_PATH"),
        f"Path of the {endpoint} endpoint; nothing is at the usual one then.",
        group=group,
        flag=False,
        available=available,
        check=check_path,
    )


class FrontendSettings(ToleranceSettings, frozen=True, kw_only=True):
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
        Option(
            "DYN_TLS_CERT_PATH",
            "TLS certificate (PEM), with its chain if there is one; HTTPS is served then, and no "
            "HTTP. A renewed one is taken up without a restart. Goes together with --tls-key-path.",
        ),
    ] = None
    tls_key_path: Annotated[
        Path | None,
        Option(
            "DYN_TLS_KEY_PATH",
            "TLS private key (PEM, not encrypted). Goes together with --tls-cert-path.",
        ),
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
    http_overload_status_code: Annotated[
        int,
        Option(
            "DYN_HTTP_OVERLOAD_STATUS_CODE",
            "Status of an answer that says to come back later because the workers are busy.",
            use="529 for clients of the peer's later releases.",
            flag=False,
            ge=400,
            le=599,
        ),
    ] = 503

    namespace: Annotated[
        str | None,
        Option(
            "DYN_NAMESPACE",
            "The deployment that this frontend belongs to: its log, its workers, its models.",
            use="One for each deployment that shares a NATS.",
            group="Model discovery",
            unset=NAMESPACE_DEFAULT,
            check=check_namespace,
        ),
    ] = None
    namespace_prefix: Annotated[
        str | None,
        Option(
            "DYN_NAMESPACE_PREFIX",
            "Serve all namespaces that begin so, also those that appear later. Goes before "
            "--namespace.",
            use="Set it where each revision of a deployment has a namespace of its own.",
            check=check_namespace,
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Option(
            "DYN_MODEL_NAME",
            "What clients call the model, in place of what its workers say. The frontend then "
            "serves one model: workers of another are refused.",
            use="Set it to keep a name that clients know while the workers' is another.",
        ),
    ] = None
    model_path: Annotated[
        Path | None,
        Option(
            "DYN_MODEL_PATH",
            "Folder with the model's tokenizer and chat template, in place of those its workers "
            "bring. The frontend then serves one model: workers of another are refused.",
            use="Set it to try another chat template, or where workers bring none.",
            check=check_directory,
        ),
    ] = None
    kv_cache_block_size: Annotated[
        int | None,
        Option(
            "DYN_KV_CACHE_BLOCK_SIZE",
            "Tokens in a KV block, whatever the workers say: those that say another are refused.",
            use="Set it where workers of a wrong size might register first; the size of the first "
            "one counts otherwise.",
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
        Path | None,
        Option(
            "DYN_DUMP_CONFIG_TO",
            "File to write the options in force to at the start, with where each value is from, as "
            "JSON without secrets. Folders are made; a failure is logged and no more.",
            unset="to the log, at debug",
        ),
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

    chat_path: Annotated[str, _path("CHAT", "chat completions", "Endpoint paths")] = Paths().chat
    completions_path: Annotated[str, _path("CMP", "completions")] = Paths().completions
    embeddings_path: Annotated[str, _path("EMB", "embeddings", available=False)] = "/v1/embeddings"
    responses_path: Annotated[str, _path("RESPONSES", "responses", available=False)] = (
        "/v1/responses"
    )
    models_path: Annotated[str, _path("MODELS", "models")] = Paths().models
    anthropic_path: Annotated[str, _path("ANTHROPIC", "Anthropic messages", available=False)] = (
        "/v1/messages"
    )
    health_path: Annotated[str, _path("HEALTH", "health")] = Paths().health
    live_path: Annotated[str, _path("LIVE", "liveness")] = Paths().live
    metrics_path: Annotated[str, _path("METRICS", "metrics")] = Paths().metrics

    router_durable_kv_events: Annotated[
        bool,
        Option(
            "DYN_ROUTER_DURABLE_KV_EVENTS",
            "Deprecated by the page. What it asks for is always so here: KV events are in the log. "
            "A start with it says that it can be left out.",
            group="Deprecated",
            aliases=("--durable-kv-events",),
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise SettingsError("--tls-cert-path and --tls-key-path must be given together")
        try:
            later = self.embeddings_path, self.responses_path, self.anthropic_path
            check_apart((*astuple(self.paths), *later))
        except ValueError as error:
            raise SettingsError(f"DYN_HTTP_SVC_*_PATH: {error}") from None

    @property
    def paths(self) -> Paths:
        return Paths(**{each: getattr(self, f"{each}_path") for each in Paths.__struct_fields__})

    @property
    def log_namespace(self) -> str:
        """The namespace whose log this frontend reads."""
        return self.namespace or NAMESPACE_DEFAULT

    @property
    def http_body_limit_bytes(self) -> int:
        return self.http_body_limit_mb * 1024 * 1024
