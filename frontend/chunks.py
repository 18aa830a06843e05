"""Answers as bytes: whole JSON bodies, and the frames of server-sent event streams.

What is the same in every chunk of a stream (id, model, time of creation) is encoded once, so that a
token costs one JSON string and a concatenation. A choice's first chunk says the role; the chunk
that ends it says the finish reason; then comes the usage, if asked for, and `DONE`. A stream that
fails ends with an error frame and `DONE`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType

from frontend.errors import error_body
from frontend.usage import Usage, WireUsage, wire_usage

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.encode


class WorkerId(Struct, frozen=True, omit_defaults=True, gc=False):
    """Who served the request. Where one worker does it all, it stands here twice (`of_one`)."""

    decode_worker_id: int
    decode_dp_rank: int | None = None
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None

    @classmethod
    def of_one(cls, worker_id: int, dp_rank: int) -> Self:
        return cls(worker_id, dp_rank, worker_id, dp_rank)


class Timing(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where a request's time went, in milliseconds; None: it did not come to that."""

    request_received_ms: float | None = None
    """Unix time."""
    prefill_wait_time_ms: float | None = None
    """From its coming in to its leaving for a worker: reading, tokenizing, the queue, routing."""
    prefill_time_ms: float | None = None
    """From there to the first output."""
    ttft_ms: float | None = None
    """The sum of these two."""
    total_time_ms: float | None = None
    """To the last output."""
    kv_hit_rate: float | None = None
    """Share of the prompt's complete blocks that the router believed cached where it sent it."""
    router_queue_depth: int | None = None
    """Requests that waited in this frontend's queue when this one came."""


def timing_of(
    *,
    received_ms: float,
    started_s: float,
    sent_s: float | None,
    first_output_s: float | None,
    ended_s: float | None,
    kv_hit_rate: float | None,
    router_queue_depth: int | None,
) -> Timing:
    """received_ms: Unix time; what ends with _s is by one monotonic clock, None: not yet."""

    def between(start_s: float | None, end_s: float | None) -> float | None:
        if start_s is None or end_s is None:
            return None
        return round((end_s - start_s) * 1e3, 3)

    return Timing(
        request_received_ms=received_ms,
        prefill_wait_time_ms=between(started_s, sent_s),
        prefill_time_ms=between(sent_s, first_output_s),
        ttft_ms=between(started_s, first_output_s),
        total_time_ms=between(started_s, ended_s),
        kv_hit_rate=kv_hit_rate,
        router_queue_depth=router_queue_depth,
    )


class NvExtAnswer(Struct, frozen=True, omit_defaults=True, gc=False):
    """What the request's `nvext.extra_fields` asked for; None: not asked."""

    worker_id: WorkerId | None = None
    predicted_cached_tokens: int | None = None
    """Prompt tokens that the router believed cached on the worker it chose."""
    timing: Timing | None = None
    token_ids: list[int] | None = None
    """Of the prompt; only where it is asked where the request would go."""


class Choice(Struct, frozen=True, gc=False):
    """One finished output. `finish_reason` is the API's: stop, length or tool_calls."""

    text: str
    finish_reason: str
    logprobs: Mapping[str, Any] | None = None
    parts: Mapping[str, Any] = {}
    """Of a chat message, besides its content: tool_calls, reasoning_content."""


def error_frames(error: Exception) -> bytes:
    """The end of a stream that fails after it began."""
    return b"data: " + error_body(error) + b"\n\n" + DONE


# --- whole bodies ---------------------------------------------------------------------------------


def chat_body(
    id: str,
    created_s: int,
    model: str,
    choices: Sequence[Choice],
    usage: Usage,
    nvext: NvExtAnswer | None,
) -> bytes:
    """The answer of /v1/chat/completions. `content` is null if there is no text."""
    return _json(
        _ChatBody(
            id=id,
            created=created_s,
            model=model,
            choices=[
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": choice.text or None,
                        "refusal": None,
                        **choice.parts,
                    },
                    "logprobs": choice.logprobs,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            usage=wire_usage(usage),
            nvext=UNSET if nvext is None else nvext,
        )
    )


