"""Which requests are taken, which are refused, and what the refusals say."""

import json
from typing import Any

import msgspec
import pytest

from frontend.errors import BadRequest, ContextLengthExceeded, NotAvailableYet
from frontend.openai import (
    PROMPTS_MAX,
    STOP_CHARS_MAX,
    ChatRequest,
    CompletionRequest,
    Prompt,
    decode_chat,
    decode_completion,
    prompts,
    sampling_options,
    stop_conditions,
    template_variables,
)
from frontend.openai_types import LATER, NvExt
from workers.protocol import SamplingOptions, StopConditions

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> ChatRequest:
    return decode_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return decode_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def refusal(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        chat(**fields)
    return raised.value


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "min_p": 0.5, "top_k": -1, "seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 2},
        {"max_tokens": 1, "min_tokens": 0, "ignore_eos": True, "skip_special_tokens": False},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stop": None}, {"stop": "a"}, {"stop": ["a"] * 32}, {"stop": [1, 2]}, {"stop": []},
        {"logit_bias": {"5": -100, "6": 100.0}},
        {"user": "u", "metadata": {"a": [1]}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"parallel_tool_calls": False},
        {"nvext": {}}, {"nvext": {"backend_instance_id": 2**64 - 1}},
        {"nvext": {"extra_fields": ["worker_id", "predicted_cached_tokens", "timing"]}},
        {"nvext": {"annotations": []}}, {"nvext": {"annotations": ["query_instance_id:"]}},
        {"nvext": {"prefill_worker_id": 0, "decode_worker_id": 2**64 - 1, "session_id": "s"}},
        {"nvext": {"dp_rank": 0, "prefill_dp_rank": 2**32 - 1}},
        {"nvext": {"agent_hints": {"latency_sensitivity": -1.5, "osl": 0, "priority": -(2**31)}}},
        {"nvext": {"agent_hints": {"strict_priority": 2**32 - 1, "speculative_prefill": False}}},
        {"nvext": {"cache_control": {"type": "ephemeral", "ttl": "never"}}},
        {"nvext": {"router_config_override": {
            "overlap_score_weight": 0, "router_temperature": 0.5, "assume_kv_reuse": False}}},
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
        {"n": 128}, {"n": 2, "temperature": 0.1}, {"logprobs": True, "top_logprobs": 20},
        {"logprobs": False, "top_logprobs": 0},
        {"tools": [], "tool_choice": "auto"}, {"tool_choice": "none"},
        {"tools": [TOOL]}, {"tools": [TOOL, TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [{**TOOL, "more": 1}], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "guided_regex": "a+"},
        {"response_format": {"type": "json_object"}, "guided_decoding_backend": "b"},
        {"guided_json": '{"type": "object"}'}, {"guided_choice": ["a", "b"]},
        # What is not available yet may be asked for in a way that asks for nothing.
        {"store": False, "service_tier": "auto", "functions": [], "function_call": "none"},
        {"modalities": ["text"], "detokenize": True},
        {name: None for name in LATER[ChatRequest]},
    ],
)  # fmt: skip
def test_fields_that_are_taken(fields: dict[str, Any]) -> None:
    chat(**fields)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("model", ""), ("model", None), ("model", 3),
        ("messages", []), ("messages", "hi"), ("messages", None),
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"), ("temperature", True),
        ("top_p", 1.1), ("min_p", -0.1), ("top_k", -2), ("top_k", 1.5),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0), ("repetition_penalty", 2.1),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**32), ("max_tokens", 10**400),
        ("max_completion_tokens", 0), ("min_tokens", -1), ("seed", 2**63), ("n", 0), ("n", 129),
        ("stop", ""), ("stop", [""]), ("stop", ["a"] * 33), ("stop", ["a", 1]), ("stop", 5),
        ("stop", "x" * (STOP_CHARS_MAX + 1)),
        ("user", ""), ("stream", "yes"), ("ignore_eos", 1), ("logit_bias", {"a": 1}),
        ("logit_bias", {"²": 1}), ("stream_options", {"include_usage": True}),
        ("top_logprobs", 21), ("top_logprobs", 1), ("tools", [{}] * 1537),
        ("tool_choice", "required"), ("tool_choice", "f"), ("tool_choice", 1),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("guided_choice", []), ("guided_json", "{"), ("guided_json", "[]"), ("guided_regex", 1),
        ("service_tier", "gold"),
        ("reasoning_effort", "most"), ("metadata", []),
        ("nvext", 5),
    ],
)  # fmt: skip
def test_values_that_are_refused_name_their_field(param: str, value: Any) -> None:
    error = refusal(**{param: value})
    assert (error.param, error.code) == (param, "invalid_value")
    assert param in str(error)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("nvext.extra_fields", {"nvext": {"extra_fields": ["nonsense"]}}),
        ("nvext.backend_instance_id", {"nvext": {"backend_instance_id": 2**64}}),
        ("nvext.backend_instance_id", {"nvext": {"backend_instance_id": -1}}),
        ("nvext.prefill_worker_id", {"nvext": {"prefill_worker_id": 2**64}}),
        ("nvext.decode_worker_id", {"nvext": {"decode_worker_id": "5"}}),
        ("nvext.dp_rank", {"nvext": {"dp_rank": 2**32}}),
        ("nvext.prefill_dp_rank", {"nvext": {"prefill_dp_rank": -1}}),
        ("nvext.agent_hints", {"nvext": {"agent_hints": []}}),
        ("nvext.agent_hints.priority", {"nvext": {"agent_hints": {"priority": 2**31}}}),
        ("nvext.agent_hints.priority", {"nvext": {"agent_hints": {"priority": 1.5}}}),
        ("nvext.agent_hints.strict_priority", {"nvext": {"agent_hints": {"strict_priority": -1}}}),
        ("nvext.agent_hints.osl", {"nvext": {"agent_hints": {"osl": 2**32}}}),
        ("nvext.agent_hints.haste", {"nvext": {"agent_hints": {"haste": 1}}}),
        ("nvext.cache_control.type", {"nvext": {"cache_control": {"ttl": "5m"}}}),
        ("nvext.cache_control.type", {"nvext": {"cache_control": {"type": "eternal"}}}),
        ("nvext.cache_control.ttl", {"nvext": {"cache_control": {"type": "ephemeral", "ttl": []}}}),
        *(
            (f"nvext.router_config_override.{name}", {"nvext": {"router_config_override": value}})
            for name, value in (
                ("overlap_score_weight", {"overlap_score_weight": -0.1}),
                ("router_temperature", {"router_temperature": -1}),
                ("router_temperature", {"router_temperature": 1e-300}),
                ("router_temperature", {"router_temperature": 1e300}),
                ("assume_kv_reuse", {"assume_kv_reuse": 1}),
                ("track_prefill_tokens", {"track_prefill_tokens": True}),
            )
        ),
        ("nvext.annotations", {"nvext": {"annotations": ["query_instance_id:7"]}}),
        ("nvext.annotations", {"nvext": {"annotations": ["nonsense"]}}),
        ("nvext.what", {"nvext": {"what": 1}}),
        ("stream_options.x", {"stream": True, "stream_options": {"x": 1}}),
        ("stop[0]", {"stop": [True]}),
        ("min_tokens", {"min_tokens": 2, "max_tokens": 1}),
        ("n", {"n": 2, "temperature": 0}),
        ("tools[0].function", {"tools": [{"type": "function"}]}),
        ("tools[0].type", {"tools": [{**TOOL, "type": "grep"}]}),
        ("tools[1].function.name", {"tools": [TOOL, {**TOOL, "function": {"name": "x" * 97}}]}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}),
        ("guided_regex", {"guided_json": {}, "guided_regex": "a"}),
        ("response_format", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("min_tokens", {"min_tokens": 2, "max_tokens": 9, "max_completion_tokens": 1}),
        ("chat_template_kwargs", {"chat_template_kwargs": {}, "chat_template_args": {}}),
    ],
)
def test_fields_that_do_not_go_together_name_one(param: str, fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert param in str(error)


def test_unknown_fields_are_listed_together() -> None:
    error = refusal(foo=1, bar={"a": []}, temperature=0.5, chat_template="x")
    assert str(error) == "unsupported parameter(s): 'foo', 'bar', 'chat_template'"
    assert (error.param, error.code) == ("foo", "unknown_parameter")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRequest, match="'messages' is required") as raised:
        decode_chat(b'{"model": "m"}')
    assert (raised.value.param, raised.value.code) == ("messages", "missing_field")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": [{}]}, "functions is not available yet"),
        ({"function_call": {"name": "f"}}, 'function_call other than "none" is not available yet'),
        ({"prompt_logprobs": 1}, "prompt_logprobs is not available yet"),
        ({"cache_salt": "s"}, "cache_salt is not available yet"),
        ({"nvext": {"token_data": [1]}}, "nvext.token_data is not available yet"),
        ({"nvext": {"use_raw_prompt": True}}, "nvext.use_raw_prompt other than false"),
        ({"nvext": {"extra_fields": ["token_ids"]}}, "nvext.extra_fields: token_ids"),
        ({"nvext": {"annotations": ["token_ids"]}}, "nvext.annotations: token_ids"),
        (
            {"nvext": {"agent_hints": {"speculative_prefill": True}}},
            "nvext.agent_hints.speculative_prefill other than false is not available yet",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    error = refusal(**fields)
    assert isinstance(error, NotAvailableYet)
    assert message in str(error)
    assert error.code == "not_available_yet"


@pytest.mark.parametrize("name", sorted(LATER[NvExt]))
def test_every_extension_that_is_not_built_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match=f"nvext.{name}"):
        chat(nvext={name: ["something"]})


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"max_completion_tokens": 5},
        {"echo": True, "logprobs": 0},
        {"n": 65, "prompt": ["a", "b"]},
    ],
)
def test_completion_fields_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as raised:
        completion(**fields)
    assert raised.value.param in fields


