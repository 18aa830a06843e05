"""Calls with tags around every parameter: Qwen3-Coder, MiniMax M2, DeepSeek V3.2 and V4.

    <tool_call><function=f><parameter=a>⏎value⏎</parameter></function></tool_call>   qwen3_coder
    <minimax:tool_call><invoke name="f"><parameter name="a">value</parameter></invoke> …
    <｜DSML｜function_calls><｜DSML｜invoke name="f">
        <｜DSML｜parameter name="a" string="true">value</｜DSML｜parameter></｜DSML｜invoke> …

The values are plain text; what they mean is in the tool's JSON schema. Text for a string goes on as
it comes; other values when they are whole. Without a schema, and where the text is no JSON of the
type that the schema wants, it is a string.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frontend.parsers.grammar import Output, ToolFormat, to_json
from frontend.parsers.reader import Malformed, Markers, Reader, Sink, Steps


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one format. A tag that holds a name is given by what is around the name."""

    opening: str
    closing: str
    call: tuple[str, str]
    call_end: str
    parameter: str
    parameter_head: dict[str, bool | None]
    """What follows a parameter's name → whether it says that the value is a string (None: no)."""
    parameter_end: str
    own_line: bool
    """One line end on either side of a value is layout."""


QWEN3_CODER = Tags(
    opening="<tool_call>",
    closing="</tool_call>",
    call=("<function=", ">"),
    call_end="</function>",
    parameter="<parameter=",
    parameter_head={">": None},
    parameter_end="</parameter>",
    own_line=True,
)
MINIMAX_M2 = Tags(
    opening="<minimax:tool_call>",
    closing="</minimax:tool_call>",
    call=('<invoke name="', '">'),
    call_end="</invoke>",
    parameter='<parameter name="',
    parameter_head={'">': None},
    parameter_end="</parameter>",
    own_line=True,
)


def dsml(section: str) -> Tags:
    """DeepSeek's markup; V3.2 calls the section function_calls, V4 tool_calls."""
    return Tags(
        opening=f"<｜DSML｜{section}>",
        closing=f"</｜DSML｜{section}>",
        call=('<｜DSML｜invoke name="', '">'),
        call_end="</｜DSML｜invoke>",
        parameter='<｜DSML｜parameter name="',
        parameter_head={'" string="true">': True, '" string="false">': False},
        parameter_end="</｜DSML｜parameter>",
        own_line=False,
    )


_KEY = re.compile(r'[^<>"\r\n]*')
"""A parameter's name."""


def xml_calls(tags: Tags) -> ToolFormat:
    """A call needs no section around it: models forget that."""
    call_begin, call_head_end = tags.call
    inner = Markers(call_begin, tags.closing)
    head_end = Markers(call_head_end)
    parts = Markers(tags.parameter, tags.call_end)
    parameter_head = Markers(*tags.parameter_head)
    parameter_end = Markers(tags.parameter_end)

    def calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
        if marker != call_begin:
            reader.pos += len(marker)
        ended = output.ended
        while True:
            tag = yield from reader.take(inner)
            if tag != call_begin:
                if output.ended == ended:
                    raise Malformed
                return
            yield from call(reader, output)
            reader.mark()

    def call(reader: Reader, output: Output) -> Steps[None]:
        name = yield from reader.name()
        yield from reader.expect(head_end)
        part = yield from reader.expect(parts)
        output.start(name)
        properties = _properties(output, name)
        seen: set[str] = set()
        while part == tags.parameter:
            key, says_string = yield from parameter(reader)
            if key in seen:
                raise Malformed
            output.arguments(("{" if not seen else ", ") + to_json(key) + ": ")
            seen.add(key)
            types = {"string"} if key not in properties else _types(properties[key])
            if says_string is not None:
                types = {"string"} if says_string else types - {"string"} or {"any"}
            yield from value(reader, output, types)
            part = yield from reader.expect(parts)
        output.arguments("}" if seen else "{}")
        output.end()

    def parameter(reader: Reader) -> Steps[tuple[str, bool | None]]:
        key = yield from reader.name(_KEY)
        return key, tags.parameter_head[(yield from reader.expect(parameter_head))]

    def value(reader: Reader, output: Output, types: set[str]) -> Steps[None]:
        pieces: list[str] = []
        streamed = types == {"string"}
        if streamed:
            output.arguments('"')
        sink = _escaped(output) if streamed else pieces.append
        lines = _WithoutOuterLineEnds(sink) if tags.own_line else None
        found = yield from reader.until(parameter_end, sink if lines is None else lines.feed)
        if not found:
            raise Malformed
        reader.pos += len(found)
        output.arguments('"' if streamed else _typed("".join(pieces), types))

    return ToolFormat((tags.opening, call_begin), calls)


def _escaped(output: Output) -> Sink:
    def sink(text: str) -> None:
        output.arguments(to_json(text)[1:-1])

    return sink


class _WithoutOuterLineEnds:
    """Passes a text on without a line end at its beginning and one at its end."""

    __slots__ = ("_begun", "_held", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._begun = False
        self._held = ""

    def feed(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        if text := text.removesuffix("\n"):
            self._sink(text)


def _properties(output: Output, name: str) -> Mapping[str, Any]:
    properties = (output.tools or {}).get(name, {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _types(schema: object) -> set[str]:
    """The JSON types that a schema allows; "any" for one that can't be told so simply."""
    if not isinstance(schema, Mapping):
        return {"any"}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            options = [option for option in schema[key] if isinstance(option, Mapping)]
            return {str(option.get("type", "any")) for option in options} or {"any"}
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {str(name) for name in types}
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return {_type_of(value) for value in schema["enum"]}
    return {"any"}


_PYTHON = {"True": True, "False": False, "None": None}
"""Words that templates write for JSON's, when they print Python values."""


def _typed(text: str, types: set[str]) -> str:
    """The value that a text stands for, as JSON."""
    stripped = text.strip()
    try:
        value = _PYTHON[stripped] if stripped in _PYTHON else json.loads(stripped)
        found = _type_of(value)
        wanted = found in types or "any" in types or (found == "integer" and "number" in types)
        # A string that is allowed is meant as it stands, quotes included.
        if wanted and not (found == "string" and "string" in types):
            return to_json(value)
        if isinstance(value, float) and value.is_integer() and "integer" in types:
            return to_json(int(value))
    except (ValueError, RecursionError):
        pass
    return to_json(text)


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
