"""/openapi.json: OpenAPI 3.1, made of the same types that decode the requests. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from eventstore.settings import VERSION
from frontend import answers
from frontend.busy_threshold import PATH as BUSY_THRESHOLD
from frontend.busy_threshold import ThresholdChange
from frontend.openai_types import LATER, ChatRequest, CompletionRequest, Message
from frontend.paths import Paths

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_REF = "#/components/schemas/{name}"

_Schema = dict[str, Any]
_REASONS = {
    200: "The answer.",
    400: "The request breaks a rule; `param` names the field.",
    404: "There is no such model.",
    405: "The route takes other methods.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed in a way that is not known here.",
    422: "A field has a wrong type, or is not known.",
    500: "The engine or this server failed.",
    502: "The worker was lost.",
    503: "Not ready, shutting down, or the workers are busy.",
    504: "A deadline of this server's passed.",
}
_BODY_ERRORS = (400, 404, 408, 413, 415)
_SERVING_ERRORS = (*_BODY_ERRORS, 500, 502, 503, 504)


class Operation(Struct, frozen=True, kw_only=True):
    """One method of one path. replies: by media type; of a stream, its events' data."""

    method: str
    path: str
    summary: str
    replies: Mapping[str, type]
    body: type | None = None
    parameters: tuple[_Schema, ...] = ()
    errors: tuple[int, ...] = ()
    error: type = answers.Error
    also: Mapping[int, type] = {}
    """Answers with another status that are no errors."""


def specification(paths: Paths, overload_status: int) -> bytes:
    """The document as JSON. overload_status: what says that the workers are busy."""
    operations = tuple(_operations(paths, overload_status))
    by_path: dict[str, _Schema] = {}
    for each in operations:
        by_path.setdefault(each.path, {})[each.method] = _operation(each)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "reckon",
                "summary": "An OpenAI-compatible frontend with a KV-cache-aware router.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
                "version": VERSION,
            },
            "paths": by_path,
            "components": {"schemas": _schemas(operations)},
        }
    )


def _operations(paths: Paths, overload_status: int) -> Iterable[Operation]:
    serving = tuple(sorted({*_SERVING_ERRORS, overload_status}))
    yield Operation(
        method="post",
        path=paths.chat,
        summary="Answer a chat",
        body=ChatRequest,
        replies={JSON: answers.ChatCompletion, EVENTS: answers.ChatCompletionChunk},
        errors=serving,
    )
    yield Operation(
        method="post",
        path=paths.completions,
        summary="Continue a text",
        body=CompletionRequest,
        replies={JSON: answers.TextCompletion, EVENTS: answers.TextCompletion},
        errors=serving,
    )
    yield Operation(
        method="get",
        path=paths.models,
        summary="The models there are",
        replies={JSON: answers.ModelList},
    )
    yield Operation(
        method="get",
        path=f"{paths.models.rstrip('/')}/{{model}}",
        summary="One model",
        replies={JSON: answers.Model},
        parameters=(_parameter("model", "path", "Its id, slashes and all."),),
        errors=(404,),
    )
    yield Operation(
        method="get",
        path=paths.health,
        summary="Whether requests are taken, and by what",
        replies={JSON: answers.Health},
        also={503: answers.Health},
    )
    yield Operation(
        method="get",
        path=paths.live,
        summary="Whether the process is to be left running",
        replies={JSON: answers.Live},
        also={503: answers.Live},
    )
    yield Operation(
        method="get",
        path=paths.metrics,
        summary="Metrics for Prometheus",
        replies={TEXT: str},
    )
    thresholds: Mapping[str, type] = {JSON: answers.Thresholds}
    yield Operation(
        method="get",
        path=BUSY_THRESHOLD,
        summary="When a worker counts as busy, for every model",
        replies={JSON: answers.ThresholdList},
    )
    yield Operation(
        method="post",
        path=BUSY_THRESHOLD,
        summary="Set thresholds of a model on every frontend, or tell them",
        body=ThresholdChange,
        replies=thresholds,
        errors=(*_BODY_ERRORS, 422, 503),
        error=answers.PlainError,
    )
    yield Operation(
        method="delete",
        path=BUSY_THRESHOLD,
        summary="Clear the thresholds of a model",
        replies=thresholds,
        parameters=(_parameter("model", "query", "Else the body names it.", required=False),),
        errors=(*_BODY_ERRORS, 422, 503),
        error=answers.PlainError,
    )


def _parameter(name: str, place: str, description: str, *, required: bool = True) -> _Schema:
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": description,
        "schema": {"type": "string", "minLength": 1},
    }


def _operation(each: Operation) -> _Schema:
    by_status: _Schema = {"200": _reply(200, each.replies)}
    for status, shape in each.also.items():
        by_status[str(status)] = _reply(status, {JSON: shape})
    for status in each.errors:
        by_status[str(status)] = _reply(status, {JSON: each.error})
    made: _Schema = {
        "operationId": f"{each.method}{_words(each.path)}",
        "summary": each.summary,
        "responses": by_status,
    }
    if each.parameters:
        made["parameters"] = each.parameters
    if each.body is not None:
        made["requestBody"] = {"required": True, "content": _content({JSON: each.body})}
    return made


def _words(path: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in path)


def _reply(status: int, shapes: Mapping[str, type]) -> _Schema:
    return {"description": _REASONS.get(status, _REASONS[503]), "content": _content(shapes)}


def _content(shapes: Mapping[str, type]) -> _Schema:
    return {media: {"schema": _reference(shape)} for media, shape in shapes.items()}


def _reference(shape: type) -> _Schema:
    return {"type": "string"} if shape is str else {"$ref": _REF.format(name=shape.__name__)}


def _schemas(operations: Iterable[Operation]) -> dict[str, _Schema]:
    shapes: set[type] = {Message, answers.Error}
    for each in operations:
        shapes |= {each.error, *each.replies.values(), *each.also.values()}
        shapes |= set() if each.body is None else {each.body}
    shapes.discard(str)
    ordered = sorted(shapes, key=lambda shape: shape.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    # A message may have any keys besides these: they are for the chat template.
    schemas[ChatRequest.__name__]["properties"]["messages"]["items"] = _reference(Message)
    for shape, fields in LATER.items():
        for name, idle in fields.items():
            schemas[shape.__name__]["properties"][name] = {
                "description": "Not available yet: nothing may be asked for with it.",
                "enum": [None, *idle],
            }
    return dict(sorted(schemas.items()))