def completion_body(
    id: str,
    created_s: int,
    model: str,
    choices: Sequence[Choice],
    usage: Usage,
    nvext: NvExtAnswer | None,
) -> bytes:
    """The answer of /v1/completions, with the choices of the prompts, in their order."""
    return _json(
        _CompletionBody(
            id=id,
            created=created_s,
            model=model,
            choices=[
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": choice.logprobs,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            usage=wire_usage(usage),
            nvext=UNSET if nvext is None else nvext,
        )
    )


class _Body(Struct, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: WireUsage
    nvext: NvExtAnswer | UnsetType = UNSET


class _ChatBody(_Body, kw_only=True):
    object: str = "chat.completion"


class _CompletionBody(_Body, kw_only=True):
    object: str = "text_completion"
    system_fingerprint: None = None


# --- where a request would go ---------------------------------------------------------------------

_NO_OUTPUT = Choice("", "stop")


def query_body(
    id: str, created_s: int, model: str, chat: bool, worker: WorkerId, token_ids: list[int]
) -> bytes:
    """The whole answer to `query_instance_id`: as if nothing had been generated, with where the
    request would go and its prompt's tokens in nvext, for whoever then sends it there."""
    head = id, created_s, model
    tail = Usage(len(token_ids), 0), NvExtAnswer(worker_id=worker, token_ids=token_ids)
    return (chat_body if chat else completion_body)(*head, [_NO_OUTPUT], *tail)


def query_frames(
    id: str, created_s: int, model: str, chat: bool, worker: WorkerId, token_ids: list[int]
) -> bytes:
    """The same as a stream: one chunk without text, and its end."""
    delta = b'"delta":{"role":"assistant","content":null}'
    nothing = b'{"index":0,' + (delta if chat else b'"text":""')
    nvext = NvExtAnswer(worker_id=worker, token_ids=token_ids)
    kind = "chat.completion.chunk" if chat else "text_completion"
    return b"".join(
        (
            _head(id, kind, created_s, model),
            b"[",
            nothing,
            _reason("stop"),
            b',"nvext":',
            _json(nvext),
            b"}\n\n",
            DONE,
        )
    )


# --- streams --------------------------------------------------------------------------------------


class Chunks(Protocol):
    """The frames of one stream. A frame is whole: `data: {…}` and an empty line."""

    def text(
        self,
        text: str,
        index: int = 0,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """New text of choice `index`, and its finish reason on its last chunk, whose text may be
        empty. usage: so far, if asked for on every chunk. About 0.3 µs."""

    def parts(
        self,
        members: Mapping[str, Any],
        index: int,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """The same with more than text. members: of the delta, in completions of the choice."""

    def last(self, usage: Usage | None, nvext: NvExtAnswer | None = None) -> bytes:
        """The last chunk, without choices. usage None: it was not asked for, only nvext was."""


class _Frames:
    """`last` is the same on both endpoints."""

    _head: bytes

    def last(self, usage: Usage | None, nvext: NvExtAnswer | None = None) -> bytes:
        parts = [self._head, b"[]"]
        if usage is not None:
            parts.append(_usage_member(usage))
        if nvext is not None:
            parts += (b',"nvext":', _json(nvext))
        parts.append(b"}\n\n")
        return b"".join(parts)


class ChatChunks(_Frames):
    """Chunks of /v1/chat/completions, of so many choices, whose first ones say the role."""

    def __init__(self, id: str, created_s: int, model: str, choices: int = 1) -> None:
        self._head = _head(id, "chat.completion.chunk", created_s, model)
        self._starts = [self._head + b'[{"index":%d,"delta":' % index for index in range(choices)]
        self._role_due = [True] * choices

    def text(
        self,
        text: str,
        index: int = 0,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        if self._role_due[index]:
            self._role_due[index] = False
            delta = b'{"role":"assistant","content":' + _json(text) + b"}"
        elif text:
            delta = b'{"content":' + _json(text) + b"}"
        else:
            delta = b"{}"
        return b"".join((self._starts[index], delta, *_tail(finish_reason, usage)))

    def parts(
        self,
        members: Mapping[str, Any],
        index: int,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        if self._role_due[index]:
            self._role_due[index] = False
            members = {"role": "assistant", **(members or {"content": ""})}
        tail = _tail_with(logprobs, finish_reason, usage)
        return b"".join((self._starts[index], _json(members), *tail))


class CompletionChunks(_Frames):
    """Chunks of /v1/completions, of so many choices."""

    def __init__(self, id: str, created_s: int, model: str, choices: int = 1) -> None:
        self._head = _head(id, "text_completion", created_s, model)
        self._starts = [self._head + b'[{"index":%d,' % index for index in range(choices)]

    def text(
        self,
        text: str,
        index: int = 0,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        start = self._starts[index]
        return b"".join((start, b'"text":', _json(text), *_tail(finish_reason, usage)))

    def parts(
        self,
        members: Mapping[str, Any],
        index: int,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        tail = _tail_with(logprobs, finish_reason, usage)
        return b"".join((self._starts[index], _json(members)[1:-1], *tail))


_NO_LOGPROBS = b',"logprobs":null'
_TAIL = (_NO_LOGPROBS + b',"finish_reason":null}]', b"}\n\n")


def _head(id: str, kind: str, created_s: int, model: str) -> bytes:
    constant = _json({"id": id, "object": kind, "created": created_s, "model": model})
    return b"data: " + constant[:-1] + b',"choices":'


def _tail(finish_reason: str | None, usage: Usage | None) -> tuple[bytes, ...]:
    if finish_reason is None and usage is None:
        return _TAIL
    reason = _reason(finish_reason)
    return (reason, b"}\n\n") if usage is None else (reason, _usage_member(usage), b"}\n\n")


def _tail_with(
    logprobs: Mapping[str, Any] | None, finish_reason: str | None, usage: Usage | None
) -> tuple[bytes, ...]:
    tail = _tail(finish_reason, usage)
    if logprobs is None:
        return tail
    return (b',"logprobs":' + _json(logprobs), tail[0].removeprefix(_NO_LOGPROBS), *tail[1:])


def _reason(finish_reason: str | None) -> bytes:
    return _NO_LOGPROBS + b',"finish_reason":' + _json(finish_reason) + b"}]"


def _usage_member(usage: Usage) -> bytes:
    return b',"usage":' + _json(wire_usage(usage))
