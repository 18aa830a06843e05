"""Which parsers read a request's output, by its tools and its model's card."""

import json
from typing import Any

import pytest

from frontend.message import MessageFormat, message_format
from frontend.openai import decode_chat
from workers.card import ModelCard

TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "f"}}


def read_as(tool_choice: Any = None, tools: bool = True, **card: Any) -> MessageFormat | None:
    fields: dict[str, Any] = {"tools": [TOOL]} if tools else {}
    if tool_choice is not None:
        fields["tool_choice"] = tool_choice
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    model = ModelCard(name="m", block_size=16, context_length=64, files={}, **card)
    return message_format(decode_chat(body), model, "prompt", "id")


def test_a_model_without_parsers_and_a_request_without_demands_are_plain() -> None:
    assert read_as() is None
    assert read_as("none", tool_call_parser="hermes") is None
    assert read_as(tools=False, tool_call_parser="hermes") is None


@pytest.mark.parametrize(
    ("card", "choice", "tools_as"),
    [
        ({"tool_call_parser": "hermes"}, None, "hermes"),
        ({"tool_call_parser": "hermes"}, "auto", "hermes"),
        ({"tool_call_parser": "hermes"}, "required", "guided"),
        ({}, "required", "guided"),
        ({}, NAMED, "guided"),
        ({"tool_call_parser": "openai"}, "required", "harmony"),
        ({"reasoning_parser": "gpt-oss"}, NAMED, "harmony"),
        ({"reasoning_parser": "qwen3"}, "none", None),
        ({"reasoning_parser": "qwen3"}, "auto", None),
    ],
)
def test_the_format_that_calls_are_looked_for_in(
    card: dict[str, Any], choice: Any, tools_as: str | None
) -> None:
    form = read_as(choice, **card)
    assert form is not None
    assert (form.tools_as, form.reasoning_as) == (tools_as, card.get("reasoning_parser"))
    assert form.demands_guided == (tools_as == "guided")
    assert form.reader(0).finish() == []


def test_ids_differ_between_calls_and_choices_and_fit_the_models_template() -> None:
    def ids(tool_call_parser: str, text: str) -> list[str]:
        form = read_as(tool_call_parser=tool_call_parser)
        assert form is not None
        found = []
        for choice in range(2):
            reader = form.reader(choice)
            pieces = [*reader.push(text), *reader.finish()]
            found += [piece.id for piece in pieces if hasattr(piece, "id")]
        assert len(set(found)) == len(found) == 4
        return found

    call = '{"name": "f", "arguments": {}}'
    tagged = f"<tool_call>{call}</tool_call>"
    assert all(one.startswith("call-") for one in ids("hermes", tagged + tagged))
    listed = ids("mistral", f"[TOOL_CALLS][{call}, {call}]")
    assert all(len(one) == 9 and one.isalnum() for one in listed)
