"""OpenAI's harmony format (gpt-oss): messages on channels, reasoning and calls among them.

    <|channel|>analysis<|message|>…<|end|>                                      reasoning
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>                    content

Everything else, commentary to the user included, is content. The prompt ends in
`<|start|>assistant`, so the output begins within a header. A message for another recipient than a
function (a built-in tool, say) stays as it is, markup and all, since nobody here could answer it.
"""

import re

from frontend.parsers.grammar import Output
from frontend.parsers.json_text import json_object
from frontend.parsers.reader import CALL_CHARS_MAX, Malformed, Markers, Reader, Steps

HEADER_CHARS_MAX = 512
"""Characters of a message's header; a longer one is text."""

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_BEGINS = ("<|start|>", "<|channel|>")

_RECIPIENT_FIRST = Markers("to=")
_OUTSIDE = Markers(*_BEGINS, *_ENDS)
_HEADER_END = Markers(_MESSAGE, "<|start|>", *_ENDS)
_BODY_END = Markers(*_BEGINS, *_ENDS)
_END = Markers(*_ENDS)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w*)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


def harmony(reader: Reader, output: Output) -> Steps[None]:
    """Grammar of a whole output. Markup that belongs to no message is dropped if it ends one, else
    content."""
    reader.mark(HEADER_CHARS_MAX)
    marker = yield from reader.take(_RECIPIENT_FIRST)
    while True:
        if not marker:
            reader.unmark()
            marker = yield from reader.until(_OUTSIDE, output.content)
            if not marker:
                return
            reader.mark(HEADER_CHARS_MAX)
            reader.pos += len(marker)
        if marker not in _ENDS:
            try:
                yield from _message(reader, output, marker)
            except Malformed:
                output.give_up(reader.taken())
        marker = ""


def _message(reader: Reader, output: Output, marker: str) -> Steps[None]:
    """Read a message from after `marker`, with which it begins, to its end."""
    pieces = [marker]
    if (yield from reader.until(_HEADER_END, pieces.append)) != _MESSAGE:
        raise Malformed
    reader.pos += len(_MESSAGE)
    header = "".join(pieces)
    recipient = _RECIPIENT.search(header)
    if recipient is not None:
        yield from _call(reader, output, recipient.group(1))
        return
    channel = _CHANNEL.search(header)
    is_reasoning = channel is not None and channel.group(1) == "analysis"
    reader.unmark()
    sink = output.reasoning if is_reasoning else output.content
    if (yield from reader.until(_BODY_END, sink)) in _ENDS:
        yield from reader.take(_END)


def _call(reader: Reader, output: Output, recipient: str) -> Steps[None]:
    if not recipient.startswith(_FUNCTIONS):
        raise Malformed
    reader.widen(CALL_CHARS_MAX)
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise Malformed
    output.start(recipient.removeprefix(_FUNCTIONS))
    yield from json_object(reader, output.arguments)
    output.end()
    reader.mark()
    yield from reader.take(_END)
