"""Calls fenced by special tokens, with arguments in JSON: DeepSeek V3 and V3.1, Kimi K2.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f⏎```json⏎{…}⏎```<｜tool▁call▁end｜>
    … <｜tool▁calls▁end｜>                                                 DeepSeek V3, R1
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜> …      V3.1
<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}
    <|tool_call_end|> … <|tool_calls_section_end|>                        Kimi K2
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from frontend.parsers.grammar import Output, ToolFormat
from frontend.parsers.json_text import json_object
from frontend.parsers.reader import Malformed, Markers, Reader, Steps

Head: TypeAlias = Callable[[Reader], Steps[tuple[str, str | None]]]
"""Reads what is between a call's opening and its arguments: the function's name and a call's id."""


@dataclass(frozen=True, slots=True)
class Fences:
    """The tokens of one format. Sections are optional: models forget them."""

    section_begin: tuple[str, ...]
    section_end: tuple[str, ...]
    call_begin: str
    call_end: str
    head: Head
    arguments_end: tuple[str, ...] = ()
    """Closes the arguments before the call is closed."""


def fenced_calls(fences: Fences) -> ToolFormat:
    """What comes after a call and is no other one ends the section; missing ends are no fault."""
    inner = Markers(fences.call_begin, *fences.section_end)
    arguments_end = Markers(*fences.arguments_end)
    call_end = Markers(fences.call_end)

    def calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
        if marker != fences.call_begin:
            reader.pos += len(marker)
        ended = output.ended
        while True:
            token = yield from reader.take(inner)
            if token != fences.call_begin:
                if output.ended == ended:
                    raise Malformed
                return
            name, call_id = yield from fences.head(reader)
            yield from reader.space()
            if (yield from reader.peek()) != "{":
                raise Malformed
            output.start(name, call_id)
            yield from json_object(reader, output.arguments)
            output.end()
            reader.mark()
            yield from reader.take(arguments_end)
            yield from reader.take(call_end)
            reader.mark()

    return ToolFormat((*fences.section_begin, fences.call_begin), calls)


_SEP = Markers("<｜tool▁sep｜>")
_FUNCTION = Markers("function")
_CODE = Markers("```json")


def _deepseek_v3_head(reader: Reader) -> Steps[tuple[str, None]]:
    yield from reader.expect(_FUNCTION)
    yield from reader.expect(_SEP)
    name = yield from reader.name()
    yield from reader.take(_CODE)
    return name, None


def _deepseek_v3_1_head(reader: Reader) -> Steps[tuple[str, None]]:
    name = yield from reader.name()
    yield from reader.expect(_SEP)
    return name, None


_KIMI_ARGUMENTS = Markers("<|tool_call_argument_begin|>")


def _kimi_head(reader: Reader) -> Steps[tuple[str, str]]:
    """`functions.f:0` is the call's id, and the name is in it."""
    yield from reader.space()
    call_id = yield from reader.name()
    yield from reader.expect(_KIMI_ARGUMENTS)
    name, colon, number = call_id.removeprefix("functions.").rpartition(":")
    return (name if colon and number.isdecimal() else call_id.removeprefix("functions.")), call_id


_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",)
_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"

DEEPSEEK_V3 = Fences(*_DEEPSEEK_SECTION, *_DEEPSEEK_CALL, _deepseek_v3_head, ("```",))
DEEPSEEK_V3_1 = Fences(*_DEEPSEEK_SECTION, *_DEEPSEEK_CALL, _deepseek_v3_1_head)

KIMI_SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
KIMI_K2 = Fences(
    KIMI_SECTION_BEGIN,
    ("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    _kimi_head,
)