# --- any bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'\xef\xbb\xbf{"model": "m"}',
        b'{"model": "\xff", "messages": []}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": 1e999}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\x00"}]}',
        b'{"model": "m", "seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "m", "messages": ' + b"[" * 100_000,
        b'{"model": "m", "what": ' + b"[" * 100_000,
        b'{"model": "m", "metadata": ' + b'{"a":' * 100_000,
        b'{"\\ud800": 1}',
        b'{"' + b"x" * 1_000_000 + b'": 1}',
        b'{"model": "m", "messages": [{"role": "' + b"x" * 1_000_000 + b'"}]}',
        b'{"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]} more',
    ],
)
def test_odd_bodies_are_bad_requests_with_short_messages(body: bytes) -> None:
    for decode in (decode_chat, decode_completion):
        with pytest.raises(BadRequest) as raised:
            decode(body)
        assert len(str(raised.value)) < 500
        assert len(raised.value.param or "") < 500


def test_the_last_of_equal_keys_counts() -> None:
    body = b'{"model": "a", "prompt": "x", "model": "b"}'
    assert decode_completion(body).model == "b"


def test_nul_and_unicode_pass() -> None:
    assert completion(prompt="a\x00\U0001f642").prompt == "a\x00\U0001f642"


# --- what becomes of a request --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([0], [[0]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[Prompt]) -> None:
    assert prompts(completion(prompt=prompt)) == expected


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], ["a", ""], [[]], [[1], []], ["a", 1], [1, [1]], ["a"] * (PROMPTS_MAX + 1),
     [-1], [2**32], [[1.5]], [True], None, {}, [None]],
)  # fmt: skip
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as raised:
        completion(prompt=prompt)
    assert (raised.value.param or "").startswith("prompt")


