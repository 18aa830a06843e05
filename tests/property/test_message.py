"""A message read from a stream is the one read from the whole text, whatever way it comes."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from frontend.message import MessageFormat, Piece, members, wire
from frontend.parsers import Content, Reasoning

CALL = '<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>'
outputs = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([CALL, CALL[:20], "<think>", "</think>", "[TOOL_CALLS]", "[", "{", "\n"]),
        st.just('[{"name": "f", "parameters": {}}]'),
    ),
    max_size=6,
).map("".join)
formats = st.builds(
    MessageFormat,
    request_id=st.just("r"),
    tools_as=st.sampled_from([None, "hermes", "guided", "mistral"]),
    reasoning_as=st.sampled_from([None, "qwen3", "deepseek_r1"]),
    tools=st.sampled_from([None, {"f": {}}, {}]),
    parallel=st.booleans(),
    prompt_end=st.sampled_from(["", "<think>\n"]),
)


def whole(form: MessageFormat, text: str) -> tuple[list[Piece], str]:
    reader = form.reader(1)
    pieces = [*reader.push(text), *reader.finish()]
    return pieces, reader.finish_reason("stop")


@given(st.data(), formats, outputs)
def test_any_division_makes_the_same_message(
    data: st.DataObject, form: MessageFormat, text: str
) -> None:
    expected, reason = whole(form, text)
    reader = form.reader(1)
    pieces: list[Piece] = []
    rest = text
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        pieces += reader.push(rest[:cut])
        rest = rest[cut:]
    pieces += reader.finish()
    assert members(pieces) == members(expected)
    assert reader.finish_reason("stop") == reason


@given(formats, outputs)
def test_what_the_deltas_add_up_to_is_the_whole_message(form: MessageFormat, text: str) -> None:
    """As a client adds them: texts are joined, calls go by their index."""
    pieces, reason = whole(form, text)
    content, parts = members(pieces)
    told: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    for piece in pieces:
        for key, value in wire(piece).items():
            if key != "tool_calls":
                told[key] += value
                continue
            [call] = value
            assert call["index"] == len(told["tool_calls"])
            told["tool_calls"][call.pop("index")] = call
    assert told["content"] == content
    assert told["reasoning_content"] == parts.get("reasoning_content", "")
    assert list(told["tool_calls"].values()) == parts.get("tool_calls", [])
    calls = told["tool_calls"]
    assert reason == ("tool_calls" if calls else "stop")
    assert all(isinstance(json.loads(c["function"]["arguments"]), dict) for c in calls.values())
    assert len({call["id"] for call in calls.values()}) == len(calls)
    assert form.parallel or len(calls) <= 1
    assert all(piece.text for piece in pieces if isinstance(piece, Content | Reasoning))
