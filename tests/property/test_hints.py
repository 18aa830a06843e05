"""Whatever headers and nvext say: hints within their ranges, or a refusal that names what is wrong.
Headers go before nvext."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from frontend.errors import BadRequest
from frontend.hints import (
    BYPASS_REMOTE_PREFILL,
    CACHE_TTL_MAX_S,
    CACHE_TTL_MIN_S,
    DP_RANK,
    PREFILL_DP_RANK,
    PREFILL_WORKER,
    PRIORITY,
    SESSION,
    SESSION_ID_CHARS_MAX,
    STRICT_PRIORITY,
    WORKER,
    RoutingHints,
    routing_hints,
)
from frontend.openai import decode_completion
from frontend.openai_types import NvExt

U32, U64 = 2**32 - 1, 2**64 - 1
SPELLINGS = (
    WORKER, PREFILL_WORKER, DP_RANK, PREFILL_DP_RANK, PRIORITY, STRICT_PRIORITY, SESSION,
    BYPASS_REMOTE_PREFILL,
)  # fmt: skip
NAMES = [name for spellings in SPELLINGS for name in spellings]

texts = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.sampled_from(["0", "true", "", str(U32), str(U64), "1e3", "٣", "1_0"]),
    st.text(max_size=8),
)
headers = st.dictionaries(st.sampled_from(NAMES), texts, max_size=4)
u32, u64 = st.integers(0, U32), st.integers(0, U64)
numbers = st.floats(0, 1e6).filter(lambda value: value == 0 or value >= 1e-6)

good_nvexts = st.fixed_dictionaries(
    {},
    optional={
        "backend_instance_id": u64,
        "prefill_worker_id": u64,
        "decode_worker_id": u64,
        "dp_rank": u32,
        "prefill_dp_rank": u32,
        "session_id": st.text("abc é", min_size=1, max_size=SESSION_ID_CHARS_MAX),
        "annotations": st.sampled_from([[], ["query_instance_id"], ["query_instance_id:"]]),
        "extra_fields": st.lists(st.sampled_from(["worker_id", "timing"]), max_size=3),
        "agent_hints": st.fixed_dictionaries(
            {},
            optional={
                "latency_sensitivity": st.floats(allow_nan=False, allow_infinity=False),
                "osl": u32,
                "priority": st.integers(-(2**31), 2**31 - 1),
                "strict_priority": u32,
                "speculative_prefill": st.just(False),
            },
        ),
        "cache_control": st.fixed_dictionaries(
            {"type": st.just("ephemeral")},
            optional={"ttl": st.one_of(st.none(), st.integers(), texts)},
        ),
        "router_config_override": st.fixed_dictionaries(
            {},
            optional={
                "overlap_score_weight": numbers,
                "router_temperature": numbers,
                "assume_kv_reuse": st.booleans(),
            },
        ),
    },
)
good_headers = st.fixed_dictionaries(
    {},
    optional={
        **{name: u64.map(str) for name in (*WORKER, *PREFILL_WORKER)},
        **{name: u32.map(str) for name in (*DP_RANK, *PREFILL_DP_RANK, *STRICT_PRIORITY)},
        **{name: st.integers(-(2**31), 2**31 - 1).map(str) for name in PRIORITY},
        **{name: st.text("abc", min_size=1, max_size=9) for name in SESSION},
        **{name: st.sampled_from(["true", "FALSE", "1", "0"]) for name in BYPASS_REMOTE_PREFILL},
    },
)


def decoded(nvext: Any) -> NvExt | None:
    """nvext as it comes out of a request's body. Raises BadRequest."""
    return decode_completion(
        json.dumps({"model": "m", "prompt": "p", "nvext": nvext}).encode()
    ).nvext


def check(hints: RoutingHints) -> None:
    for worker_id in (hints.worker_id, hints.prefill_worker_id, hints.decode_worker_id):
        assert worker_id is None or 0 <= worker_id <= U64
    assert (hints.worker_id is None) == (hints.decode_worker_id is None)
    for dp_rank in (hints.dp_rank, hints.prefill_dp_rank):
        assert dp_rank is None or 0 <= dp_rank < U32
    assert hints.priority >= 0 and math.isfinite(hints.priority)
    assert -(2**31) <= hints.engine_priority < 2**31
    assert hints.engine_priority <= 0 or hints.priority == hints.engine_priority
    assert 0 <= hints.strict_priority <= U32
    assert hints.expected_osl is None or 1 <= hints.expected_osl <= U32
    ttl_s = hints.cache_ttl_s
    assert ttl_s is None or CACHE_TTL_MIN_S <= ttl_s <= CACHE_TTL_MAX_S
    session_id = hints.session_id
    assert session_id is None or 1 <= len(session_id) <= SESSION_ID_CHARS_MAX
    for factor in (hints.overrides.overlap_score_weight, hints.overrides.router_temperature):
        assert factor is None or 0 <= factor <= 1e6


@given(good_nvexts, headers)
def test_any_header_gives_hints_or_is_named(nvext: dict[str, Any], said: dict[str, str]) -> None:
    body = decoded(nvext)
    try:
        hints = routing_hints(body, CIMultiDict(said))
    except BadRequest as error:
        assert error.param in said
        assert error.param in str(error)
    else:
        check(hints)


@given(
    st.dictionaries(
        st.sampled_from(NvExt.__struct_fields__),
        st.one_of(
            st.integers(),
            st.floats(),
            st.text(max_size=4),
            st.dictionaries(
                st.sampled_from(["priority", "osl", "ttl", "type", "router_temperature"]),
                st.one_of(st.integers(), st.floats(), st.just("ephemeral")),
                max_size=2,
            ),
        ),
        max_size=3,
    )
)
def test_any_nvext_gives_hints_or_is_named(nvext: dict[str, Any]) -> None:
    try:
        hints = routing_hints(decoded(nvext), CIMultiDict())
    except BadRequest as error:
        # JSON has no NaN and no infinity; a body with one is no JSON.
        assert error.code == "invalid_json" or (error.param or "").startswith("nvext")
    else:
        check(hints)


@given(good_nvexts, good_headers)
def test_headers_go_before_nvext_field_by_field(
    nvext: dict[str, Any], said: dict[str, str]
) -> None:
    """Where the headers say something the answer is as if nvext were not there, and else as if the
    headers were not."""
    body = decoded(nvext)
    both = routing_hints(body, CIMultiDict(said))
    by_header = routing_hints(None, CIMultiDict(said))
    by_body = routing_hints(body, CIMultiDict())
    for name in (
        "worker_id", "decode_worker_id", "prefill_worker_id", "dp_rank", "prefill_dp_rank",
        "session_id",
    ):  # fmt: skip
        header, rest = getattr(by_header, name), getattr(by_body, name)
        assert getattr(both, name) == (rest if header is None else header)
    for names, spellings in (
        (("priority", "engine_priority"), PRIORITY),
        (("strict_priority",), STRICT_PRIORITY),
    ):
        chosen = by_header if any(name in said for name in spellings) else by_body
        assert [getattr(both, name) for name in names] == [getattr(chosen, name) for name in names]
    for name in ("expected_osl", "cache_ttl_s", "overrides", "query_only", "extra_fields"):
        assert getattr(both, name) == getattr(by_body, name)
    assert both.bypass_remote_prefill == by_header.bypass_remote_prefill
