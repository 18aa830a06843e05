"""Model output into content, reasoning and tool calls, while it streams.

`output_parser` makes the parser that a model's card names. All formats treat what is malformed
alike:

- Nothing is lost and nothing raises. What can't be parsed is content: broken JSON, an unknown tool,
  a call that never ends or is longer than CALL_CHARS_MAX, markup that belongs to nothing.
- Text is searched on from where it stopped making sense, so a good call after a broken one is
  found. Calls completed before stay completed.
- A call is complete with its last brace; a missing closing tag does not undo it.
- What had gone out as the beginning of a call is taken back by ToolCallAbandoned; with WholeCalls
  nothing goes out before the call is complete.
- Spaces and line ends between tags and calls are layout and dropped; next to text they stay.
"""

from frontend.parsers.deltas import (
    Content,
    Delta,
    Message,
    OutputParser,
    Reasoning,
    ToolArguments,
    ToolCall,
    ToolCallAbandoned,
    ToolCallEnded,
    ToolCallStarted,
    WholeCalls,
    collect,
    finish_reason,
)
from frontend.parsers.formats import (
    UnknownFormat,
    output_parser,
    reasoning_format,
    tool_format,
)
from frontend.parsers.grammar import Tools

__all__ = [
    "Content",
    "Delta",
    "Message",
    "OutputParser",
    "Reasoning",
    "ToolArguments",
    "ToolCall",
    "ToolCallAbandoned",
    "ToolCallEnded",
    "ToolCallStarted",
    "Tools",
    "UnknownFormat",
    "WholeCalls",
    "collect",
    "finish_reason",
    "output_parser",
    "reasoning_format",
    "tool_format",
]
