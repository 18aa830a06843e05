"""Reasoning, the formats' names, finish reasons, bounds."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from frontend.parsers import (
    Content,
    Message,
    Reasoning,
    ToolCall,
    UnknownFormat,
    collect,
    finish_reason,
    output_parser,
    reasoning_format,
    tool_format,
)
from frontend.parsers.formats import (
    REASONING_ALIASES,
    REASONING_FORMATS,
    TOOL_ALIASES,
    TOOL_FORMATS,
)
from frontend.parsers.grammar import GrammarParser
from frontend.parsers.pythonic import PYTHON_CALL_CHARS_MAX
from frontend.parsers.reader import CALL_CHARS_MAX, LAYOUT_CHARS_MAX


def parse(text: str, **options: Any) -> Message:
    parser = output_parser(**options)
    return collect(parser.push(text) + parser.finish())


# --- reasoning ------------------------------------------------------------------------------------


def test_tags_split_over_tokens() -> None:
    parser = output_parser(reasoning_as="qwen3")
    assert parser.push("<thi") == []
    assert parser.push("nk>\nLet me") == [Reasoning("Let me")]
    assert parser.push(" see. </") == [Reasoning(" see. ")]
    assert parser.push("b></thin") == [Reasoning("</b>")]
    assert parser.push("k>\n\nHi") == [Content("Hi")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("basic", "<think>why</think>so"),
        ("deepseek_r1", "why</think>so"),
        ("deepseek_r1", "<think>\nwhy</think>\n\nso"),
        ("mistral", "[THINK]why[/THINK]so"),
        ("kimi", "◁think▷why◁/think▷so"),
        ("granite", "Here is my thought process: whyHere's my response: so"),
        ("seed_oss", "<seed:think>why</seed:think>so"),
        (
            "cohere_command3",
            "<|START_THINKING|>why<|END_THINKING|><|START_RESPONSE|>so<|END_RESPONSE|>",
        ),
    ],
)
def test_reasoning_of_many_models(name: str, text: str) -> None:
    assert parse(text, reasoning_as=name) == Message("so", "why")


@pytest.mark.parametrize(
    ("name", "prompt", "text", "message"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", "why</think>so", Message("so", "why")),
        ("qwen3", "<|im_start|>assistant\n", "so", Message("so")),
        ("qwen3", "", "why</think>so", Message("why</think>so")),
        ("deepseek_r1", "<｜Assistant｜><think>\n\n</think>\n\n", "so", Message("so")),
        ("deepseek_r1", "<｜Assistant｜>", "cut off", Message("", "cut off")),
    ],
)
def test_the_prompt_may_open_or_close_reasoning(
    name: str, prompt: str, text: str, message: Message
) -> None:
    assert parse(text, reasoning_as=name, prompt=prompt) == message


def test_reasoning_then_calls_then_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"t": "<think>"}}</tool_call>'
    text = f"<think>one <tool_call></think>\n{call}\n<think>\ntwo</think>\n\nok"
    message = parse(text, tools_as="hermes", reasoning_as="qwen3")
    assert message == Message("ok", "one <tool_call>two", [ToolCall("f", '{"t": "<think>"}')])


def test_kimi_calls_end_its_reasoning() -> None:
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )
    message = parse("hm " + call, tools_as="kimi_k2", reasoning_as="kimi_k2")
    assert message == Message("", "hm ", [ToolCall("f", "{}", "functions.f:0")])


def test_minimax_leaves_reasoning_in_the_content() -> None:
    name = "minimax_append_think"
    assert parse("hm</think>ok", reasoning_as=name) == Message("<think>hm</think>ok")
    assert parse("", reasoning_as=name) == Message()


# --- names ----------------------------------------------------------------------------------------


def test_names_in_any_spelling() -> None:
    assert tool_format("Qwen25") == tool_format("hermes") == "hermes"
    assert tool_format("gpt-oss") == "harmony"
    assert tool_format("DeepSeek-V3.1".replace(".", "_")) == "deepseek_v3_1"
    assert reasoning_format("deepseek-r1") == "deepseek_r1"
    assert reasoning_format("openai_gptoss") == "gpt_oss"
    assert {*TOOL_ALIASES.values()} <= {*TOOL_FORMATS, "harmony"}
    assert {*REASONING_ALIASES.values()} <= {*REASONING_FORMATS, "gpt_oss"}


def test_unknown_names_and_odd_pairs() -> None:
    with pytest.raises(UnknownFormat, match=r"unknown tool parser 'cobol'; known are .*hermes"):
        tool_format("cobol")
    with pytest.raises(UnknownFormat, match="unknown reasoning parser"):
        output_parser(reasoning_as="cobol")
    with pytest.raises(UnknownFormat, match="harmony and qwen3 are of different models"):
        output_parser(tools_as="harmony", reasoning_as="qwen3")
    with pytest.raises(UnknownFormat, match="pythonic does not go with mistral"):
        output_parser(tools_as="pythonic", reasoning_as="mistral")


def test_all_pairs_that_go_together() -> None:
    for tools_as in [None, *TOOL_FORMATS]:
        for reasoning_as in [None, *REASONING_FORMATS]:
            if (tools_as, reasoning_as) != ("pythonic", "mistral"):
                output_parser(tools_as=tools_as, reasoning_as=reasoning_as)


def test_without_formats_all_is_content() -> None:
    assert parse("<think>[TOOL_CALLS]") == Message("<think>[TOOL_CALLS]")
    assert output_parser().push("") == []


@pytest.mark.parametrize(
    ("reason", "completed", "expected"),
    [
        ("stop", 0, "stop"),
        ("stop", 2, "tool_calls"),
        ("length", 1, "tool_calls"),
        ("length", 0, "length"),
        ("content_filter", 1, "content_filter"),
    ],
)
def test_finish_reason(reason: str, completed: int, expected: str) -> None:
    assert finish_reason(reason, completed) == expected


# --- bounds and work ------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 21, 1000])
@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize(
    ("tools_as", "before", "after", "limit"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', '"}}', CALL_CHARS_MAX),
        ("qwen3_coder", "<function=f><parameter=a>", "</parameter></function>", CALL_CHARS_MAX),
        ("pythonic", "[f(a='", "')", PYTHON_CALL_CHARS_MAX),
    ],
)
def test_a_call_is_as_long_as_its_limit_and_no_longer(
    tools_as: str, before: str, after: str, limit: int, excess: int, piece: int
) -> None:
    text = before + "x" * (limit - len(before + after) + excess) + after
    parser = output_parser(tools_as=tools_as)
    deltas = [
        delta
        for start in range(0, len(text), piece)
        for delta in parser.push(text[start : start + piece])
    ]
    message = collect(deltas + parser.finish())
    if excess:
        assert message == Message(text)
    else:
        assert (message.content, len(message.calls)) == ("", 1)


def test_layout_that_does_not_end_is_text() -> None:
    parser = output_parser(tools_as="hermes")
    assert parser.push(" " * LAYOUT_CHARS_MAX) == []
    assert parser.push(" ") == [Content(" " * LAYOUT_CHARS_MAX + " ")]


def work(parser: GrammarParser, pieces: list[str]) -> int:
    """Calls made by the parser, of Python and C functions, and characters that it copies."""
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")

    before: Callable[..., object] | None = sys.getprofile()
    sys.setprofile(count)
    try:
        for piece in pieces:
            parser.push(piece)
            steps += parser.held_chars
        parser.finish()
    finally:
        sys.setprofile(before)
    return steps


@pytest.mark.parametrize(
    ("tools_as", "text"),
    [
        ("hermes", "word "),
        ("hermes", "<tool_call"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, 2, "x"]}}</tool_call>'),
        ("hermes", "\\u0041"),
        ("llama3_json", '{"name": "f", "parameters": {}} '),
        ("mistral", "[TOOL_CALLS]f"),
        ("pythonic", "[f("),
        ("pythonic", "[f(a='b"),
        ("pythonic", "[f(a=1)] "),
        ("qwen3_coder", "<function=f><parameter=a>"),
        ("kimi_k2", "<|tool_call_begin|>f:0"),
        ("harmony", "<|start|>assistant<|channel|>final<|message|>"),
        ("harmony", "<|channel|>"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_work_is_linear(tools_as: str, text: str, piece: int) -> None:
    before = '<tool_call>{"name": "f", "arguments": {"a": "' if text.startswith("\\") else ""

    def of(repeats: int) -> int:
        whole = before + text * repeats
        pieces = [whole[start : start + piece] for start in range(0, len(whole), piece)]
        parser = output_parser(tools_as=tools_as)
        assert isinstance(parser, GrammarParser)
        return work(parser, pieces)

    assert of(160) <= 9 * of(20)
