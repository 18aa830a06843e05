"""JSON while it is being written: where a value ends, and whether it is one."""

import json
import re
from enum import IntEnum, auto

from frontend.parsers.reader import Malformed, Reader, Sink, Steps

NESTING_MAX = 128
"""Objects and arrays within each other; deeper text is not taken for JSON, as the common readers
recurse."""

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_DIGITS = re.compile(r"[0-9]*")
_HEX = frozenset("0123456789abcdefABCDEF")


class _State(IntEnum):
    """What the next character is part of."""

    VALUE = auto()
    FIRST_VALUE = auto()  # a value, or the end of an empty array
    KEY = auto()
    FIRST_KEY = auto()  # a key, or the end of an empty object
    COLON = auto()
    NEXT = auto()  # a comma, or the end of the container
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    LITERAL = auto()
    MINUS = auto()  # a number's first digit, after its sign
    ZERO = auto()  # a leading zero was read
    INTEGER = auto()
    POINT = auto()  # the first digit after the point
    FRACTION = auto()
    EXPONENT = auto()  # its sign or first digit
    EXPONENT_SIGN = auto()  # its first digit, after the sign
    EXPONENT_DIGITS = auto()


_BETWEEN = frozenset(
    {
        _State.VALUE,
        _State.FIRST_VALUE,
        _State.KEY,
        _State.FIRST_KEY,
        _State.COLON,
        _State.NEXT,
    }
)
"""Where spaces may be."""

_NUMBER: dict[_State, dict[str, _State]] = {
    _State.MINUS: {"0": _State.ZERO, **dict.fromkeys("123456789", _State.INTEGER)},
    _State.ZERO: {".": _State.POINT, "e": _State.EXPONENT, "E": _State.EXPONENT},
    _State.INTEGER: {".": _State.POINT, "e": _State.EXPONENT, "E": _State.EXPONENT},
    _State.POINT: dict.fromkeys("0123456789", _State.FRACTION),
    _State.FRACTION: {"e": _State.EXPONENT, "E": _State.EXPONENT},
    _State.EXPONENT: {
        **dict.fromkeys("+-", _State.EXPONENT_SIGN),
        **dict.fromkeys("0123456789", _State.EXPONENT_DIGITS),
    },
    _State.EXPONENT_SIGN: dict.fromkeys("0123456789", _State.EXPONENT_DIGITS),
    _State.EXPONENT_DIGITS: {},
}
_NUMBER_MAY_END = frozenset({_State.ZERO, _State.INTEGER, _State.FRACTION, _State.EXPONENT_DIGITS})
_DIGIT_RUNS = frozenset({_State.INTEGER, _State.FRACTION, _State.EXPONENT_DIGITS})
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}