def test_stop_conditions() -> None:
    assert stop_conditions(chat()) == StopConditions()
    request = chat(stop=["a", "b"], stop_token_ids=[7], max_tokens=9, min_tokens=2, ignore_eos=True)
    assert stop_conditions(request) == StopConditions(
        max_tokens=9, min_tokens=2, ignore_eos=True, stop=["a", "b"], stop_token_ids_hidden=[7]
    )
    assert stop_conditions(chat(stop="a")).stop == ["a"]
    assert stop_conditions(chat(stop=[5, 6], stop_token_ids=[6, 7])).stop_token_ids_hidden == [
        5,
        6,
        7,
    ]
    assert stop_conditions(chat(max_tokens=9, max_completion_tokens=5)).max_tokens == 5
    assert stop_conditions(completion(max_tokens=9)).max_tokens == 9


def test_sampling_options_are_what_the_client_gave() -> None:
    assert sampling_options(chat()) == SamplingOptions()
    given = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125, "seed": 7,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
        "logit_bias": {"5": 1.0},
    }  # fmt: skip
    assert msgspec.to_builtins(sampling_options(chat(**given))) == given


def test_the_template_is_told_what_the_client_says() -> None:
    assert template_variables(chat()) == {}
    assert template_variables(chat(reasoning_effort="low")) == {"reasoning_effort": "low"}
    told = template_variables(chat(reasoning_effort="low", chat_template_args={"a": 1}))
    assert told == {"reasoning_effort": "low", "a": 1}
    assert template_variables(chat(chat_template_kwargs={"reasoning_effort": 3})) == {
        "reasoning_effort": 3
    }


def test_a_context_that_is_too_small_says_by_how_much() -> None:
    error = ContextLengthExceeded(9000, 500, 8192, "messages")
    assert (
        str(error)
        == "the model's context is 8192 tokens; the prompt has 9000 and 500 more are asked for"
    )
    assert "more" not in str(ContextLengthExceeded(9000, None, 8192, "prompt"))
