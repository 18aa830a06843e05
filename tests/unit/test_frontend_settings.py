"""The frontend's table: the whole of the peer's page, and what of it is refused for now."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from eventstore.settings import Declared, SettingsError, declarations, parse
from frontend.paths import Paths
from frontend.settings import FrontendSettings

PAGE = """
--http-host DYN_HTTP_HOST 0.0.0.0
--http-port DYN_HTTP_PORT 8000
--tls-cert-path DYN_TLS_CERT_PATH unset
--tls-key-path DYN_TLS_KEY_PATH unset
- DYN_HTTP_BODY_LIMIT_MB 192
- DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS 5.0
--router-mode DYN_ROUTER_MODE round-robin
--router-kv-overlap-score-weight DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT 1.0
--router-temperature DYN_ROUTER_TEMPERATURE 0.0
--router-kv-events DYN_ROUTER_USE_KV_EVENTS true
--router-ttl-secs DYN_ROUTER_TTL_SECS 120.0
--router-max-tree-size DYN_ROUTER_MAX_TREE_SIZE 1048576
--router-prune-target-ratio DYN_ROUTER_PRUNE_TARGET_RATIO 0.8
--router-replica-sync DYN_ROUTER_REPLICA_SYNC false
--router-snapshot-threshold DYN_ROUTER_SNAPSHOT_THRESHOLD 1000000
--router-reset-states DYN_ROUTER_RESET_STATES false
--router-track-active-blocks DYN_ROUTER_TRACK_ACTIVE_BLOCKS true
--router-assume-kv-reuse DYN_ROUTER_ASSUME_KV_REUSE true
--router-track-output-blocks DYN_ROUTER_TRACK_OUTPUT_BLOCKS false
--router-event-threads DYN_ROUTER_EVENT_THREADS 4
--router-queue-threshold DYN_ROUTER_QUEUE_THRESHOLD 2.0
--router-queue-policy DYN_ROUTER_QUEUE_POLICY fcfs
--enable-cache-control DYN_ENABLE_CACHE_CONTROL false
--decode-fallback DYN_DECODE_FALLBACK false
--migration-limit DYN_MIGRATION_LIMIT 0
--active-decode-blocks-threshold DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD unset
--active-prefill-tokens-threshold DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD unset
--active-prefill-tokens-threshold-frac DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC unset
--namespace DYN_NAMESPACE unset
--namespace-prefix DYN_NAMESPACE_PREFIX unset
--model-name DYN_MODEL_NAME unset
--model-path DYN_MODEL_PATH unset
--kv-cache-block-size DYN_KV_CACHE_BLOCK_SIZE unset
--discovery-backend DYN_DISCOVERY_BACKEND nats
--request-plane DYN_REQUEST_PLANE tcp
--event-plane DYN_EVENT_PLANE nats
--kserve-grpc-server DYN_KSERVE_GRPC_SERVER false
--grpc-metrics-port DYN_GRPC_METRICS_PORT 8788
--metrics-prefix DYN_METRICS_PREFIX dynamo_frontend
--dump-config-to DYN_DUMP_CONFIG_TO unset
--enable-anthropic-api DYN_ENABLE_ANTHROPIC_API false
--dyn-chat-processor DYN_CHAT_PROCESSOR dynamo
--dyn-debug-perf DYN_DEBUG_PERF false
--dyn-preprocess-workers DYN_PREPROCESS_WORKERS 0
--interactive DYN_INTERACTIVE false
- DYN_HTTP_SVC_CHAT_PATH_ENV /v1/chat/completions
- DYN_HTTP_SVC_CMP_PATH_ENV /v1/completions
- DYN_HTTP_SVC_EMB_PATH_ENV /v1/embeddings
- DYN_HTTP_SVC_RESPONSES_PATH_ENV /v1/responses
- DYN_HTTP_SVC_MODELS_PATH_ENV /v1/models
- DYN_HTTP_SVC_ANTHROPIC_PATH_ENV /v1/messages
- DYN_HTTP_SVC_HEALTH_PATH_ENV /health
- DYN_HTTP_SVC_LIVE_PATH_ENV /live
- DYN_HTTP_SVC_METRICS_PATH_ENV /metrics
--router-durable-kv-events DYN_ROUTER_DURABLE_KV_EVENTS false
"""
"""The peer's page: flag, variable, default (but ours for the discovery backend)."""

LATER = """
kserve_grpc_server grpc_metrics_port
enable_anthropic_api dyn_chat_processor dyn_debug_perf dyn_preprocess_workers
interactive embeddings_path responses_path anthropic_path """.split()
"""Of the page, and not built."""

