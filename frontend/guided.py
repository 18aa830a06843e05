"""What the client wants the output to conform to, in the words that engines take.

That is one of `json`, `regex`, `grammar` and `choice`, and beside it `backend` and
`whitespace_pattern` where the client gave them.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from frontend.errors import BadRequest
from frontend.openai_types import ChatRequest, CompletionRequest, ResponseFormat

_KINDS = ("json", "regex", "grammar", "choice")
ANY_OBJECT = {"type": "object"}
SCHEMA_DEPTH_MAX = 128
"""Objects and arrays within one another. Coders of JSON and MessagePack stop at some depth of their
own, here and in the engines, and it depends on who calls them."""


def guided_decoding(request: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """None: anything may come. Raises BadRequest: it is not one thing, or no JSON schema."""
    guided = {
        kind: value for kind in _KINDS if (value := getattr(request, f"guided_{kind}")) is not None
    }
    params = [f"guided_{kind}" for kind in guided]
    if "json" in guided:
        guided["json"] = _schema(guided["json"])
    if isinstance(request, ChatRequest) and request.response_format is not None:
        schema = _format_schema(request.response_format)
        if schema is not None:
            guided["json"] = schema
            params.append("response_format")
    if len(params) > 1:
        raise BadRequest(f"give one of {', '.join(params)}", params[-1])
    if not guided:
        return None
    if "json" in guided:
        check_depth(guided["json"], params[-1])
    if request.guided_decoding_backend is not None:
        guided["backend"] = request.guided_decoding_backend
    if request.guided_whitespace_pattern is not None:
        guided["whitespace_pattern"] = request.guided_whitespace_pattern
    return guided


def check_depth(schema: Mapping[str, Any], param: str) -> None:
    """Raises BadRequest if it is nested deeper than SCHEMA_DEPTH_MAX. Linear in the schema."""
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise BadRequest(f"{param}: the schema is nested too deeply", param)


def _format_schema(form: ResponseFormat) -> dict[str, Any] | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return ANY_OBJECT
    if form.json_schema is None or form.json_schema.schema is None:
        param = "response_format.json_schema"
        raise BadRequest(f"{param}.schema is required", param, "missing_field")
    return form.json_schema.schema


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        return msgspec.json.decode(given, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequest("guided_json is not the JSON of a schema", "guided_json") from error
