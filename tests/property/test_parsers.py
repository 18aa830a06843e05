"""However an output is cut, the same comes out; nothing is lost; what is rendered parses back."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.parsers import (
    Content,
    Delta,
    Message,
    OutputParser,
    Reasoning,
    ToolArguments,
    ToolCallAbandoned,
    ToolCallEnded,
    ToolCallStarted,
    Tools,
    collect,
    output_parser,
)
from frontend.parsers.formats import REASONING_FORMATS, TOOL_FORMATS
from frontend.parsers.json_text import JsonScanner

Arguments = Mapping[str, Any]
Call = tuple[str, Arguments]

# --- rendering, one function a format -------------------------------------------------------------


def as_object(call: Call, arguments_key: str = "arguments") -> str:
    return json.dumps({"name": call[0], arguments_key: call[1]}, ensure_ascii=False)


def as_array(calls: Sequence[Call]) -> str:
    return "[" + ", ".join(map(as_object, calls)) + "]"


def render_hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{as_object(call)}\n</tool_call>" for call in calls)


def render_llama(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + "; ".join(as_object(call, "parameters") for call in calls)


def render_mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS]" + as_array(calls)


def render_mistral_args(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(args)}" for name, args in calls)


def render_deepseek(head: str, before: str, after: str, calls: Sequence[Call]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>{head}{name}{before}{json.dumps(args)}{after}<｜tool▁call▁end｜>"
        for name, args in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


render_deepseek_v3 = partial(render_deepseek, "function<｜tool▁sep｜>", "\n```json\n", "\n```")
render_deepseek_v3_1 = partial(render_deepseek, "", "<｜tool▁sep｜>", "")


def render_kimi(calls: Sequence[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f"{json.dumps(args)}<|tool_call_end|>"
        for index, (name, args) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def render_pythonic(calls: Sequence[Call]) -> str:
    def one(name: str, args: Arguments) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})"

    return "[" + ", ".join(one(*call) for call in calls) + "]"


def render_harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{json.dumps(args)}<|call|>"
        for name, args in calls
    )


def render_qwen3_coder(calls: Sequence[Call]) -> str:
    def one(name: str, args: Arguments) -> str:
        parameters = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n"
            "</parameter>\n"
            for key, value in args.items()
        )
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def render_dsml(calls: Sequence[Call]) -> str:
    def one(name: str, args: Arguments) -> str:
        parameters = "".join(
            f'<｜DSML｜parameter name="{key}" string="{"true" if is_text else "false"}">'
            f"{value if is_text else json.dumps(value)}</｜DSML｜parameter>\n"
            for key, value in args.items()
            for is_text in [isinstance(value, str)]
        )
        return f'<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>\n'

    inner = "".join(one(*call) for call in calls)
    return f"<｜DSML｜function_calls>\n{inner}</｜DSML｜function_calls>"


RENDERED: dict[str, tuple[str, Callable[[Sequence[Call]], str]]] = {
    "hermes": ("hermes", render_hermes),
    "llama3_json": ("llama3_json", render_llama),
    "mistral": ("mistral", render_mistral),
    "mistral with [ARGS]": ("mistral", render_mistral_args),
    "deepseek_v3": ("deepseek_v3", render_deepseek_v3),
    "deepseek_v3_1": ("deepseek_v3_1", render_deepseek_v3_1),
    "kimi_k2": ("kimi_k2", render_kimi),
    "pythonic": ("pythonic", render_pythonic),
    "harmony": ("harmony", render_harmony),
    "qwen3_coder": ("qwen3_coder", render_qwen3_coder),
    "deepseek_v3_2": ("deepseek_v3_2", render_dsml),
    "jamba": ("jamba", lambda calls: f"<tool_calls>{as_array(calls)}</tool_calls>"),
    "guided": ("guided", as_array),
}
NO_TEXT_AROUND = {"harmony", "guided"}

# --- texts ----------------------------------------------------------------------------------------

words = st.text(alphabet="ab c\n.,é😀", max_size=12)
names = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
tricky = st.sampled_from(
    ["}", '{"', "</tool_call>", "<think>", "\\", '"', "\u2028", "\n", "'", ")]"]
)
strings = st.lists(st.one_of(st.text(max_size=4), tricky), max_size=4).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-1e9, 1e9), strings),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)
    ),
    max_leaves=6,
)
a_call = st.tuples(names, st.dictionaries(names.map("p_".__add__), values, max_size=3))
some_calls = st.lists(a_call, min_size=1, max_size=3)

PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<function=f>", "<parameter=a>", "</parameter>", "</function>", "<minimax:tool_call>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", "function", "```json", "```", "<|tool_call_begin|>", "functions.f:0",
    "<|tool_call_argument_begin|>", "<|tool_calls_section_begin|>", "<｜DSML｜function_calls>",
    '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", '<｜DSML｜parameter name="a" string="true">',
    "</｜DSML｜parameter>", "<|start|>assistant", "<|channel|>analysis", "<|channel|>final",
    "<|channel|>commentary to=functions.f", " to=functions.f", "<|message|>", "<|end|>", "<|call|>",
    "<think>", "</think>", "[THINK]", "[/THINK]", "[", "]", "{", "}", ",", ";", "(", ")", '"', "'",
    "\\", "\\u00e9", ":", '{"name": "f", "arguments": {', '{"name": "f", "arguments": {"a": 1}}',
    '{"parameters": {}, "name": "g"}', '"arguments": "{}"}', "f", "[f(a=1)", "g(b='x'", "a=",
    "true", "null", "1", "-2.5e3", "#", " ", "\n", "x" * 130, " " * 70, "hello", "é", "<", "<|",
]  # fmt: skip
soup = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str]:
    """A format, and calls in it of which a part was cut out or replaced."""
    tools_as, render = RENDERED[draw(st.sampled_from([*RENDERED]))]
    text = render(draw(some_calls))
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 8)))
    pieces = draw(st.lists(st.sampled_from(PIECES), max_size=2))
    return tools_as, text[:start] + "".join(pieces) + text[end:]


TOOLS: Tools = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}}},
    "g": {"type": "object", "properties": {"b": {"type": ["integer", "null"]}}},
}
tool_formats = st.sampled_from([*TOOL_FORMATS, "harmony"])
reasoning_formats = st.sampled_from(
    [name for name in REASONING_FORMATS if name not in ("mistral", "minimax_append_think")]
)


def cut(data: st.DataObject, text: str) -> list[str]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def parse(parser: OutputParser, pieces: Iterable[str]) -> list[Delta]:
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return deltas + parser.finish()


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """With adjacent text of one kind as one delta, in the order in which things came."""
    out: list[Delta] = []
    for delta in deltas:
        match delta, out[-1] if out else None:
            case Content(text), Content(before):
                out[-1] = Content(before + text)
            case Reasoning(text), Reasoning(before):
                out[-1] = Reasoning(before + text)
            case ToolArguments(index, text), ToolArguments(_, before):
                out[-1] = ToolArguments(index, before + text)
            case _:
                out.append(delta)
    return out


def well_formed(deltas: Iterable[Delta]) -> bool:
    """Calls start, get arguments and end one after the other, and no text is empty."""
    open_index: int | None = None
    following = 0
    for delta in deltas:
        match delta:
            case Content(text) | Reasoning(text):
                if open_index is not None or not text:
                    return False
            case ToolCallStarted(index):
                if open_index is not None or index != following:
                    return False
                open_index, following = index, index + 1
            case ToolArguments(index, text):
                if index != open_index or not text:
                    return False
            case ToolCallEnded(index) | ToolCallAbandoned(index):
                if index != open_index:
                    return False
                open_index = None
    return open_index is None


# --- laws -----------------------------------------------------------------------------------------


def however_cut(data: st.DataObject, text: str, make: Callable[[], OutputParser]) -> list[Delta]:
    """What the text gives, which is the same in any pieces."""
    expected = joined(parse(make(), [text]))
    assert well_formed(expected)
    assert joined(parse(make(), cut(data, text))) == expected
    assert joined(parse(make(), text)) == expected
    return expected


@settings(max_examples=400)
@given(st.data(), soup, tool_formats, st.one_of(st.none(), reasoning_formats), st.booleans())
def test_the_cut_into_chunks_changes_nothing(
    data: st.DataObject, text: str, tools_as: str, reasoning_as: str | None, whole: bool
) -> None:
    make = partial(
        output_parser,
        tools_as=tools_as,
        reasoning_as=None if tools_as == "harmony" else reasoning_as,
        tools=data.draw(st.sampled_from([None, TOOLS])),
        whole_calls=whole,
    )
    however_cut(data, text, make)


@settings(max_examples=300)
@given(st.data(), damaged(), st.sampled_from([None, "qwen3"]), st.booleans())
def test_the_cut_changes_nothing_in_damaged_calls(
    data: st.DataObject, damaged: tuple[str, str], reasoning_as: str | None, whole: bool
) -> None:
    tools_as, text = damaged
    reasoning_as = None if tools_as == "harmony" else reasoning_as
    make = partial(output_parser, tools_as=tools_as, reasoning_as=reasoning_as, whole_calls=whole)
    message = collect(however_cut(data, text, make))
    assert all(isinstance(json.loads(call.arguments), dict) for call in message.calls)
    if not message.calls and tools_as != "harmony" and "<think>" not in text:
        assert message.content == text


@settings(max_examples=300)
@given(soup, st.sampled_from([*TOOL_FORMATS]))
def test_nothing_is_lost_where_no_call_is(text: str, tools_as: str) -> None:
    """Nothing may be called here."""
    assert collect(parse(output_parser(tools_as=tools_as, tools={}), [text])) == Message(text)


@settings(max_examples=300)
@given(soup, tool_formats, st.booleans())
def test_content_is_the_text_without_calls(text: str, tools_as: str, whole: bool) -> None:
    """In its order, and completed calls are JSON objects."""
    message = collect(parse(output_parser(tools_as=tools_as, whole_calls=whole), [text]))
    rest = iter(text)
    assert all(character in rest for character in message.content)
    assert all(isinstance(json.loads(call.arguments), dict) for call in message.calls)
    if not message.calls and tools_as != "harmony":
        assert message.content == text


@given(st.data(), words, reasoning_formats, tool_formats)
def test_text_without_markers_is_itself(
    data: st.DataObject, text: str, reasoning_as: str, tools_as: str
) -> None:
    parser = output_parser(
        tools_as=tools_as, reasoning_as=None if tools_as == "harmony" else reasoning_as
    )
    message = collect(parse(parser, cut(data, text)))
    inside = tools_as != "harmony" and REASONING_FORMATS[reasoning_as].inside
    # Layout after the opening tag, here in the prompt, is none of the reasoning.
    assert message == (Message(reasoning=text.lstrip(" \n")) if inside else Message(content=text))


@settings(max_examples=25)
@pytest.mark.parametrize("rendered", RENDERED)
@given(data=st.data(), before=words, calls=some_calls, after=words)
def test_rendered_calls_parse_back(
    rendered: str, data: st.DataObject, before: str, calls: list[Call], after: str
) -> None:
    tools_as, render = RENDERED[rendered]
    if rendered in NO_TEXT_AROUND:
        before = after = ""
    if tools_as in ("qwen3_coder", "deepseek_v3_2"):
        # What a value means is in the schema: here of the type that each has.
        schemas: dict[str, Any] = {}
        for name, arguments in calls:
            schema = schemas.setdefault(name, {"properties": {}})
            for key, value in arguments.items():
                kind = "string" if isinstance(value, str) else "any"
                if schema["properties"].setdefault(key, {"type": kind}) != {"type": kind}:
                    return
        tools: Tools | None = schemas
    else:
        tools = None
    text = before + render(calls) + after
    parser = output_parser(tools_as=tools_as, tools=tools)
    message = collect(parse(parser, cut(data, text)))
    parsed = [(call.name, json.loads(call.arguments)) for call in message.calls]
    assert parsed == [(name, dict(arguments)) for name, arguments in calls]
    assert message.content == (before if before.strip() else "") + (after if after.strip() else "")


@given(words, words, names, st.dictionaries(names, values, max_size=3))
def test_arguments_go_out_as_they_come(
    before: str, after: str, name: str, arguments: dict[str, Any]
) -> None:
    """Character by character, each at once: nothing of them is held back."""
    parser = output_parser(tools_as="hermes")
    for character in before + f'<tool_call>{{"name": "{name}", "arguments": ':
        parser.push(character)
    for character in json.dumps(arguments, ensure_ascii=False):
        *start, fragment = parser.push(character)
        assert fragment == ToolArguments(0, character)
        assert all(isinstance(delta, ToolCallStarted) for delta in start)
    assert not [*parser.push("\n")]
    assert parser.push("}") == [ToolCallEnded(0)]


@given(words, st.sampled_from(["hermes", "mistral", "deepseek_v3", "kimi_k2", "qwen3_coder"]))
def test_text_goes_out_as_it_comes(text: str, tools_as: str) -> None:
    """But for the layout that calls may follow."""
    parser = output_parser(tools_as=tools_as)
    sent = ""
    for count, character in enumerate(text, start=1):
        sent += collect(parser.push(character)).content
        assert sent == (text[:count] if text[:count].strip() else "")


json_texts = st.one_of(
    values.map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.lists(
        st.sampled_from(
            [*'{}[],:"\\ue0-+.19Eabt\n ', "true", "false", "null", "NaN", '"a"', "\\u12aF", "\x01"]
        ),
        max_size=8,
    ).map("".join),
)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=dict[str, float]().__getitem__)  # which has no NaN
    except (ValueError, KeyError):
        return False
    return True


@settings(max_examples=400)
@given(st.data(), json_texts)
def test_the_scanner_takes_for_json_what_is_json(data: st.DataObject, text: str) -> None:
    pieces = cut(data, text.rstrip(" \n") + " ")  # a number needs something after it
    scanner = JsonScanner()
    rest = ""
    for piece in pieces:
        rest = piece[scanner.feed(piece, 0, len(piece)) :] if not scanner.complete else rest + piece
        if scanner.invalid:
            break
    assert (scanner.complete and not rest.strip()) == is_json(text)