FRONTEND = {each.name: each for each in declarations(FrontendSettings)}


def other_than_default(each: Declared) -> str:
    """A valid text for an option that means another value than its default."""
    if each.kind is bool:
        return "false" if each.default else "true"
    if each.choices:
        return next(choice for choice in each.choices if choice != each.default)
    if each.kind in (int, float):
        return next(text for text in ("1", "0", "0.5") if float(text) != each.default)
    return "/else"


def frontend_error(**env: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(FrontendSettings, [], env)
    return str(caught.value)


def test_the_frontend_has_every_option_of_the_page() -> None:
    ours = [
        f"{each.flag or '-'} {each.variables[0]} {each.default_text.partition(' (')[0]}"
        for each in FRONTEND.values()
    ]
    assert set(PAGE.split("\n")[1:-1]) <= set(ours)


def test_only_what_is_built_is_available() -> None:
    later = [name for name, each in FRONTEND.items() if not each.option.available]
    assert sorted(later) == sorted(LATER)


@pytest.mark.parametrize("name", sorted(LATER))
def test_an_option_that_is_not_built_is_refused_by_name(name: str) -> None:
    each = FRONTEND[name]
    text = other_than_default(each)
    for variable in each.variables:
        assert frontend_error(**{variable: text}) == f"{variable} is not available yet"
    if each.default is not None:
        default = {each.variables[0]: each.default_text}
        assert parse(FrontendSettings, [], default) == FrontendSettings()


RANGES = {
    "http_port": "0 to 65535",
    "http_body_limit_mb": "at least 1",
    "http_graceful_shutdown_timeout_secs": "at least 0",
    "router_kv_overlap_score_weight": "0 to 1000000",
    "router_temperature": "0 to 1000000",
    "router_ttl_secs": "above 0, at most 31536000",
    "router_max_tree_size": "1 to 1000000000",
    "router_prune_target_ratio": "0 to 1",
    "router_snapshot_threshold": "at least 1",
    "router_snapshots_kept": "2 to 1000",
    "router_snapshot_bytes": "at least 1",
    "router_event_threads": "at least 1",
    "router_queue_threshold": "at least 0",
    "router_queue_len_max": "at least 1",
    "router_queue_wait_max_secs": "above 0",
    "router_predicted_ttl_secs": "above 0, at most 31536000",
    "router_session_affinity_ttl_secs": "1 to 31536000",
    "http_overload_status_code": "400 to 599",
    "conditional_disagg_isl": "at least 1",
    "conditional_disagg_ratio": "above 0, at most 1",
    "request_first_token_timeout_secs": "above 0",
    "request_inter_token_timeout_secs": "above 0",
    "request_timeout_secs": "above 0",
    "migration_limit": "0 to 4294967295",
    "active_decode_blocks_threshold": "0 to 1",
    "active_prefill_tokens_threshold": "at least 0",
    "active_prefill_tokens_threshold_frac": "at least 0",
    "kv_cache_block_size": "at least 1",
    "grpc_metrics_port": "0 to 65535",
    "dyn_preprocess_workers": "at least 0",
    "nats_wait_secs": "at least 0",
    "log_replicas": "1 to 5",
}


def test_every_number_has_its_bounds() -> None:
    numbers = [each for each in FRONTEND.values() if each.kind in (int, float)]
    assert {each.name: each.range for each in numbers} == RANGES


@pytest.mark.parametrize("name", RANGES)
def test_bounds_are_checked(name: str) -> None:
    each = FRONTEND[name]
    lowest, highest = each.option.ge, each.option.le
    outside = [] if lowest is None else [f"{lowest - 1:.10g}"]
    outside += [] if highest is None else [f"{highest + 1:.10g}"]
    outside += [] if each.option.gt is None else [f"{each.option.gt:.10g}"]
    for text in outside:
        assert "out of range" in frontend_error(**{each.variables[0]: text})
    if each.option.available and lowest is not None:
        given = parse(FrontendSettings, [], {each.variables[0]: f"{lowest:g}"})
        assert getattr(given, name) == lowest


@pytest.mark.parametrize("name", [name for name, each in FRONTEND.items() if each.choices])
def test_choices_are_checked(name: str) -> None:
    each = FRONTEND[name]
    assert "is not one of" in frontend_error(**{each.variables[0]: "zzz"})
    for choice in each.option.available_choices or ((), each.choices)[each.option.available]:
        given = parse(FrontendSettings, [], {each.variables[0]: choice})
        assert getattr(given, name) == choice


@pytest.mark.parametrize(
    ("flag", "choice"),
    [
        ("--discovery-backend", "etcd"),
        ("--discovery-backend", "kubernetes"),
        ("--discovery-backend", "file"),
        ("--discovery-backend", "mem"),
        ("--request-plane", "nats"),
        ("--request-plane", "http"),
        ("--event-plane", "zmq"),
    ],
)
def test_planes_that_are_not_built(flag: str, choice: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag}: {choice} is not available yet"):
        parse(FrontendSettings, [flag, choice], {})


@pytest.mark.parametrize("alias", ["--kv-events", "--assume-kv-reuse", "--track-active-blocks"])
def test_older_spellings_are_known(alias: str) -> None:
    assert parse(FrontendSettings, [alias], {}) == FrontendSettings()
    assert parse(FrontendSettings, [alias.replace("--", "--no-")], {}) != FrontendSettings()


def test_the_namespace() -> None:
    assert FrontendSettings().log_namespace == "dynamo"
    assert parse(FrontendSettings, ["--namespace", "a-1"], {}).log_namespace == "a-1"
    assert frontend_error(DYN_NAMESPACE="a.b").startswith("DYN_NAMESPACE: 'a.b'")


def test_the_namespace_prefix_is_the_beginning_of_one() -> None:
    assert FrontendSettings().namespace_prefix is None
    assert parse(FrontendSettings, ["--namespace-prefix", "team-"], {}).namespace_prefix == "team-"
    assert frontend_error(DYN_NAMESPACE_PREFIX="a.").startswith("DYN_NAMESPACE_PREFIX: 'a.'")


def test_the_model_path_is_a_folder(tmp_path: Path) -> None:
    assert parse(FrontendSettings, ["--model-path", str(tmp_path)], {}).model_path == tmp_path
    missing = str(tmp_path / "no")
    assert frontend_error(DYN_MODEL_PATH=missing) == f"DYN_MODEL_PATH: {missing} is not a folder"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("CHAT", "chat"),
        ("CMP", "completions"),
        ("MODELS", "models"),
        ("HEALTH", "health"),
        ("LIVE", "live"),
        ("METRICS", "metrics"),
    ],
)
def test_a_path_can_be_moved_by_both_spellings(name: str, field: str) -> None:
    for variable in (f"DYN_HTTP_SVC_{name}_PATH_ENV", f"DYN_HTTP_SVC_{name}_PATH"):
        settings = parse(FrontendSettings, [], {variable: "/else/where"})
        assert settings.paths == replace(Paths(), **{field: "/else/where"})


