"""Calls written as Python: `[f(a=1), g(b="x")]`, of Llama 3.2 and 4 and others.

What is between the brackets is read as a Python expression and only its literals count: nothing is
looked up and nothing runs. A call goes out when it is whole, its arguments as JSON.
"""

import ast
import re
import warnings

from frontend.parsers.grammar import Output, ToolFormat, to_json
from frontend.parsers.reader import Malformed, Markers, Reader, Steps

PYTHON_CALL_CHARS_MAX = 1 << 16
"""Characters of one call; reading a longer one at once would stall the others."""

NESTING_MAX = 32
"""Brackets within each other."""

_CLOSING = Markers("<|python_end|>")
_SEPARATOR = Markers(",", "]")
_LIST_END = Markers("]")
_PLAIN = re.compile(r"[^'\"#()\[\]{}]*")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_JSON_WORDS = {"true": True, "false": False, "null": None}


def pythonic() -> ToolFormat:
    """A list of calls may begin anywhere in the text."""
    return ToolFormat(("[", "<|python_start|>"), _calls)


def _calls(reader: Reader, output: Output, marker: str) -> Steps[None]:
    reader.widen(PYTHON_CALL_CHARS_MAX)
    reader.pos += len(marker)
    if marker != "[":
        yield from reader.space()
        yield from reader.char("[")
    while True:
        yield from reader.space()
        name = yield from reader.name()
        arguments = _arguments((yield from _brackets(reader)))
        output.start(name)
        output.arguments(arguments)
        output.end()
        reader.mark(PYTHON_CALL_CHARS_MAX)
        if (yield from reader.expect(_SEPARATOR)) == "]":
            break
        if (yield from reader.take(_LIST_END)):
            break
    reader.mark(PYTHON_CALL_CHARS_MAX)
    yield from reader.take(_CLOSING)


def _brackets(reader: Reader) -> Steps[str]:
    """Read `(…)`."""
    yield from reader.space()
    pieces = [(yield from reader.char("("))]
    closers = [")"]
    while closers:
        while True:
            found = _PLAIN.match(reader.text, reader.pos, reader.end)
            assert found is not None
            pieces.append(found.group())
            reader.pos = found.end()
            if reader.pos < reader.end:
                break
            if not (yield from reader.more()):
                raise Malformed
        character = reader.text[reader.pos]
        if character in "'\"":
            yield from _string(reader, character, pieces)
            continue
        reader.pos += 1
        pieces.append(character)
        if character in _CLOSERS:
            if len(closers) == NESTING_MAX:
                raise Malformed
            closers.append(_CLOSERS[character])
        elif character != closers.pop():  # also a comment: its # closes nothing
            raise Malformed
    return "".join(pieces)


def _string(reader: Reader, quote: str, pieces: list[str]) -> Steps[None]:
    """Read a string literal with its quotes, one or three."""
    quotes = 0
    while (yield from reader.peek()) == quote and quotes < 3:
        reader.pos += 1
        pieces.append(quote)
        quotes += 1
    if quotes == 2:
        return  # an empty one
    run = _STRING_RUN[quote]
    closing = 0
    while closing < quotes:
        character = yield from reader.peek()
        if character == quote:
            closing += 1
            reader.pos += 1
            pieces.append(quote)
            continue
        closing = 0
        if character == "\\":
            reader.pos += 1
            escaped = yield from reader.peek()
            if not escaped:
                raise Malformed
            reader.pos += 1
            pieces += ("\\", escaped)
        elif not character or (character == "\n" and quotes == 1):
            raise Malformed
        else:
            found = run.match(reader.text, reader.pos, reader.end)
            assert found is not None
            pieces.append(found.group())
            reader.pos = found.end()


_STRING_RUN = {"'": re.compile(r"\n|[^'\\\n]+"), '"': re.compile(r'\n|[^"\\\n]+')}


def _arguments(text: str) -> str:
    """The arguments in brackets as JSON. Malformed if they are not literals by keyword."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            call = ast.parse("_" + text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise Malformed
        arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if None in arguments or len(arguments) < len(call.keywords):
            raise Malformed  # **, or a name twice
        return to_json(arguments)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Malformed from None


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Constant(value) if value is None or isinstance(value, (str, bool, int, float)):
            return value
        case ast.Name(name) if name in _JSON_WORDS:
            return _JSON_WORDS[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item) for item in items]
        case ast.Dict(keys, values):
            pairs = zip(keys, values, strict=True)
            return {_key(key): _literal(value) for key, value in pairs}
        case _:
            raise Malformed


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Malformed
