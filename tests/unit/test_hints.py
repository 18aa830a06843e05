"""Examples of what a request says about its routing, by header and by body."""

from typing import Any

import msgspec
import pytest
from multidict import CIMultiDict

from frontend.errors import BadRequest
from frontend.hints import SESSION_ID_CHARS_MAX, RoutingHints, routing_hints
from frontend.openai_types import NvExt, RouterConfigOverride


def hints(nvext: dict[str, Any] | None = None, /, **headers: str) -> RoutingHints:
    """headers: with underscores for hyphens."""
    body = None if nvext is None else msgspec.convert(nvext, NvExt)
    return routing_hints(
        body, CIMultiDict({name.replace("_", "-"): text for name, text in headers.items()})
    )


def test_nothing_said_is_nothing_asked() -> None:
    assert hints() == hints({}) == hints({"agent_hints": {}}) == RoutingHints()


def test_everything_at_once_from_the_body() -> None:
    assert hints(
        {
            "backend_instance_id": 2**64 - 1,
            "prefill_worker_id": 0,
            "decode_worker_id": 7,
            "dp_rank": 1,
            "prefill_dp_rank": 2,
            "agent_hints": {"osl": 100, "priority": 3, "strict_priority": 4},
            "cache_control": {"type": "ephemeral", "ttl": "10m"},
            "router_config_override": {"overlap_score_weight": 0, "assume_kv_reuse": False},
            "session_id": "été",
            "annotations": ["query_instance_id:"],
            "extra_fields": ["worker_id", "timing"],
        }
    ) == RoutingHints(
        worker_id=2**64 - 1,
        prefill_worker_id=0,
        decode_worker_id=7,
        dp_rank=1,
        prefill_dp_rank=2,
        expected_osl=100,
        priority=3.0,
        engine_priority=3,
        strict_priority=4,
        cache_ttl_s=600,
        overrides=RouterConfigOverride(overlap_score_weight=0, assume_kv_reuse=False),
        session_id="été",
        query_only=True,
        extra_fields=frozenset({"worker_id", "timing"}),
    )


def test_everything_at_once_from_the_headers() -> None:
    assert hints(
        X_Worker_Instance_Id="7",
        x_prefill_instance_id="9",
        x_dp_rank="1",
        x_prefill_dp_rank="2",
        x_dynamo_request_priority="-5",
        x_dynamo_request_strict_priority="6",
        x_session_id="s",
        x_bypass_remote_prefill="True",
    ) == RoutingHints(
        worker_id=7,
        decode_worker_id=7,
        prefill_worker_id=9,
        dp_rank=1,
        prefill_dp_rank=2,
        engine_priority=-5,
        strict_priority=6,
        session_id="s",
        bypass_remote_prefill=True,
    )


def test_the_worker_header_names_both_legs_whatever_the_body_says() -> None:
    said = hints({"backend_instance_id": 1, "decode_worker_id": 2}, x_worker_instance_id="3")
    assert (said.worker_id, said.decode_worker_id) == (3, 3)


@pytest.mark.parametrize("name", ["backend_instance_id", "decode_worker_id"])
def test_a_worker_that_is_named_once_is_named_however_the_model_is_served(name: str) -> None:
    said = hints({name: 5})
    assert (said.worker_id, said.decode_worker_id) == (5, 5)


@pytest.mark.parametrize(
    ("plain", "preferred", "field"),
    [
        ("x_worker_instance_id", "x_dynamo_worker_instance_id", "worker_id"),
        ("x_prefill_instance_id", "x_dynamo_prefill_instance_id", "prefill_worker_id"),
        ("x_data_parallel_rank", "x_dp_rank", "dp_rank"),
        ("x_dp_rank", "x_dynamo_dp_rank", "dp_rank"),
        ("x_dp_rank", "x_dynamo_data_parallel_rank", "dp_rank"),
        ("x_prefill_dp_rank", "x_dynamo_prefill_dp_rank", "prefill_dp_rank"),
    ],
)
def test_the_prefixed_spelling_goes_first(plain: str, preferred: str, field: str) -> None:
    assert getattr(hints(**{plain: "1"}), field) == 1
    assert getattr(hints(**{plain: "1", preferred: "2"}), field) == 2
    assert getattr(hints(**{plain: "not read", preferred: "2"}), field) == 2


