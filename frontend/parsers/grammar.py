"""What the grammars of all formats share: where their findings go, and how they are run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from frontend.parsers.deltas import (
    Content,
    Delta,
    Reasoning,
    ToolArguments,
    ToolCallAbandoned,
    ToolCallEnded,
    ToolCallStarted,
)
from frontend.parsers.reader import Malformed, Reader, Steps, is_name

Tools: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The request's functions: name → JSON schema of the parameters, `{}` if it gives none."""


class Output:
    """Where a grammar says what it found. Gathers the deltas of one push.

    tools: what may be called; None: anything. A name that is none of them makes no call.
    ended: calls completed so far.
    """

    __slots__ = ("_deltas", "_index", "_kind", "_open", "_pieces", "ended", "tools")

    def __init__(self, tools: Tools | None) -> None:
        self.tools = tools
        self.ended = 0
        self._index = 0
        self._open = False
        self._deltas: list[Delta] = []
        self._kind: type[Content | Reasoning | ToolArguments] = Content
        self._pieces: list[str] = []  # of one kind, not yet a delta

    def content(self, text: str) -> None:
        self._text(Content, text)

    def reasoning(self, text: str) -> None:
        self._text(Reasoning, text)

    def arguments(self, text: str) -> None:
        """Of the started call."""
        self._text(ToolArguments, text)

    def start(self, name: str, call_id: str | None = None) -> None:
        """A call begins. Malformed if that is no tool."""
        if not is_name(name) or (self.tools is not None and name not in self.tools):
            raise Malformed
        if call_id is not None and not is_name(call_id):
            call_id = None
        self._flush()
        self._deltas.append(ToolCallStarted(self._index, name, call_id))
        self._open = True

    def end(self) -> None:
        """The started call is complete."""
        self._flush()
        self._deltas.append(ToolCallEnded(self._index))
        self._index += 1
        self._open = False
        self.ended += 1

    def give_up(self, text: str) -> None:
        """This text, which looked like a call, is none; what is left after a call may be layout."""
        if not self._open:
            if text.strip():
                self.content(text)
            return
        self._flush()
        self._deltas.append(ToolCallAbandoned(self._index, text))
        self._index += 1
        self._open = False

    def take(self) -> list[Delta]:
        """What was found since the last time."""
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _text(self, kind: type[Content | Reasoning | ToolArguments], text: str) -> None:
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        if not self._pieces:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        if self._kind is ToolArguments:
            self._deltas.append(ToolArguments(self._index, text))
        elif self._kind is Reasoning:
            self._deltas.append(Reasoning(text))
        else:
            self._deltas.append(Content(text))


Grammar: TypeAlias = Callable[[Reader, Output], Steps[None]]
"""Reads a whole output. Returns when the text is at its end, not before."""

Calls: TypeAlias = Callable[[Reader, Output, str], Steps[None]]
"""Reads calls from their opening marker on, which is given and not read yet. Raises Malformed where
the text is something else."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written in text."""

    opening: tuple[str, ...]
    """What opens calls wherever it is."""
    calls: Calls
    first: tuple[str, ...] = ()
    """What opens calls too, but only where the content begins or calls have just ended."""


class GrammarParser:
    """Runs a grammar over a text that comes in pieces.

    Linear in the text, a few µs a push. Holds what the grammar has not read, and the call being
    read (up to CALL_CHARS_MAX characters).
    """

    __slots__ = ("_output", "_reader", "_steps")

    def __init__(self, grammar: Grammar, tools: Tools | None = None) -> None:
        self._reader = Reader()
        self._output = Output(tools)
        self._steps = grammar(self._reader, self._output)

    @property
    def held_chars(self) -> int:
        """Characters that are pushed and not read: what the next push copies."""
        return len(self._reader.text) - self._reader.pos

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._reader.push(text)
        next(self._steps)
        return self._output.take()

    def finish(self) -> list[Delta]:
        self._reader.close()
        next(self._steps, None)
        return self._output.take()


def to_json(value: object) -> str:
    """JSON that any client can read: ValueError for a NaN or an infinity, TypeError for what is no
    JSON. As written, except what UTF-8 can't encode, which is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    return text
