"""What a request says about its own routing: in `nvext`, and in headers, which go before it.

A header may have several spellings; the first one that is there counts, and the rest are not read.
The peer leaves out what it can't read. Here a header that is present and says nothing usable is
refused by name, as a body's field is: an id that is dropped sends the request somewhere else, and a
priority that is dropped sends it later, and neither shows.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec import Struct

from frontend.errors import BadRequest
from frontend.openai_types import (
    PRIORITY_MAX,
    PRIORITY_MIN,
    QUERY_INSTANCE_ID,
    U32_MAX,
    U64_MAX,
    CacheControl,
    NvExt,
    RouterConfigOverride,
)

CACHE_TTL_MIN_S, CACHE_TTL_MAX_S = 300, 3600
"""A pin shorter or longer than this is made as long as this (the peer's bounds)."""
SESSION_ID_CHARS_MAX = 256

WORKER = ("x-dynamo-worker-instance-id", "x-worker-instance-id")
PREFILL_WORKER = ("x-dynamo-prefill-instance-id", "x-prefill-instance-id")
DP_RANK = (
    "x-dynamo-dp-rank",
    "x-dynamo-data-parallel-rank",
    "x-dp-rank",
    "x-data-parallel-rank",
)
PREFILL_DP_RANK = ("x-dynamo-prefill-dp-rank", "x-prefill-dp-rank")
PRIORITY = ("x-dynamo-request-priority",)
STRICT_PRIORITY = ("x-dynamo-request-strict-priority",)
SESSION = ("x-dynamo-session-id", "x-session-id")
BYPASS_REMOTE_PREFILL = ("x-dynamo-bypass-remote-prefill", "x-bypass-remote-prefill")


class RoutingHints(Struct, frozen=True, kw_only=True):
    """None, 0, False and empty: nothing was said."""

    worker_id: int | None = None
    """Where a worker does the whole request: the one to do it. u64."""
    dp_rank: int | None = None
    """The rank there, and that of the decode worker. Never u32's largest, which means unset."""
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None
    decode_worker_id: int | None = None
    """Where prefill and decode are apart: the worker to decode. If only one of `worker_id` and
    this was named it is both, for a client need not know how a model is served."""
    priority: float = 0.0
    """Seconds by which the request counts as having come earlier, ≥ 0, finite."""
    engine_priority: int = 0
    """For engines that schedule by priority: higher is more urgent, negative less. i32."""
    strict_priority: int = 0
    """The tier: a higher one goes first whatever the priorities. u32."""
    expected_osl: int | None = None
    """Output tokens that the client expects, 1 … 2^32 - 1."""
    session_id: str | None = None
    """1 to `SESSION_ID_CHARS_MAX` printable characters."""
    cache_ttl_s: int | None = None
    """How long the prompt shall stay cached after the answer."""
    overrides: RouterConfigOverride = RouterConfigOverride()
    bypass_remote_prefill: bool = False
    """Prefill where the output will be decoded."""
    query_only: bool = False
    """Say where the request would go, and do not send it."""
    extra_fields: frozenset[str] = frozenset()
    """What the answer's nvext shall say."""


def routing_hints(nvext: NvExt | None, headers: Mapping[str, str]) -> RoutingHints:
    """nvext: as `frontend.openai` has checked it. headers: a mapping that ignores case.

    Raises BadRequest, whose `param` is the header or field. About 5 µs where nothing is said.
    """
    nvext = nvext or _NOTHING
    hints = nvext.agent_hints
    read = _Headers(headers)

    named = read.integer(WORKER, 0, U64_MAX)
    worker_id = _first(named, nvext.backend_instance_id)
    decode_worker_id = _first(named, nvext.decode_worker_id)

    priority = read.integer(PRIORITY, PRIORITY_MIN, PRIORITY_MAX)
    strict_priority = read.integer(STRICT_PRIORITY, 0, U32_MAX)
    jump_s = 0.0
    if hints is not None:
        priority = _first(priority, hints.priority)
        strict_priority = _first(strict_priority, hints.strict_priority)
        jump_s = hints.latency_sensitivity or 0.0
    if priority is not None:
        jump_s = float(priority)

    cache_control = nvext.cache_control
    return RoutingHints(
        worker_id=_first(worker_id, decode_worker_id),
        dp_rank=_first(_rank(read.integer(DP_RANK, 0, U32_MAX)), _rank(nvext.dp_rank)),
        prefill_worker_id=_first(read.integer(PREFILL_WORKER, 0, U64_MAX), nvext.prefill_worker_id),
        prefill_dp_rank=_first(
            _rank(read.integer(PREFILL_DP_RANK, 0, U32_MAX)), _rank(nvext.prefill_dp_rank)
        ),
        decode_worker_id=_first(decode_worker_id, worker_id),
        priority=max(0.0, jump_s),
        engine_priority=priority or 0,
        strict_priority=strict_priority or 0,
        expected_osl=(hints.osl or None) if hints is not None else None,
        session_id=_session_id(read, nvext),
        cache_ttl_s=None if cache_control is None else cache_ttl_s(cache_control),
        overrides=nvext.router_config_override or _NO_OVERRIDE,
        bypass_remote_prefill=read.flag(BYPASS_REMOTE_PREFILL),
        query_only=any(
            annotation.partition(":")[0] == QUERY_INSTANCE_ID
            for annotation in nvext.annotations or ()
        ),
        extra_fields=frozenset(nvext.extra_fields or ()),
    )


def cache_ttl_s(control: CacheControl) -> int:
    """Seconds within the bounds; the least where none are given or what is given is unreadable."""
    if isinstance(control.ttl, int):
        seconds = control.ttl
    else:
        match = _TTL.fullmatch((control.ttl or "").strip())
        if match is None:
            return CACHE_TTL_MIN_S
        # Nine digits are far above the bound already; a million would take long to read.
        seconds = int(match[1].lstrip("0")[:9] or "0") * _UNIT_S[match[2]]
    return min(max(seconds, CACHE_TTL_MIN_S), CACHE_TTL_MAX_S)


_NOTHING = NvExt()
_NO_OVERRIDE = RouterConfigOverride()
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_TTL = re.compile(r"([0-9]+)([smh]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

_T = TypeVar("_T")


def _first(header: _T | None, body: _T | None) -> _T | None:
    return body if header is None else header


def _rank(dp_rank: int | None) -> int | None:
    return None if dp_rank == U32_MAX else dp_rank


def _session_id(read: "_Headers", nvext: NvExt) -> str | None:
    name, session_id = read.text(SESSION)
    if session_id is None:
        name, session_id = "nvext.session_id", nvext.session_id
    if session_id is None:
        return None
    if not (0 < len(session_id) <= SESSION_ID_CHARS_MAX and session_id.isprintable()):
        raise BadRequest(f"{name}: expected 1 to {SESSION_ID_CHARS_MAX} printable characters", name)
    return session_id


class _Headers:
    """Headers by their spellings, of which the first that is there counts."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._get: Callable[[str], str | None] = headers.get

    def text(self, spellings: tuple[str, ...]) -> tuple[str, str | None]:
        """The spelling and its text; None: it has none of them."""
        for name in spellings:
            text = self._get(name)
            if text is not None:
                return name, text
        return spellings[-1], None

    def integer(self, spellings: tuple[str, ...], low: int, high: int) -> int | None:
        name, text = self.text(spellings)
        if text is None:
            return None
        value = int(text) if _INTEGER.fullmatch(text) else None
        if value is None or not low <= value <= high:
            raise BadRequest(f"{name}: expected an integer from {low} to {high}", name)
        return value

    def flag(self, spellings: tuple[str, ...]) -> bool:
        name, text = self.text(spellings)
        if text is None:
            return False
        value = _FLAGS.get(text.lower())
        if value is None:
            raise BadRequest(f"{name}: expected true or false", name)
        return value