def test_the_largest_rank_means_no_rank() -> None:
    unset = str(2**32 - 1)
    assert hints({"dp_rank": 2**32 - 1}) == RoutingHints()
    assert hints(x_dp_rank=unset, x_prefill_dp_rank=unset) == RoutingHints()
    assert hints({"dp_rank": 3}, x_dp_rank=unset).dp_rank == 3


@pytest.mark.parametrize(
    ("agent_hints", "header", "priority", "engine_priority"),
    [
        ({"priority": 3}, None, 3.0, 3),
        ({"priority": -3}, None, 0.0, -3),
        ({"priority": 3}, "0", 0.0, 0),
        ({"latency_sensitivity": 2.5}, None, 2.5, 0),
        ({"latency_sensitivity": -2.5}, None, 0.0, 0),
        ({"latency_sensitivity": 2.5, "priority": 0}, None, 0.0, 0),
        ({"latency_sensitivity": 2.5}, "1", 1.0, 1),
        (None, "-2147483648", 0.0, -(2**31)),
    ],
)
def test_priority(
    agent_hints: dict[str, Any] | None, header: str | None, priority: float, engine_priority: int
) -> None:
    headers = {} if header is None else {"x_dynamo_request_priority": header}
    said = hints(None if agent_hints is None else {"agent_hints": agent_hints}, **headers)
    assert (said.priority, said.engine_priority) == (priority, engine_priority)


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        (None, 300), ("300", 300), ("600s", 600), ("5m", 300), ("30m", 1800), ("1h", 3600),
        ("2h", 3600), ("1", 300), ("0", 300), ("000900", 900), (" 10m ", 600), (900, 900),
        (-5, 300), (10**30, 3600), ("9" * 100_000, 3600), ("0" * 100_000 + "x", 300),
        ("", 300), ("soon", 300), ("-10m", 300), ("1.5h", 300), ("10d", 300), ("٣٠m", 300),
    ],
)  # fmt: skip
def test_how_long_a_prompt_shall_stay(ttl: Any, seconds: int) -> None:
    assert hints({"cache_control": {"type": "ephemeral", "ttl": ttl}}).cache_ttl_s == seconds


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("x-worker-instance-id", t) for t in ("", "x", "-1", "+5", "1.0", "5, 6", "²", "9" * 25)),
        ("x-worker-instance-id", str(2**64)),
        ("x-dynamo-worker-instance-id", "0x10"),
        ("x-prefill-instance-id", " "),
        ("x-dp-rank", str(2**32)),
        ("x-data-parallel-rank", "-1"),
        ("x-prefill-dp-rank", "one"),
        ("x-dynamo-request-priority", str(2**31)),
        ("x-dynamo-request-priority", "high"),
        ("x-dynamo-request-strict-priority", "-1"),
        ("x-dynamo-session-id", ""),
        ("x-session-id", "a\udcff"),
        ("x-session-id", "s" * (SESSION_ID_CHARS_MAX + 1)),
        ("x-bypass-remote-prefill", "maybe"),
    ],
)
def test_a_header_that_says_nothing_usable_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(BadRequest) as raised:
        routing_hints(None, CIMultiDict({name: text}))
    assert raised.value.param == name
    assert name in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("session_id", ["", "a\nb", "\x00", "s" * (SESSION_ID_CHARS_MAX + 1)])
def test_a_session_id_of_the_body_keeps_the_same_rule(session_id: str) -> None:
    with pytest.raises(BadRequest) as raised:
        hints({"session_id": session_id})
    assert raised.value.param == "nvext.session_id"
