"""Answers as clients read them: whole, and in chunks."""

from typing import Any

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from frontend.chunks import (
    DONE,
    ChatChunks,
    Choice,
    Chunks,
    CompletionChunks,
    NvExtAnswer,
    WorkerId,
    chat_body,
    completion_body,
    error_frames,
    query_body,
    query_frames,
    timing_of,
)
from frontend.errors import EngineError
from frontend.usage import Usage

ODD = 'a"b\\\n\r\x00\u2028é🙂</script>'
USAGE = Usage(11, 3, 8)
WIRE_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 3,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 8},
}
NVEXT = NvExtAnswer(WorkerId.of_one(2**64 - 1, 0), predicted_cached_tokens=8)
WIRE_NVEXT = {
    "worker_id": {
        "prefill_worker_id": 2**64 - 1,
        "prefill_dp_rank": 0,
        "decode_worker_id": 2**64 - 1,
        "decode_dp_rank": 0,
    },
    "predicted_cached_tokens": 8,
}


def read(frames: bytes) -> list[Any]:
    """The data of each frame, as an SSE client cuts them."""
    assert frames.endswith(b"\n\n")
    data = []
    for frame in frames[:-2].split(b"\n\n"):
        assert frame.startswith(b"data: ")
        assert b"\n" not in frame
        assert b"\r" not in frame
        data.append(frame[6:] if frame == b"data: [DONE]" else msgspec.json.decode(frame[6:]))
    return data


def chat_chunks() -> ChatChunks:
    return ChatChunks("chatcmpl-1", 1700000000, 'ti"ny')


def completion_chunks() -> CompletionChunks:
    return CompletionChunks("cmpl-1", 1700000000, 'ti"ny', choices=2)


def test_a_chat_stream() -> None:
    chunks = chat_chunks()
    first, second, end, last, done = read(
        chunks.text("he")
        + chunks.text(ODD)
        + chunks.text("", finish_reason="stop")
        + chunks.last(USAGE)
        + DONE
    )
    common = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": 'ti"ny',
    }

    def choice(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        only = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**common, "choices": [only]}

    assert first == choice({"role": "assistant", "content": "he"}, None)
    assert second == choice({"content": ODD}, None)
    assert end == choice({}, "stop")
    assert last == {**common, "choices": [], "usage": WIRE_USAGE}
    assert done == b"[DONE]"


def test_the_last_text_may_carry_the_finish_reason() -> None:
    chunks = chat_chunks()
    [chunk] = read(chunks.text("all", finish_reason="length"))
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": "all"}
    assert chunk["choices"][0]["finish_reason"] == "length"


def test_a_stream_without_text_still_says_the_role_once() -> None:
    chunks = chat_chunks()
    only, again = read(chunks.text("", finish_reason="stop") + chunks.text("x"))
    assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert again["choices"][0]["delta"] == {"content": "x"}


