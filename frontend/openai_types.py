"""The shapes of request bodies of /v1/chat/completions and /v1/completions, field by field.

What a type and a range can say is said here, in msgspec's terms; `frontend.openai` has the rules
between fields. A field is in one of three groups:

- **Used.** It does what it says, or the engine does: the `guided_*` fields and `response_format`
  are passed on.
- **Without effect here, by its definition**, hence taken whatever it says: `user`, `metadata`,
  `safety_identifier` (they label a request), `prompt_cache_key` (a hint).
- **Not available yet** (`LATER`): known to clients, its machinery not built. A value that asks for
  nothing (`best_of: 1`, `suffix: ""`, `store: false`) passes, any other is refused by name.

Any other field is unknown and refused. Messages are the exception: keys that are not in `Message`
go to the chat template as they came, for templates have keys of their own (`reasoning_content`).
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

STOP_TOKEN_IDS_MAX = 1024
PRIORITY_MIN, PRIORITY_MAX = -(2**31), 2**31 - 1
FUNCTION_NAME_CHARS_MAX = 96
U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

U32 = Annotated[int, Meta(ge=0, le=U32_MAX)]
TokenId = U32
WorkerId = Annotated[int, Meta(ge=0)]
"""A u64; `frontend.openai` has the upper bound, which is beyond what `Meta` takes."""
Name = Annotated[str, Meta(min_length=1)]
_Count = Annotated[int, Meta(ge=1, le=U32_MAX)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Factor = Annotated[float, Meta(ge=0, le=1e6)]
"""Bounded, so that no cost that it goes into leaves the range of a float."""

Later: TypeAlias = Any
"""A field of this type is not available yet, whatever it holds."""


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AgentHints(Struct, kw_only=True, forbid_unknown_fields=True):
    """What an agent knows of its request. priority: higher is more urgent; latency_sensitivity:
    seconds by which the request counts as having come earlier, where there is no priority; osl:
    expected output tokens."""

    latency_sensitivity: float | None = None
    osl: U32 | None = None
    priority: Annotated[int, Meta(ge=PRIORITY_MIN, le=PRIORITY_MAX)] | None = None
    strict_priority: U32 | None = None

    speculative_prefill: bool | None = None


class CacheControl(Struct, kw_only=True, forbid_unknown_fields=True):
    """Keep the prompt's blocks cached. ttl: seconds, or a number with s, m or h behind it."""

    type: Literal["ephemeral"]
    ttl: str | int | None = None


class RouterConfigOverride(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the router for one request; None: as the router is set."""

    overlap_score_weight: _Factor | None = None
    router_temperature: _Factor | None = None
    assume_kv_reuse: bool | None = None


class NvExt(Struct, kw_only=True, forbid_unknown_fields=True):
    """The peer's extensions, and `session_id`, which the peer has as a header only.

    backend_instance_id: the worker to send to; ids are u64. extra_fields: what the answer's `nvext`
    shall say, of `EXTRA_FIELDS`. annotations: `query_instance_id` asks where the request would go,
    and does not send it.
    """

    backend_instance_id: WorkerId | None = None
    prefill_worker_id: WorkerId | None = None
    decode_worker_id: WorkerId | None = None
    dp_rank: U32 | None = None
    prefill_dp_rank: U32 | None = None
    agent_hints: AgentHints | None = None
    cache_control: CacheControl | None = None
    router_config_override: RouterConfigOverride | None = None
    session_id: str | None = None
    extra_fields: list[str] | None = None
    annotations: list[str] | None = None

    greed_sampling: bool | None = None
    use_raw_prompt: bool | None = None
    token_data: Later = None
    max_thinking_tokens: Later = None
    agent_context: Later = None
    session_control: Later = None
    cache_salt: Later = None
    metadata_upload: Later = None
    request_timestamp_ms: Later = None
    routing_constraints: Later = None
    router: Later = None


class CommonRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. A null is a field that was not given."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    min_tokens: U32 | None = None
    ignore_eos: bool | None = None
    stop: str | list[str | TokenId] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=STOP_TOKEN_IDS_MAX)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=U32_MAX)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    nvext: NvExt | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    guided_json: dict[str, Any] | str | None = None
    """A JSON schema, or its text."""
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    user: Name | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    detokenize: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Later = None
    allowed_token_ids: Later = None
    bad_words_token_ids: Later = None
    cache_salt: Later = None
    mm_processor_kwargs: Later = None
    media_io_kwargs: Later = None


class FunctionTool(Struct):
    name: Annotated[str, Meta(min_length=1, max_length=FUNCTION_NAME_CHARS_MAX)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: it takes none, as far as is said."""


class Tool(Struct):
    """What a tool must be, whatever else it has."""

    type: Literal["function"]
    function: FunctionTool


class _Named(Struct):
    name: str


class NamedTool(Struct):
    """This one shall be called."""

    function: _Named
    type: Literal["function"] = "function"


class JsonSchema(Struct):
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """json_schema: required by the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    """Each keeps the rules of `Message`, and has whatever else the client sent."""
    max_completion_tokens: _Count | None = None
    """Wins over max_tokens."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    chat_template_args: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1536)] | None = None
    """Each keeps the rules of `Tool`, and has whatever else the client sent."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    continue_final_message: bool | None = None
    functions: Annotated[list[Any], Meta(max_length=1536)] | None = None
    function_call: Later = None
    modalities: list[str] | None = None
    audio: Later = None
    prediction: Later = None
    web_search_options: Later = None
    thinking: Later = None
    thinking_token_budget: Later = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CompletionRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    suffix: str | None = None


class Function(Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct):
    function: Function
    id: str | None = None
    type: Literal["function"] = "function"


class Link(Struct):
    url: str


class Sound(Struct):
    """data: base64. format: such as wav or mp3."""

    data: str
    format: Name


class Part(Struct):
    """Has what its type says: `image_url` for a part of that type, and so on."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Link | None = None
    audio_url: Link | None = None
    video_url: Link | None = None
    input_audio: Sound | None = None


class Message(Struct):
    """What a message must be, whatever else it has."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    audio: Later = None


_IDLE: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "detokenize": (True,),
    "return_tokens_as_token_ids": (False,),
    "continue_final_message": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "suffix": ("",),
    "speculative_prefill": (False,),
    "greed_sampling": (False,),
    "use_raw_prompt": (False,),
}

LATER: dict[type[Struct], dict[str, tuple[object, ...]]] = {
    shape: {
        field.name: _IDLE.get(field.name, ())
        for field in msgspec.structs.fields(shape)
        if field.name in _IDLE or field.type is Later
    }
    for shape in (ChatRequest, CompletionRequest, NvExt, AgentHints)
}
"""Shape → its fields that are not available yet → their values that ask for nothing."""

WORKER_IDS = ("backend_instance_id", "prefill_worker_id", "decode_worker_id")
EXTRA_FIELDS = ("worker_id", "predicted_cached_tokens", "timing")
EXTRA_FIELDS_LATER = (
    "token_ids",
    "routed_experts",
    "completion_token_ids",
    "prompt_token_ids",
    "stop_reason",
    "engine_data",
)
QUERY_INSTANCE_ID = "query_instance_id"
"""An annotation is a name, or a name, a colon and a value; this one has no value."""
ANNOTATIONS_LATER = ("request_id", "formatted_prompt", "token_ids", "llm_metrics")
MEDIA_PARTS = {
    "image_url": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
"""Part type → the modality that a model must take for it."""
PARTS_LATER = ("file",)
