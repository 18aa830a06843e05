"""Whatever bytes a client sends, it gets a request that can be served or a `BadRequest`."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from frontend.errors import BadRequest, TemplateFailed, error_body
from frontend.openai import (
    ChatRequest,
    CompletionRequest,
    decode_chat,
    decode_completion,
    prompts,
    sampling_options,
    stop_conditions,
    template_variables,
)
from frontend.template import ChatTemplate
from frontend.tokenizer import read_files
from tests.text import BYTE_LEVEL, MODEL

TEMPLATE = ChatTemplate.from_files(read_files(MODEL))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**32, 2**63, 2**64, 10**30]),
    st.floats(),  # NaN and the infinities become what Python's json writes for them
    st.text(max_size=8),
    st.sampled_from(["user", "assistant", "text", "\x00", "\ud800", "auto"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.sampled_from(["role", "content", "type", "text"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
contents = st.one_of(
    st.text(max_size=20), st.lists(st.builds(lambda t: {"type": "text", "text": t}, st.text()))
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": contents},
        optional={"name": st.text(max_size=5), "extra": values, "tool_calls": values},
    ),
    min_size=1,
    max_size=4,
)


def bodies(base: st.SearchStrategy[dict[str, Any]], names: tuple[str, ...]) -> Any:
    """Valid bodies with a few fields set to anything at all."""
    fields = st.dictionaries(
        st.one_of(st.sampled_from(names), st.text(max_size=5)), values, max_size=3
    )
    return st.builds(lambda valid, change: json.dumps({**valid, **change}).encode(), base, fields)


chat_bodies = bodies(
    st.builds(lambda m: {"model": "m", "messages": m}, messages), ChatRequest.__struct_fields__
)
completion_bodies = bodies(
    st.just({"model": "m", "prompt": "hi"}), CompletionRequest.__struct_fields__
)


def check_refusal(error: BadRequest) -> None:
    body = json.loads(error_body(error))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    assert len(body["message"]) < 3000


def check_chat(body: bytes) -> None:
    try:
        request = decode_chat(body)
    except BadRequest as error:
        check_refusal(error)
        return
    msgspec.msgpack.encode((stop_conditions(request), sampling_options(request)))
    assert TEMPLATE is not None
    try:
        text = TEMPLATE.render(request.messages, now_ns=0, variables=template_variables(request))
    except TemplateFailed as error:
        check_refusal(error)
        return
    assert BYTE_LEVEL.knows(BYTE_LEVEL.encode(text, add_special_tokens=False))


def check_completion(body: bytes) -> None:
    try:
        request = decode_completion(body)
    except BadRequest as error:
        check_refusal(error)
        return
    msgspec.msgpack.encode((stop_conditions(request), sampling_options(request)))
    for prompt in prompts(request):
        assert prompt
        if isinstance(prompt, str):
            assert BYTE_LEVEL.encode(prompt, add_special_tokens=True)
        else:
            assert all(0 <= token_id < 2**32 for token_id in prompt)


@given(chat_bodies)
def test_a_chat_body_with_any_field_set_to_anything(body: bytes) -> None:
    check_chat(body)


@given(completion_bodies)
def test_a_completion_body_with_any_field_set_to_anything(body: bytes) -> None:
    check_completion(body)


@given(st.one_of(st.binary(max_size=50), values.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_and_any_json(body: bytes) -> None:
    check_chat(body)
    check_completion(body)


@given(st.data(), st.one_of(chat_bodies, completion_bodies))
def test_a_body_damaged_on_its_way(data: st.DataObject, body: bytes) -> None:
    at = data.draw(st.integers(0, len(body)))
    damage = data.draw(st.binary(max_size=4))
    lost = data.draw(st.integers(0, 4))
    damaged = body[:at] + damage + body[at + lost :]
    check_chat(damaged)
    check_completion(damaged)
