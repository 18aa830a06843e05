"""Calls between special tokens or tags: DeepSeek, Kimi, Qwen3-Coder, MiniMax."""

import json
from typing import Any

import pytest

from frontend.parsers import (
    Message,
    ToolArguments,
    ToolCall,
    ToolCallStarted,
    Tools,
    collect,
    output_parser,
)


def parse(text: str, tools_as: str, tools: Tools | None = None) -> Message:
    parser = output_parser(tools_as=tools_as, tools=tools)
    return collect(parser.push(text) + parser.finish())


BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def deepseek(name: str, arguments: str, version: str) -> str:
    if version == "deepseek_v3":
        return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


@pytest.mark.parametrize("version", ["deepseek_v3", "deepseek_v3_1"])
def test_deepseek(version: str) -> None:
    arguments = '{"code": "```json <｜tool▁call▁end｜>"}'
    calls = deepseek("run", arguments, version) + "\n" + deepseek("now", "{}", version)
    message = parse(f"Let me see.{BEGIN}{calls}{END}", version)
    assert message == Message(
        "Let me see.", "", [ToolCall("run", arguments), ToolCall("now", "{}")]
    )


@pytest.mark.parametrize("version", ["deepseek_v3", "deepseek_v3_1"])
def test_deepseek_forgets_ends(version: str) -> None:
    call = deepseek("now", "{}", version)
    for text in (
        call,
        BEGIN + call,
        BEGIN + call.removesuffix(CALL_END) + END,
        BEGIN + call.removesuffix(CALL_END).removesuffix("\n```"),
    ):
        assert parse(text, version) == Message("", "", [ToolCall("now", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        BEGIN,
        BEGIN + END,
        f"{BEGIN}{CALL}now",
        f"{BEGIN}{CALL}now{SEP}[1]{CALL_END}{END}",
        f"{BEGIN}{CALL}two words{SEP}{{}}{CALL_END}{END}",
        f"{BEGIN}{CALL}now{SEP}{{'a': 1}}{CALL_END}{END}",
    ],
)
def test_deepseek_broken(text: str) -> None:
    assert parse(text, "deepseek_v3_1") == Message(text)


def test_kimi_numbers_its_calls() -> None:
    text = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0"
        '<|tool_call_argument_begin|>{"zone": "UTC"}<|tool_call_end|>'
        "<|tool_call_begin|>run:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    )
    assert parse(text, "kimi_k2").calls == [
        ToolCall("now", '{"zone": "UTC"}', "functions.now:0"),
        ToolCall("run", "{}", "run:1"),
    ]


# --- tags around every parameter ------------------------------------------------------------------

EDIT: Tools = {
    "edit": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "line": {"type": "integer"},
            "ratio": {"type": "number"},
            "all": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"type": ["string", "null"]},
            "mode": {"enum": ["fast", "slow"]},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "free": {},
        },
    }
}


def qwen(**parameters: str) -> str:
    inner = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items()
    )
    return f"<tool_call>\n<function=edit>\n{inner}</function>\n</tool_call>"


def edited(**parameters: str) -> Any:
    message = parse(qwen(**parameters), "qwen3_coder", EDIT)
    assert message.content == ""
    return json.loads(message.calls[0].arguments)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("path", "a.py", "a.py"),
        ("path", "12", "12"),
        ("path", '"quoted"\n\n<b>\\n', '"quoted"\n\n<b>\\n'),
        ("path", "", ""),
        ("line", "12", 12),
        ("line", "12.0", 12),
        ("line", "twelve", "twelve"),
        ("line", "9" * 5000, "9" * 5000),
        ("ratio", "1", 1),
        ("ratio", "1e999", "1e999"),
        ("ratio", "NaN", "NaN"),
        ("all", "true", True),
        ("all", "False", False),
        ("tags", '["a", "b"]', ["a", "b"]),
        ("tags", "[" * 5000, "[" * 5000),
        ("note", "null", None),
        ("note", "12", "12"),
        ("note", '"x"', '"x"'),
        ("mode", "fast", "fast"),
        ("limit", "None", None),
        ("limit", "5", 5),
        ("free", '{"a": 1}', {"a": 1}),
        ("free", "text", "text"),
        ("unknown", "5", "5"),
    ],
)
def test_values_are_what_the_schema_says(key: str, text: str, value: Any) -> None:
    assert edited(**{key: text}) == {key: value}


def test_a_string_streams_and_the_rest_comes_whole() -> None:
    parser = output_parser(tools_as="qwen3_coder", tools=EDIT)
    assert parser.push("<tool_call>\n<function=edit>\n") == []
    assert parser.push("<parameter=") == [ToolCallStarted(0, "edit")]
    assert parser.push("path>\nx") == [ToolArguments(0, '{"path": "x')]
    assert parser.push('"y\n') == [ToolArguments(0, '\\"y')]
    assert parser.push("z\n</param") == [ToolArguments(0, "\\nz")]
    assert parser.push("eter>\n<parameter=line>\n1") == [ToolArguments(0, '", "line": ')]
    assert parser.push("2\n") == []
    assert parser.push("</parameter>") == [ToolArguments(0, "12")]


def test_qwen_forgets_the_outer_tags() -> None:
    bare = qwen(path="x").removeprefix("<tool_call>\n")
    for text in (bare, bare.removesuffix("\n</tool_call>"), "Now: " + bare):
        message = parse(text, "qwen3_coder", EDIT)
        assert message.calls == [ToolCall("edit", '{"path": "x"}')]
        assert message.content == ("Now: " if "Now" in text else "")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n<function=",
        "<tool_call>\n<function=edit>\nhello</function></tool_call>",
        "<function=edit>\n<parameter=path>\nunclosed",
        "<function=edit>\n<parameter=path>\nx\n</parameter>\n",
        "<function=edit>\n<parameter=path>x</parameter><parameter=path>y</parameter></function>",
        "<function=delete>\n</function>",
        '{"name": "edit", "arguments": {}}',
    ],
)
def test_qwen_broken(text: str) -> None:
    assert parse(text, "qwen3_coder", EDIT) == Message(text)


def test_a_function_without_parameters() -> None:
    assert parse("<function=edit>\n</function>", "qwen3_coder").calls == [ToolCall("edit", "{}")]


@pytest.mark.parametrize(
    ("tools_as", "section"), [("deepseek_v3_2", "function_calls"), ("deepseek_v4", "tool_calls")]
)
def test_dsml_says_which_values_are_strings(tools_as: str, section: str) -> None:
    text = (
        f'Hm.\n\n<｜DSML｜{section}>\n<｜DSML｜invoke name="edit">\n'
        '<｜DSML｜parameter name="path" string="true">12</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="odd" string="false">[1]</｜DSML｜parameter>\n'
        f'</｜DSML｜invoke>\n<｜DSML｜invoke name="edit">\n</｜DSML｜invoke>\n</｜DSML｜{section}>'
    )
    message = parse(text, tools_as, EDIT)
    calls = [ToolCall("edit", '{"path": "12", "odd": [1]}'), ToolCall("edit", "{}")]
    assert message == Message("Hm.\n\n", "", calls)


def test_minimax() -> None:
    text = (
        '<minimax:tool_call>\n<invoke name="edit">\n<parameter name="path">x y</parameter>\n'
        '<parameter name="line">3</parameter>\n</invoke>\n</minimax:tool_call>'
    )
    message = parse(text, "minimax_m2", EDIT)
    assert message == Message("", "", [ToolCall("edit", '{"path": "x y", "line": 3}')])
