"""The shapes of answers, for /openapi.json. What writes them is in `frontend.chunks`, in
`frontend.infra` and in `frontend.busy_threshold`; the tests hold their answers against these.

A field with a default may be missing. Fields may be added.
"""

from typing import Any, Literal

from msgspec import Struct, field

Object = dict[str, Any]


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    """The request field at fault."""
    code: str
    """Says which error it is; does not change with the words."""


class Error(Struct):
    error: ErrorDetail


class PlainError(Struct):
    """That of /busy_threshold."""

    error: str


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ChatMessage(Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[Object] | None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: Object | None


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    nvext: Object | None = None


class ChatDelta(Struct):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Object] | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: Object | None


class ChatCompletionChunk(Struct):
    """The data of each event of a stream; the last event's is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    nvext: Object | None = None


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: Object | None


class TextCompletion(Struct):
    """Also the data of each event of a stream; the last event's is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    nvext: Object | None = None


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_window: int | None


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


class NotReadyModel(Struct):
    model: str
    missing_roles: list[str]


class Worker(Struct):
    """instance_id is a u64, which is more than a double holds."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int
    transport: dict[str, str]


class RefusedWorker(Struct):
    instance_id: int
    why: str


class SetAsideWorker(Struct):
    instance_id: int
    failures: int
    for_s: float


class Health(Struct):
    """With --namespace-prefix what is known of a log stands below `namespaces`, by namespace."""

    status: Literal["healthy", "degraded", "starting", "catching_up", "shutting_down"]
    why: str | None
    models: list[str]
    not_ready: list[NotReadyModel]
    endpoints: list[str]
    instances: list[Worker]
    refused: list[RefusedWorker]
    set_aside: list[SetAsideWorker]
    namespaces: dict[str, Object] | None = None
    replica: Object | None = None
    log: Object | None = None
    anomalies: Object | None = None
    snapshot_trouble: str | None = None


class Live(Struct):
    status: Literal["live", "shutting_down"]
    message: str


class Thresholds(Struct):
    """null: not set, so no worker is busy by it."""

    model: str
    active_decode_blocks_threshold: float | None
    active_prefill_tokens_threshold: int | None
    active_prefill_tokens_threshold_frac: float | None


class ListedThresholds(Thresholds):
    since_seq: int | None = None
    since_time: str | None = None
    source: str | None = None


class ThresholdList(Struct):
    thresholds: list[ListedThresholds] = field(default_factory=list)
