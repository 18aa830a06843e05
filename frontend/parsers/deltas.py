"""What a model's output turns into: the words between the parsers and the API's own shapes.

A parser takes text and gives deltas; a streaming endpoint renders each as it comes, a unary one
collects them. Of a call there is first its start, then its arguments in fragments, then its end.
"""

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct, field


class Content(Struct, frozen=True, gc=False):
    """Text for the reader. Never empty."""

    text: str


class Reasoning(Struct, frozen=True, gc=False):
    """Text that the model wrote for itself. Never empty."""

    text: str


class ToolCallStarted(Struct, frozen=True, gc=False):
    """A call, as soon as its function is known. Calls do not overlap."""

    index: int
    """Counts the calls of this output, from 0."""
    name: str
    id: str | None = None
    """As the model wrote it, before the arguments; None: it wrote none."""


class ToolArguments(Struct, frozen=True, gc=False):
    """The next fragment of the arguments; of a call that ends, all together are a JSON object."""

    index: int
    text: str


class ToolCallEnded(Struct, frozen=True, gc=False):
    """The call is complete."""

    index: int


class ToolCallAbandoned(Struct, frozen=True, gc=False):
    """What had started as a call is none: broken, cut off, or too long.

    Whoever has passed nothing of it on treats `text` as content, so nothing is lost.
    """

    index: int
    text: str
    """All of it up to here as the model wrote it, markup included; what follows comes as usual."""


Delta = Content | Reasoning | ToolCallStarted | ToolArguments | ToolCallEnded | ToolCallAbandoned


class OutputParser(Protocol):
    """Turns one model output into deltas while it arrives.

    However the text is cut into chunks, the same content, reasoning and calls come out. No text
    makes it raise.
    """

    def push(self, text: str) -> list[Delta]:
        """What this text makes certain. Adjacent text of one kind comes as one delta."""

    def finish(self) -> list[Delta]:
        """What was held back, now that no more text comes. Called once, and nothing after it."""


class ToolCall(Struct):
    """A complete call."""

    name: str
    arguments: str
    """A JSON object."""
    id: str | None = None


class Message(Struct):
    """A whole output."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def collect(deltas: Iterable[Delta]) -> Message:
    """The message that these deltas, all of one output, are. What was abandoned is content."""
    content: list[str] = []
    reasoning: list[str] = []
    arguments: list[str] = []
    calls: list[ToolCall] = []
    started: ToolCallStarted | None = None
    for delta in deltas:
        match delta:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStarted():
                started = delta
                arguments.clear()
            case ToolArguments(_, text):
                arguments.append(text)
            case ToolCallEnded():
                assert started is not None
                calls.append(ToolCall(started.name, "".join(arguments), started.id))
            case ToolCallAbandoned(_, text):
                content.append(text)
    return Message("".join(content), "".join(reasoning), calls)


def finish_reason(reason: str, completed_calls: int) -> str:
    """The API's finish reason, given the engine's in the API's words.

    An output with a completed call asks for its answer, also if it was cut off after that. A filter
    or an error stays what it is.
    """
    return "tool_calls" if completed_calls and reason in ("stop", "length") else reason


class WholeCalls:
    """Gives out each call at once when it is complete, and what was abandoned as content.

    For clients that can't take back what they got of a call: every call they see is valid. Costs
    the view of the arguments while they are written. Holds one call.
    """

    __slots__ = ("_arguments", "_ended", "_parser", "_started")

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._ended = 0
        self._started: ToolCallStarted | None = None
        self._arguments: list[str] = []

    def push(self, text: str) -> list[Delta]:
        return self._hold(self._parser.push(text))

    def finish(self) -> list[Delta]:
        return self._hold(self._parser.finish())

    def _hold(self, deltas: list[Delta]) -> list[Delta]:
        out: list[Delta] = []
        for delta in deltas:
            match delta:
                case ToolCallStarted():
                    self._started = delta
                    self._arguments.clear()
                case ToolArguments(_, text):
                    self._arguments.append(text)
                case ToolCallEnded():
                    assert self._started is not None
                    # Counted anew: the index of an abandoned call would be a gap.
                    index = self._ended
                    self._ended += 1
                    out.append(ToolCallStarted(index, self._started.name, self._started.id))
                    out.append(ToolArguments(index, "".join(self._arguments)))
                    out.append(ToolCallEnded(index))
                case ToolCallAbandoned(_, text):
                    out.append(Content(text))
                case _:
                    out.append(delta)
        return out
