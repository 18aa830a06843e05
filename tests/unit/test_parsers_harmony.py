"""gpt-oss: channels, recipients and calls."""

import pytest

from frontend.parsers import (
    Content,
    Message,
    Reasoning,
    ToolArguments,
    ToolCall,
    ToolCallEnded,
    ToolCallStarted,
    collect,
    output_parser,
)

NEXT = "<|start|>assistant"
CALL = ToolCall("get_weather", '{"city": "Oslo"}')


def parse(text: str, tools_as: str | None = "harmony", reasoning_as: str | None = None) -> Message:
    parser = output_parser(tools_as=tools_as, reasoning_as=reasoning_as)
    return collect(parser.push(text) + parser.finish())


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|message|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.get_weather code<|message|>",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", ""])
def test_a_call_after_reasoning(header: str, end: str) -> None:
    reasoning = "<|channel|>analysis<|message|>Need the weather.<|end|>" + NEXT
    body = '{"city": "Oslo"}'
    assert parse(reasoning + header + body + end) == Message("", "Need the weather.", [CALL])
    assert parse(header + body + end) == Message("", "", [CALL])


def test_an_answer_in_its_deltas() -> None:
    parser = output_parser(tools_as="harmony", reasoning_as="gpt_oss")
    assert parser.push("<|channel|>ana") == []
    assert parser.push("lysis<|message|>Hm") == [Reasoning("Hm")]
    assert parser.push(".<|end|><|start|>assistant<|channel|>final<|message|>H") == [
        Reasoning("."),
        Content("H"),
    ]
    assert parser.push("i <|ret") == [Content("i ")]
    assert parser.push("urn|>") == []
    assert parser.finish() == []


def test_several_calls_with_a_preamble() -> None:
    one = '<|channel|>commentary to=functions.f<|message|>{"a": "<|call|>"}<|call|>'
    text = "<|channel|>commentary<|message|>I'll do both.<|end|>" + NEXT + one + NEXT + one
    calls = [ToolCall("f", '{"a": "<|call|>"}')] * 2
    assert parse(text) == Message("I'll do both.", "", calls)


def test_arguments_stream() -> None:
    parser = output_parser(tools_as="harmony")
    assert parser.push("<|channel|>commentary to=functions.f<|message|>") == []
    assert parser.push('{"a') == [ToolCallStarted(0, "f"), ToolArguments(0, '{"a')]
    assert parser.push('": 1}') == [ToolArguments(0, '": 1}'), ToolCallEnded(0)]


def test_a_missing_end_is_no_fault() -> None:
    text = "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi"
    assert parse(text) == Message("Hi", "Hm")


def test_what_can_not_be_called_here_stays_as_it_is() -> None:
    text = "<|channel|>analysis to=python code<|message|>print(1)"
    assert parse(text + "<|call|>") == Message(text)
    text = '<|channel|>commentary to=functions.f<|message|>{"a": 1}'
    assert parse(text + "<|call|>", tools_as=None, reasoning_as="gpt_oss") == Message(text)


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "to be <|or|> not",
        " to=functions.f and no message",
        "<|channel|>final",
        "<|channel|>" + "x" * 600 + "<|message|>",
        "<|channel|>commentary to=functions.f<|message|>no json",
        '<|channel|>commentary to=functions.f<|message|>{"a": 1',
    ],
)
def test_what_is_no_message_is_content(text: str) -> None:
    assert parse(text) == Message(text)
