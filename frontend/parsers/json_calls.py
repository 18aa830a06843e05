"""Calls that are JSON objects with a name and arguments: hermes, llama3_json, mistral and kin.

    <tool_call>{"name": "f", "arguments": {…}}</tool_call>      hermes (also Qwen 2.5 and 3)
    <|python_tag|>{"name": "f", "parameters": {…}}; {…}         llama3_json, also without the tag
    [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]            mistral, older
    [TOOL_CALLS]f[CALL_ID]123abc789[ARGS]{…}[TOOL_CALLS]…       mistral, newer; the middle optional

The arguments go on as the model wrote them, from the moment the name is known. Arguments that are a
string which holds an object (some models encode twice) are that object, null is an empty one.
"""

from frontend.parsers.grammar import Output, ToolFormat
from frontend.parsers.json_text import is_object, json_object, json_string, json_value
from frontend.parsers.reader import Malformed, Markers, Reader, Steps

_KNOWN_KEYS = frozenset({"name", "arguments", "parameters", "id", "type"})
_ARGUMENTS_KEYS = frozenset({"arguments", "parameters"})
_FOLLOWING = Markers("{", ";", ",")


def call_object(reader: Reader, output: Output, known_keys_only: bool) -> Steps[None]:
    """Read `{"name": …, "arguments": …}`, the keys in any order, `parameters` for `arguments`.

    Both are needed. known_keys_only: another key makes it malformed; else it is skipped. An id
    counts if it comes before the arguments.
    """
    name: str | None = None
    call_id: str | None = None
    held: str | None = None  # arguments that came before the name
    started = False
    yield from reader.char("{")
    yield from reader.space()
    while True:
        key = yield from json_string(reader)
        if known_keys_only and key not in _KNOWN_KEYS:
            raise Malformed
        yield from reader.space()
        yield from reader.char(":")
        yield from reader.space()
        if key == "name" and name is None:
            name = yield from json_string(reader)
        elif key in _ARGUMENTS_KEYS and held is None and not started:
            if name is not None and (yield from reader.peek()) == "{":
                output.start(name, call_id)
                started = True
                yield from json_value(reader, output.arguments)
            else:
                held = yield from _held_arguments(reader)
        elif key == "id" and (yield from reader.peek()) == '"':
            call_id = yield from json_string(reader)
        elif key in _ARGUMENTS_KEYS or key == "name":
            raise Malformed  # a second time
        else:
            yield from json_value(reader, _skip)
        if held is not None and name is not None and not started:
            output.start(name, call_id)
            output.arguments(held)
            started = True
        yield from reader.space()
        if (yield from reader.char(",}")) == "}":
            break
        yield from reader.space()
    if not started:
        raise Malformed
    output.end()


def _skip(text: str) -> None:
    """Takes what is not needed."""


def _held_arguments(reader: Reader) -> Steps[str]:
    pieces: list[str] = []
    following = yield from reader.peek()
    if following == '"':
        text = (yield from json_string(reader)).strip()
    else:
        yield from json_value(reader, pieces.append)
        text = "".join(pieces)
    if text == "null":
        return "{}"
    if not is_object(text):
        raise Malformed
    return text


def call_objects(reader: Reader, output: Output, known_keys_only: bool) -> Steps[None]:
    """Read an array of calls, or a call and those that follow it, with or without `;` or `,`.

    Every call is for itself: what is malformed after it does not undo it.
    """
    if (yield from reader.peek()) == "[":
        reader.pos += 1
        yield from reader.space()
        while True:
            yield from call_object(reader, output, known_keys_only)
            reader.mark()
            yield from reader.space()
            if (yield from reader.char(",]")) == "]":
                return
            yield from reader.space()
    while True:
        yield from call_object(reader, output, known_keys_only)
        reader.mark()
        following = yield from reader.take(_FOLLOWING)
        if not following:
            return
        if following != "{":
            yield from reader.space()
            if (yield from reader.peek()) != "{":
                raise Malformed
        else:
            reader.pos -= 1


def tagged_json(*openings: str, closing: str | None = None, bare: bool = False) -> ToolFormat:
    """Calls after one of the opening tags. closing: may end them; None: there is no such tag.

    bare: where the content begins, or calls have just ended, calls need no tag. Then other keys
    than a call's mean that the object is an answer in JSON.
    """
    closed = Markers() if closing is None else Markers(closing)

    def calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
        tagged = marker in openings
        if tagged:
            reader.pos += len(marker)
            yield from reader.space()
        yield from call_objects(reader, output, known_keys_only=not tagged)
        reader.mark()
        yield from reader.take(closed)

    return ToolFormat(openings, calls, _BARE if bare else ())


_BARE = ("{", "[")


def bare_json() -> ToolFormat:
    """A call or an array of calls without any markup: what guided decoding makes the model write
    when the request demands a call."""

    def calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
        yield from call_objects(reader, output, known_keys_only=True)

    return ToolFormat((), calls, _BARE)


_MISTRAL_HEAD = Markers("[CALL_ID]", "[ARGS]")


def mistral() -> ToolFormat:
    """Both forms, told apart by what follows the tag."""
    return ToolFormat(("[TOOL_CALLS]",), _mistral_calls)


def _mistral_calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
    reader.pos += len(marker)
    yield from reader.space()
    following = yield from reader.peek()
    if following and following in "[{":
        yield from call_objects(reader, output, known_keys_only=False)
        return
    name = yield from reader.name()
    call_id = None
    tag = yield from reader.take(_MISTRAL_HEAD)
    if tag == "[CALL_ID]":
        call_id = yield from reader.name()
        tag = yield from reader.take(_MISTRAL_HEAD)
    if tag == "[CALL_ID]":
        raise Malformed
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise Malformed
    output.start(name, call_id)
    yield from json_object(reader, output.arguments)
    output.end()