@pytest.mark.parametrize("path", ["chat", "//", "/a//b", "/a/", "/a b", "/{x}", "/a?b", "/ä", "/%"])
def test_what_is_no_path(path: str) -> None:
    variable = "DYN_HTTP_SVC_CHAT_PATH"
    assert frontend_error(**{variable: path}).startswith(f"{variable}: {path!r} ")


def test_no_two_endpoints_have_one_path() -> None:
    for taken in ("/live", "/v1/embeddings", "/busy_threshold", "/docs", "/openapi.json"):
        said = frontend_error(DYN_HTTP_SVC_HEALTH_PATH=taken)
        assert said == f"DYN_HTTP_SVC_*_PATH: two endpoints can't both be at {taken}"
    swapped = {"DYN_HTTP_SVC_HEALTH_PATH": "/live", "DYN_HTTP_SVC_LIVE_PATH": "/health"}
    assert parse(FrontendSettings, [], swapped).paths.live == "/health"


def test_the_body_limit_is_in_mebibytes() -> None:
    assert FrontendSettings().http_body_limit_bytes == 192 * 2**20


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, each in FRONTEND.items()
        if each.option.available
        and each.group in ("Router", "Disaggregated serving", "Fault tolerance", "Model discovery")
    ],
)
def test_every_option_about_routing_says_when_to_set_it(name: str) -> None:
    use = FRONTEND[name].option.use
    assert use.endswith(".") and not use[0].islower()


def test_a_certificate_and_its_key_go_together() -> None:
    for given in ({"DYN_TLS_CERT_PATH": "cert.pem"}, {"DYN_TLS_KEY_PATH": "key.pem"}):
        assert frontend_error(**given) == (
            "--tls-cert-path and --tls-key-path must be given together"
        )
    both = parse(FrontendSettings, ["--tls-cert-path", "c.pem", "--tls-key-path", "k.pem"], {})
    assert (both.tls_cert_path, both.tls_key_path) == (Path("c.pem"), Path("k.pem"))
