"""A chat message out of what a model writes: which parsers read it, and what they found.

A call comes at once when it is complete (`WholeCalls`), so every call a client sees is valid.
"""

import hashlib
from typing import Any, TypeAlias

from msgspec import Struct

from frontend.openai_types import ChatRequest
from frontend.parsers import (
    Content,
    Delta,
    Reasoning,
    ToolArguments,
    ToolCallEnded,
    ToolCallStarted,
    Tools,
    finish_reason,
    output_parser,
    reasoning_format,
    tool_format,
)
from frontend.parsers.formats import GPT_OSS, GUIDED, HARMONY
from frontend.tool_use import tool_use
from workers.card import ModelCard

PROMPT_END_CHARS = 256
"""Of the prompt, kept to tell whether the output begins with reasoning."""
MISTRAL_ID_CHARS = 9
"""Its template takes ids of this length only, so an answer must be able to go back into it."""


class Call(Struct, frozen=True, gc=False):
    """A complete call of a message. index: among its calls, from 0."""

    index: int
    id: str
    name: str
    arguments: str
    """A JSON object."""


Piece: TypeAlias = Content | Reasoning | Call


class MessageFormat(Struct, frozen=True, kw_only=True):
    """How the messages of one request are read, all its choices alike."""

    request_id: str
    tools_as: str | None
    reasoning_as: str | None
    tools: Tools | None
    parallel: bool
    """False: further calls after the first are dropped."""
    prompt_end: str

    @property
    def demands_guided(self) -> bool:
        """The engine must be guided to the calls."""
        return self.tools_as == GUIDED

    def reader(self, choice: int) -> "MessageReader":
        """For one output. choice: its number in the request."""
        return MessageReader(self, choice)


def message_format(
    request: ChatRequest, card: ModelCard, prompt: str, request_id: str
) -> MessageFormat | None:
    """None: what the model writes is the message.

    card: its parsers are known ones. Without a parser for tools, calls that are not demanded stay
    in the text. A demanded one is guided, harmony's excepted: its calls are told by their channel.
    """
    use = tool_use(request)
    tools_as, reasoning_as = card.tool_call_parser, card.reasoning_parser
    if use.demanded:
        tools_as = HARMONY if _writes_harmony(card) else GUIDED
    elif not use.callable:
        tools_as = None
    if tools_as is None and reasoning_as is None:
        return None
    return MessageFormat(
        request_id=request_id,
        tools_as=tools_as,
        reasoning_as=reasoning_as,
        tools=use.callable,
        parallel=use.parallel,
        prompt_end=prompt[-PROMPT_END_CHARS:],
    )


def _writes_harmony(card: ModelCard) -> bool:
    tools_as, reasoning_as = card.tool_call_parser, card.reasoning_parser
    return (tools_as is not None and tool_format(tools_as) == HARMONY) or (
        reasoning_as is not None and reasoning_format(reasoning_as) == GPT_OSS
    )


class MessageReader:
    """Turns one output into pieces while it arrives. calls: those that came so far."""

    __slots__ = ("_arguments", "_choice", "_format", "_parser", "_started", "calls")

    def __init__(self, form: MessageFormat, choice: int) -> None:
        self._format = form
        self._choice = choice
        self._parser = output_parser(
            tools_as=form.tools_as,
            reasoning_as=form.reasoning_as,
            tools=form.tools,
            prompt=form.prompt_end,
            whole_calls=True,
        )
        self._started: ToolCallStarted | None = None
        self._arguments = ""
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        return self._pieces(self._parser.push(text))

    def finish(self) -> list[Piece]:
        """What was held back, now that no more text comes."""
        return self._pieces(self._parser.finish())

    def finish_reason(self, reason: str) -> str:
        """The API's, once all has been read. reason: without a view to calls."""
        return finish_reason(reason, self.calls)

    def _pieces(self, deltas: list[Delta]) -> list[Piece]:
        pieces: list[Piece] = []
        for delta in deltas:
            match delta:
                case Content() | Reasoning():
                    pieces.append(delta)
                case ToolCallStarted():
                    self._started, self._arguments = delta, ""
                case ToolArguments(_, text):
                    self._arguments += text
                case ToolCallEnded():
                    assert self._started is not None
                    if not self.calls or self._format.parallel:
                        pieces.append(self._call(self._started))
                        self.calls += 1
        return pieces

    def _call(self, started: ToolCallStarted) -> Call:
        call_id = started.id or self._call_id()
        return Call(self.calls, call_id, started.name, self._arguments or "{}")

    def _call_id(self) -> str:
        """Unique as the request's id is."""
        name = f"{self._format.request_id}-{self._choice}-{self.calls}"
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        if self._format.tools_as == "mistral":
            return digest[:MISTRAL_ID_CHARS]
        return f"call-{digest}"


def wire(piece: Piece) -> dict[str, Any]:
    """The piece as members of a delta."""
    match piece:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case Call():
            return {"tool_calls": [{"index": piece.index, **_wire_call(piece)}]}


def members(pieces: list[Piece]) -> tuple[str, dict[str, Any]]:
    """All pieces of an output as a whole message: its content, and what else it has."""
    found: dict[str, Any] = {}
    calls = [_wire_call(piece) for piece in pieces if isinstance(piece, Call)]
    if calls:
        found["tool_calls"] = calls
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    if reasoning:
        found["reasoning_content"] = reasoning
    return "".join(piece.text for piece in pieces if isinstance(piece, Content)), found


def _wire_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
