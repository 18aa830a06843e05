"""Reading a text that comes in pieces as if it were there already.

A grammar is a generator that reads through a `Reader` and yields where the text does not reach yet;
so it is written in plain order, like a parser of a whole text. Every step decides by the text alone
and never by where a piece ends, which is why the cut into pieces can't change the result.
"""

import re
from collections.abc import Callable, Generator
from itertools import permutations
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Yields when it needs more text; returns T."""

Sink: TypeAlias = Callable[[str], None]
"""Takes a piece of text, never an empty one."""

CALL_CHARS_MAX = 1 << 20
"""Characters of one call, markup included. What is longer is abandoned: it is text."""

NAME_CHARS_MAX = 128
"""Characters of a function's name or a call's id."""

LAYOUT_CHARS_MAX = 64
"""Spaces and line ends next to markup that are taken for layout; more of them are text."""

_SPACE = re.compile(r"[ \t\r\n]*")
_LAYOUT = re.compile(rf"[ \t\r\n]{{0,{LAYOUT_CHARS_MAX}}}")
_NAME = re.compile(r"[\w.:/$@-]*")


class Malformed(Exception):
    """The text is not what the grammar says here. Never leaves the parsers."""


class Markers:
    """Strings that are looked for together. ValueError if one is part of another; as none is, the
    first match in a text is the first also while the text is still growing."""

    __slots__ = ("_longest", "_pattern", "_prefixes")

    def __init__(self, *markers: str) -> None:
        for one, other in permutations(markers, 2):
            if one in other:
                raise ValueError(f"{one!r} is part of {other!r}")
        # Without any, what matches nowhere.
        self._pattern = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        self._prefixes = frozenset(m[:length] for m in markers for length in range(1, len(m)))
        self._longest = max(map(len, markers), default=0)

    def find(self, text: str, pos: int, end: int) -> re.Match[str] | None:
        """The first one in text[pos:end]."""
        return self._pattern.search(text, pos, end)

    def match(self, text: str, pos: int, end: int) -> re.Match[str] | None:
        """The one that text[pos:end] begins with."""
        return self._pattern.match(text, pos, end)

    def held(self, text: str, pos: int, end: int) -> int:
        """Where in text[pos:end] something starts that could become a marker; `end`: nowhere."""
        prefixes = self._prefixes
        for start in range(max(pos, end + 1 - self._longest), end):
            if text[start:end] in prefixes:
                return start
        return end

    def may_begin(self, text: str, pos: int, end: int) -> bool:
        """Whether text[pos:end], perhaps empty, is the beginning of a marker."""
        if pos == end:
            return bool(self._longest)
        return end - pos < self._longest and text[pos:end] in self._prefixes


class Reader:
    """The text of one output: text[pos:end] is there and unread.

    `mark` begins a stretch that is kept as a whole, and that may be given back by `taken` if it
    turns out to be something else. Its length has a limit, exact to the character.
    """

    __slots__ = ("_ended", "_kept", "_mark", "_room", "end", "pos", "text")

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.end = 0
        self._ended = False
        self._mark: int | None = None  # where in `text` the rest of the marked stretch begins
        self._room = 0  # characters that the stretch may have from there on
        self._kept: list[str] = []  # of the stretch, what is no longer in `text`

    # --- the side that text comes from ------------------------------------------------------------

    def push(self, text: str) -> None:
        """Copies what is unread: never more than a beginning of a marker, a name or spaces."""
        pos = self.pos
        if self._mark is None:
            self.text = self.text[pos:] + text
            self.end = len(self.text)
        else:
            self._kept.append(self.text[self._mark : pos])
            self._room -= pos - self._mark
            self.text = self.text[pos:] + text
            self._mark = 0
            self.end = min(len(self.text), self._room)
        self.pos = 0

    def close(self) -> None:
        """No more text comes."""
        self._ended = True

    # --- marked stretches -------------------------------------------------------------------------

    def mark(self, limit: int = CALL_CHARS_MAX) -> None:
        """A stretch of at most `limit` characters begins here; one before is done with."""
        self._kept.clear()
        self._mark = self.pos
        self._room = limit
        self.end = min(len(self.text), self.pos + limit)

    def widen(self, limit: int) -> None:
        """The stretch may become as long as `limit` characters, those read already included."""
        assert self._mark is not None
        self._room = limit - sum(map(len, self._kept))
        self.end = min(len(self.text), self._mark + self._room)

    def unmark(self) -> None:
        """The stretch is done with."""
        self._kept.clear()
        self._mark = None
        self.end = len(self.text)

    def taken(self) -> str:
        """The stretch so far."""
        assert self._mark is not None
        return "".join(self._kept) + self.text[self._mark : self.pos]

    # --- reading ----------------------------------------------------------------------------------

    def more(self) -> Steps[bool]:
        """Wait for text beyond `end`. False: none comes. Malformed: the stretch is too long."""
        if self._mark is not None and self.end - self._mark == self._room:
            raise Malformed
        if self._ended:
            return False
        yield
        return True

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self.pos == self.end:
            if not (yield from self.more()):
                return ""
        return self.text[self.pos]

    def char(self, allowed: str) -> Steps[str]:
        """Read one of these characters, or Malformed."""
        character = yield from self.peek()
        if not character or character not in allowed:
            raise Malformed
        self.pos += 1
        return character

    def take(self, markers: Markers) -> Steps[str]:
        """Read one of these, and layout before it; empty, and nothing read, if none is here."""
        while True:
            layout = _LAYOUT.match(self.text, self.pos, self.end)
            assert layout is not None
            found = markers.match(self.text, layout.end(), self.end)
            if found is not None:
                self.pos = found.end()
                return found.group()
            if not markers.may_begin(self.text, layout.end(), self.end):
                return ""
            if not (yield from self.more()):
                return ""

    def only_layout_left(self) -> bool:
        """Whether the text has ended, but for some layout."""
        return self._ended and not self.text[self.pos : self.end].strip(" \t\r\n")

    def expect(self, markers: Markers) -> Steps[str]:
        """Read one of these, and layout before it, or Malformed."""
        marker = yield from self.take(markers)
        if not marker:
            raise Malformed
        return marker

    def until(self, markers: Markers, sink: Sink) -> Steps[str]:
        """Read up to the first of these, which is returned but not read; empty: up to the end.

        All before it goes to `sink` as soon as it is certain to be before it.
        """
        while True:
            text, pos = self.text, self.pos
            found = markers.find(text, pos, self.end)
            certain = markers.held(text, pos, self.end) if found is None else found.start()
            if certain > pos:
                self.pos = certain
                sink(text[pos:certain])
            if found is not None:
                return found.group()
            if not (yield from self.more()):
                if self.pos < self.end:
                    rest = self.text[self.pos : self.end]
                    self.pos = self.end
                    sink(rest)
                return ""

    def space(self) -> Steps[None]:
        """Skip spaces and line ends."""
        while True:
            found = _SPACE.match(self.text, self.pos, self.end)
            assert found is not None
            self.pos = found.end()
            if self.pos < self.end or not (yield from self.more()):
                return

    def name(self, characters: re.Pattern[str] = _NAME) -> Steps[str]:
        """Read a function's name or a call's id as far as it goes: a run of these characters.
        Malformed if there is none, or a longer one than NAME_CHARS_MAX."""
        while True:
            found = characters.match(self.text, self.pos, self.end)
            assert found is not None
            length = found.end() - self.pos
            if length > NAME_CHARS_MAX:
                raise Malformed
            if found.end() < self.end or not (yield from self.more()):
                if not length:
                    raise Malformed
                self.pos += length
                return self.text[self.pos - length : self.pos]


def is_name(text: str) -> bool:
    """Whether it could be a function's name or a call's id."""
    return 0 < len(text) <= NAME_CHARS_MAX and _NAME.fullmatch(text) is not None