def test_a_completions_stream_of_two_prompts() -> None:
    chunks = completion_chunks()
    frames = read(
        chunks.text(ODD, 1) + chunks.text("", 0, "length") + chunks.last(Usage(1, 2), NVEXT)
    )
    assert [frame["choices"] for frame in frames] == [
        [{"index": 1, "text": ODD, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
        [],
    ]
    assert {frame["object"] for frame in frames} == {"text_completion"}
    assert frames[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert frames[-1]["nvext"] == WIRE_NVEXT


@pytest.mark.parametrize("make", [chat_chunks, completion_chunks])
def test_usage_can_be_on_every_chunk(make: Any) -> None:
    chunks: Chunks = make()
    for frame in read(
        chunks.text("a", usage=USAGE) + chunks.text("", finish_reason="stop", usage=USAGE)
    ):
        assert frame["usage"] == WIRE_USAGE
        assert len(frame["choices"]) == 1


@pytest.mark.parametrize("make", [chat_chunks, completion_chunks])
def test_only_what_was_asked_for_is_there(make: Any) -> None:
    chunks: Chunks = make()
    token, last = read(chunks.text("a") + chunks.last(None, NVEXT))
    assert "usage" not in token
    assert "nvext" not in token
    assert "usage" not in last
    assert last["nvext"] == WIRE_NVEXT
    assert "nvext" not in read(make().last(USAGE))[0]
    assert msgspec.json.encode(NvExtAnswer(predicted_cached_tokens=0)) == (
        b'{"predicted_cached_tokens":0}'
    )


def test_timing_says_as_much_as_came_to_pass() -> None:
    whole = timing_of(
        received_ms=1_700_000_000_000.0,
        started_s=10.0,
        sent_s=10.25,
        first_output_s=11.0,
        ended_s=12.5,
        kv_hit_rate=0.0,
        router_queue_depth=0,
    )
    assert msgspec.to_builtins(whole) == {
        "request_received_ms": 1_700_000_000_000.0,
        "prefill_wait_time_ms": 250.0,
        "prefill_time_ms": 750.0,
        "ttft_ms": 1000.0,
        "total_time_ms": 2500.0,
        "kv_hit_rate": 0.0,
        "router_queue_depth": 0,
    }
    unsent = timing_of(
        received_ms=1.0,
        started_s=10.0,
        sent_s=None,
        first_output_s=None,
        ended_s=None,
        kv_hit_rate=None,
        router_queue_depth=3,
    )
    assert msgspec.to_builtins(NvExtAnswer(timing=unsent)) == {
        "timing": {"request_received_ms": 1.0, "router_queue_depth": 3}
    }


@pytest.mark.parametrize(("chat", "kind"), [(True, "chat.completion"), (False, "text_completion")])
def test_where_a_request_would_go(chat: bool, kind: str) -> None:
    """Without text, and with what it takes to send the request there."""
    worker = WorkerId(7, 1, 9, 0)
    wire_nvext = {
        "worker_id": {
            "decode_worker_id": 7,
            "decode_dp_rank": 1,
            "prefill_worker_id": 9,
            "prefill_dp_rank": 0,
        },
        "token_ids": [1, 322, 201],
    }
    asked = ("id-1", 1700000000, "tiny", chat, worker, [1, 322, 201])
    body = msgspec.json.decode(query_body(*asked))
    chunk, done = read(query_frames(*asked))
    assert done == b"[DONE]"
    assert (body["object"], chunk["object"]) == (kind, kind + ".chunk" if chat else kind)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    for answer in (body, chunk):
        assert answer["nvext"] == wire_nvext
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"
        message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        assert not message["content"]
    if chat:
        ChatCompletion.model_validate(body, strict=True)
        ChatCompletionChunk.model_validate(chunk, strict=True)
    else:
        Completion.model_validate(body, strict=True)


def test_a_failed_stream_says_so_and_is_done() -> None:
    error, done = read(error_frames(EngineError("secret of the engine")))
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in str(error)
    assert done == b"[DONE]"


def test_a_chat_body() -> None:
    body = msgspec.json.decode(
        chat_body("chatcmpl-1", 1700000000, "tiny", [Choice(ODD, "stop")], USAGE, NVEXT)
    )
    assert body == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ODD, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": WIRE_USAGE,
        "nvext": WIRE_NVEXT,
    }


def test_no_text_is_null_content_in_chat() -> None:
    body = msgspec.json.decode(chat_body("i", 1, "m", [Choice("", "stop")], Usage(1, 1), None))
    assert body["choices"][0]["message"]["content"] is None
    assert "nvext" not in body
    assert "prompt_tokens_details" not in body["usage"]


def test_usage_says_how_much_of_the_output_was_reasoning() -> None:
    usage = Usage(2, 5, reasoning_tokens=3)
    body = chat_body("i", 1, "m", [Choice("", "stop")], usage, None)
    told = ChatCompletion.model_validate_json(body, strict=True).usage
    assert told is not None and told.completion_tokens_details is not None
    assert told.completion_tokens_details.reasoning_tokens == 3


def test_a_completions_body_has_a_choice_per_prompt() -> None:
    choices = [Choice(ODD, "stop"), Choice("", "length")]
    body = msgspec.json.decode(completion_body("cmpl-1", 1, "tiny", choices, USAGE, None))
    assert body == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {"index": 0, "text": ODD, "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": WIRE_USAGE,
        "system_fingerprint": None,
    }


def test_the_openai_library_reads_them_strictly() -> None:
    chunks, choice = chat_chunks(), Choice("x", "stop")
    for frame in read(
        chunks.text("a") + chunks.text("", finish_reason="stop") + chunks.last(USAGE)
    ):
        ChatCompletionChunk.model_validate(frame, strict=True)
    ChatCompletion.model_validate_json(chat_body("i", 1, "m", [choice], USAGE, NVEXT), strict=True)
    Completion.model_validate_json(completion_body("i", 1, "m", [choice], USAGE, None), strict=True)


def test_a_chunk_of_more_than_text() -> None:
    logprobs: dict[str, Any] = {"content": [], "refusal": None}
    calls = [{"index": 0, "id": "c", "type": "function", "function": {"name": ODD}}]
    chunks = ChatChunks("chatcmpl-1", 1700000000, "tiny", choices=2)
    frames = read(
        chunks.parts({"reasoning_content": "a"}, 1, None)
        + chunks.parts({"tool_calls": calls}, 1, logprobs, usage=USAGE)
        + chunks.parts({}, 1, logprobs, "tool_calls")
        + chunks.parts({}, 0, None, "stop")
    )
    choices = [frame["choices"][0] for frame in frames]
    assert [choice["index"] for choice in choices] == [1, 1, 1, 0]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "reasoning_content": "a"},
        {"tool_calls": calls},
        {},
        {"role": "assistant", "content": ""},
    ]
    assert [choice["logprobs"] for choice in choices] == [None, logprobs, logprobs, None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "tool_calls", "stop"]
    assert [frame.get("usage") for frame in frames] == [None, WIRE_USAGE, None, None]
    for frame in frames:
        ChatCompletionChunk.model_validate(frame, strict=True)


def test_a_completions_chunk_with_log_probabilities() -> None:
    told = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{}], "text_offset": [0]}
    [frame] = read(completion_chunks().parts({"text": ODD}, 1, told, "length", USAGE))
    only = {"index": 1, "text": ODD, "logprobs": told, "finish_reason": "length"}
    assert (frame["choices"], frame["usage"]) == ([only], WIRE_USAGE)


def test_a_message_has_more_than_content() -> None:
    parts = {"tool_calls": [], "reasoning_content": "so"}
    choices = [Choice("", "tool_calls", {"content": []}, parts), Choice("b", "stop")]
    body = msgspec.json.decode(chat_body("i", 1, "m", choices, USAGE, None))
    first, second = body["choices"]
    assert first["message"] == {"role": "assistant", "content": None, "refusal": None, **parts}
    assert (first["logprobs"], second["logprobs"]) == ({"content": []}, None)
    assert (first["index"], second["index"]) == (0, 1)