class JsonScanner:
    """Follows one JSON value (RFC 8259, nothing more lenient) through a text in pieces.

    complete: the value has ended; a number only once something else follows. invalid: the text is
    no JSON from the character on at which `feed` stopped. Memory: one character per open container.
    """

    __slots__ = ("_closers", "_in_key", "_rest", "_state", "complete", "invalid")

    def __init__(self) -> None:
        self.complete = False
        self.invalid = False
        self._state = _State.VALUE
        self._closers: list[str] = []
        self._in_key = False
        self._rest = ""  # of a literal or, in any characters, of a \u escape

    def feed(self, text: str, pos: int, end: int) -> int:
        """Up to where text[pos:end] belongs to the value. O(characters)."""
        while pos < end and not self.complete:
            state = self._state
            if state is _State.STRING:
                found = _STRING_RUN.match(text, pos, end)
                assert found is not None
                pos = found.end()
                if pos == end:
                    break
            elif state in _BETWEEN:
                found = _SPACE.match(text, pos, end)
                assert found is not None
                pos = found.end()
                if pos == end:
                    break
            elif state in _NUMBER:
                if state in _DIGIT_RUNS:
                    found = _DIGITS.match(text, pos, end)
                    assert found is not None
                    pos = found.end()
                    if pos == end:
                        break
                following = _NUMBER[state].get(text[pos])
                if following is not None:
                    self._state = following
                    pos += 1
                    continue
                if state in _NUMBER_MAY_END:
                    self._value_ended()  # and the character is read as what follows it
                    continue
                self.invalid = True
                break
            if not self._step(state, text[pos]):
                self.invalid = True
                break
            pos += 1
        return pos

    def _step(self, state: _State, character: str) -> bool:
        """Read a character that is no part of a run or a number; False if it can't be here."""
        match state:
            case _State.STRING:
                if character == "\\":
                    self._state = _State.ESCAPE
                elif character != '"':
                    return False
                elif self._in_key:
                    self._in_key = False
                    self._state = _State.COLON
                else:
                    self._value_ended()
            case _State.ESCAPE:
                if character == "u":
                    self._rest = "0000"
                    self._state = _State.HEX
                elif character in '"\\/bfnrt':
                    self._state = _State.STRING
                else:
                    return False
            case _State.HEX:
                self._rest = self._rest[1:]
                if not self._rest:
                    self._state = _State.STRING
                return character in _HEX
            case _State.LITERAL:
                if character != self._rest[0]:
                    return False
                self._rest = self._rest[1:]
                if not self._rest:
                    self._value_ended()
            case _State.COLON:
                self._state = _State.VALUE
                return character == ":"
            case _State.NEXT:
                if character == ",":
                    self._state = _State.KEY if self._closers[-1] == "}" else _State.VALUE
                    return True
                return self._close(character)
            case _State.KEY | _State.FIRST_KEY:
                if character == '"':
                    self._in_key = True
                    self._state = _State.STRING
                    return True
                return state is _State.FIRST_KEY and self._close(character)
            case _:
                if state is _State.FIRST_VALUE and character == "]":
                    return self._close(character)
                return self._value(character)
        return True

    def _value(self, character: str) -> bool:
        if character == '"':
            self._state = _State.STRING
        elif character == "{" or character == "[":
            if len(self._closers) == NESTING_MAX:
                return False
            self._closers.append("}" if character == "{" else "]")
            self._state = _State.FIRST_KEY if character == "{" else _State.FIRST_VALUE
        elif character in _LITERALS:
            self._rest = _LITERALS[character]
            self._state = _State.LITERAL
        elif character == "-":
            self._state = _State.MINUS
        elif character in _NUMBER[_State.MINUS]:
            self._state = _NUMBER[_State.MINUS][character]
        else:
            return False
        return True

    def _close(self, character: str) -> bool:
        if character != self._closers[-1]:
            return False
        self._closers.pop()
        self._value_ended()
        return True

    def _value_ended(self) -> None:
        if self._closers:
            self._state = _State.NEXT
        else:
            self.complete = True


def json_value(reader: Reader, sink: Sink) -> Steps[None]:
    """Read a value; its text goes to `sink` while it comes. Malformed where it is no JSON."""
    scanner = JsonScanner()
    while True:
        pos = reader.pos
        end = scanner.feed(reader.text, pos, reader.end)
        reader.pos = end
        if end > pos:
            sink(reader.text[pos:end])
        if scanner.complete:
            return
        if scanner.invalid or not (yield from reader.more()):
            raise Malformed


def json_object(reader: Reader, sink: Sink) -> Steps[None]:
    """Read an object, as `json_value` does."""
    if (yield from reader.peek()) != "{":
        raise Malformed
    yield from json_value(reader, sink)


def json_string(reader: Reader) -> Steps[str]:
    """Read a string; what it stands for."""
    if (yield from reader.peek()) != '"':
        raise Malformed
    pieces: list[str] = []
    yield from json_value(reader, pieces.append)
    text: str = json.loads("".join(pieces))
    return text


def is_object(text: str) -> bool:
    """Whether this is the text of an object that UTF-8 can encode."""
    scanner = JsonScanner()
    if not text.startswith("{") or scanner.feed(text, 0, len(text)) != len(text):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return scanner.complete
