"""Which tools a chat request lets the model call, and what makes it call one.

A demanded call (`tool_choice` required, or a tool by name) is had by guided decoding: the engine is
given the schema of an array of calls, and what it writes is read as `frontend.parsers` reads it.
"""

from typing import Any

import msgspec
from msgspec import Struct

from frontend.errors import BadRequest, shown
from frontend.openai_types import ChatRequest, NamedTool, Tool
from frontend.parsers import Tools


class ToolUse(Struct, frozen=True, kw_only=True):
    listed: list[dict[str, Any]] = []
    """As the client sent them, for the chat template."""
    callable: Tools = {}
    """Those that may be called: one, if the client named it. Empty: none."""
    demanded: bool = False
    """There must be a call."""
    parallel: bool = True
    """There may be several."""


NO_TOOLS = ToolUse()


def tool_use(request: ChatRequest) -> ToolUse:
    """`request.tools` keep the rules of `Tool`. Raises BadRequest: the choice is not among them."""
    choice, given = request.tool_choice, request.tools or []
    if isinstance(choice, NamedTool) or choice == "required":
        if not given:
            raise BadRequest("tool_choice demands a call, and there are no tools", "tool_choice")
    elif choice == "none" or not given:
        return NO_TOOLS
    callable_ = {
        tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in given
    }
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in callable_:
            raise BadRequest(f"tool_choice: there is no tool {shown(name)}", "tool_choice")
        callable_ = {name: callable_[name]}
    return ToolUse(
        listed=given,
        callable=callable_,
        demanded=choice != "auto" and choice is not None,
        parallel=request.parallel_tool_calls is not False,
    )


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Raises msgspec.ValidationError; RecursionError for schemas nested too deeply."""
    msgspec.convert(tools, list[Tool])


def calls_schema(use: ToolUse) -> dict[str, Any]:
    """The JSON schema of the calls that are demanded: `[{"name": …, "parameters": {…}}, …]`.

    Definitions of the tools' own schemas go to its root, where their references point. Raises
    BadRequest if two tools define the same name differently.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for name, schema in use.callable.items():
        parameters = dict(schema) or {"type": "object", "properties": {}}
        own = parameters.pop("$defs", None)
        for key, definition in own.items() if isinstance(own, dict) else ():
            if definitions.setdefault(key, definition) != definition:
                raise BadRequest(f"tools: {shown(key)} is defined in two ways", "tools")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [name]},
                    "parameters": parameters,
                },
                "required": ["name", "parameters"],
            }
        )
    whole: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"type": "object", "anyOf": calls},
    }
    if not use.parallel:
        whole["maxItems"] = 1
    if definitions:
        whole["$defs"] = definitions
    return whole
