"""Calls written as Python."""

import json
from typing import Any

import pytest

from frontend.parsers import Message, ToolCall, collect, output_parser


def parse(text: str) -> Message:
    parser = output_parser(tools_as="pythonic")
    return collect(parser.push(text) + parser.finish())


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("'it\\'s'", "it's"),
        ("\"a\" 'b'", "ab"),
        ('"""two\nlines, "quoted" """', 'two\nlines, "quoted" '),
        ("r'\\d'", "\\d"),
        ("'\\d'", "\\d"),
        ("'[f(a=1)]'", "[f(a=1)]"),
        ("-1.5", -1.5),
        ("0x10", 16),
        ("True", True),
        ("null", None),
        ("(1, [2], {'k': {'l': ()}})", [1, [2], {"k": {"l": []}}]),
        ("'\\ud800'", "\ud800"),
    ],
)
def test_literals(value: str, meaning: Any) -> None:
    message = parse(f"[f(a={value}), g.h()]")
    assert message.content == ""
    assert [call.name for call in message.calls] == ["f", "g.h"]
    assert json.loads(message.calls[0].arguments) == {"a": meaning}
    assert message.calls[0].arguments.encode()


def test_names_need_not_be_python() -> None:
    assert parse("[get-weather(city='Rome'), import()]").calls == [
        ToolCall("get-weather", '{"city": "Rome"}'),
        ToolCall("import", "{}"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[a link](https://example.org)",
        "[1, 2, 3]",
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=open('x'))]",
        "[f(a=().__class__)]",
        "[f(a=1+1)]",
        "[f(a=1, a=2)]",
        "[f(**{'a': 1})]",
        "[f(a=f'{x}')]",
        "[f(a=b'x')]",
        "[f(a=1j)]",
        "[f(a=1e999)]",
        "[f(a={1: 2})]",
        "[f(a={1, 2})]",
        "[f(a='unclosed)]",
        "[f(a='line\nend')]",
        "[f(a=(1]",
        "[f(a=1 # comment\n)]",
        "[f(a=[" + "[" * 40 + "]" * 40 + "])]",
        "[f(a=" + "-" * 30000 + "1)]",
        "[f(a=" + "not " * 8000 + "1)]",
        "[f(a=" + "1+" * 15000 + "1)]",
        "[f(a=" + "9" * 5000 + ")]",
        "[f(a='\0')]",
        "[" + "f" * 200 + "()]",
        "[ ",
        "[",
    ],
)
def test_what_is_no_call_with_literals_is_content(text: str) -> None:
    assert parse(text) == Message(text)


def test_calls_within_text_and_between_tags() -> None:
    text = "First <|python_start|>[f(a=1),]<|python_end|> then [g()] done"
    calls = [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")]
    assert parse(text) == Message("First  then  done", "", calls)


def test_a_list_that_breaks_off_keeps_its_first_calls() -> None:
    assert parse("[f(a=1), g(b=") == Message(", g(b=", "", [ToolCall("f", '{"a": 1}')])
