"""Request bodies of /v1/chat/completions and /v1/completions: from bytes to what a worker takes.

`decode_chat` and `decode_completion` take any bytes, and give a request that keeps all rules or
raise `BadRequest`, which names the field. The shapes are in `frontend.openai_types`.
"""

from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from frontend.errors import SHOWN_CHARS_MAX, BadRequest, NotAvailableYet, shown
from frontend.guided import check_depth, guided_decoding
from frontend.media import check_part
from frontend.openai_types import (
    ANNOTATIONS_LATER,
    EXTRA_FIELDS,
    EXTRA_FIELDS_LATER,
    LATER,
    MEDIA_PARTS,
    PARTS_LATER,
    QUERY_INSTANCE_ID,
    U64_MAX,
    WORKER_IDS,
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    Message,
    NvExt,
)
from frontend.tool_use import calls_schema, check_tools, tool_use
from workers.protocol import SamplingOptions, StopConditions

__all__ = [
    "ChatRequest",
    "CommonRequest",
    "CompletionRequest",
    "Prompt",
    "decode_chat",
    "decode_completion",
    "for_choice",
    "max_output_tokens",
    "prompts",
    "sampling_options",
    "stop_conditions",
    "template_variables",
]

STOPS_MAX = 32
STOP_CHARS_MAX = 256
"""A stop string costs memory for each of its characters while its request runs."""
PROMPTS_MAX = 128
TEMPERATURE_MIN = 1e-6
"""Of a router's temperature above 0. A smaller one would differ from 0 by rounding errors only."""
CHOICES_MAX = 128
"""Outputs of a request: `n` for each prompt."""
_UNKNOWN_LISTED_MAX = 20

Prompt = str | list[int]
"""A prompt's text, or its token ids."""


def decode_chat(body: bytes) -> ChatRequest:
    """Raises BadRequest. Linear in the body, about 1 ms a megabyte."""
    request = _decode(body, _chat_decoder)
    _check_common(request)
    _check_messages(request.messages)
    _check_tools(request)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    if request.chat_template_args is not None and request.chat_template_kwargs is not None:
        raise BadRequest(
            "chat_template_args and chat_template_kwargs are the same; give one of them",
            "chat_template_kwargs",
        )
    return request


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises BadRequest. Linear in the body. Token ids are u32, but may be none of the model's."""
    request = _decode(body, _completion_decoder)
    _check_common(request)
    if len(prompts(request)) * (request.n or 1) > CHOICES_MAX:
        raise BadRequest(f"n for each prompt is more than {CHOICES_MAX} outputs", "n")
    if request.echo and request.logprobs is not None:
        # The prompt's own would be part of them, and engines are not asked for those.
        raise NotAvailableYet("echo with logprobs", "echo")
    guided_decoding(request)
    return request


_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)
_root_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])

_R = TypeVar("_R", bound=CommonRequest)


def _decode(body: bytes, decoder: msgspec.json.Decoder[_R]) -> _R:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        unknown = _unknown_fields(body, decoder.type)
        if unknown:
            listed = ", ".join(shown(name) for name in unknown[:_UNKNOWN_LISTED_MAX])
            raise BadRequest(
                f"unsupported parameter(s): {listed}",
                unknown[0][:SHOWN_CHARS_MAX],
                "unknown_parameter",
            ) from error
        raise _schema_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", None, "invalid_json") from error
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not valid UTF-8", None, "invalid_json") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", None, "invalid_json") from error


def _unknown_fields(body: bytes, kind: type[Struct]) -> list[str]:
    """Root fields that `kind` does not have, in order; none if the root is no object."""
    try:
        given = _root_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    return [name for name in given if name not in kind.__struct_fields__]


def _schema_error(text: str, inside: str = "") -> BadRequest:
    """msgspec's words, which end in " - at `$.path`", in ours. inside: the path of its `$`."""
    what, separator, path = text.rpartition(" - at `$")
    if not separator:
        what, path = text, ""
    path = (inside + path.removesuffix("`")).removeprefix(".")
    for start, code, rule in _FIELD_RULES:
        if what.startswith(start):
            name = what.removeprefix(start).removesuffix("`")
            param = (f"{path}.{name}" if path else name)[:SHOWN_CHARS_MAX]
            return BadRequest(f"{shown(param)} {rule}", param, code)
    what = what[:1].lower() + what[1 : 2 * SHOWN_CHARS_MAX]
    return BadRequest(f"{path or 'the body'}: {what}", path or None, "invalid_value")


_FIELD_RULES = (
    ("Object missing required field `", "missing_field", "is required"),
    ("Object contains unknown field `", "unknown_parameter", "is not a supported parameter"),
)


# --- rules ----------------------------------------------------------------------------------------


def _check_common(request: CommonRequest) -> None:
    _check_available(request, "")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    _stops(request)
    if (request.n or 1) > 1 and request.temperature == 0:
        raise BadRequest("n above 1 needs a temperature above 0: all would be the same", "n")
    min_tokens, max_tokens = request.min_tokens, max_output_tokens(request)
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise BadRequest("min_tokens is more than max_tokens", "min_tokens")
    for token_id in request.logit_bias or ():
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
            raise BadRequest(f"logit_bias: {shown(token_id)} is not a token id", "logit_bias")
    if request.nvext is not None:
        _check_nvext(request.nvext)


def _check_available(fields: Struct, inside: str) -> None:
    for name, idle in LATER[type(fields)].items():
        value = getattr(fields, name)
        if value is None:
            continue
        # By type as well, since False == 0, and `logprobs: 0` does ask for something.
        if not any(value == other and type(value) is type(other) for other in idle):
            what = inside + name
            if idle and isinstance(idle[0], str | int):
                what += f" other than {msgspec.json.encode(idle[0]).decode()}"
            raise NotAvailableYet(what, inside + name)


def _check_nvext(nvext: NvExt) -> None:
    _check_available(nvext, "nvext.")
    if nvext.agent_hints is not None:
        _check_available(nvext.agent_hints, "nvext.agent_hints.")
    for name in WORKER_IDS:
        worker_id = getattr(nvext, name)
        if worker_id is not None and worker_id > U64_MAX:
            raise BadRequest(f"nvext.{name}: expected an unsigned 64-bit integer", f"nvext.{name}")
    override = nvext.router_config_override
    if override is not None and 0 < (override.router_temperature or 0) < TEMPERATURE_MIN:
        param = "nvext.router_config_override.router_temperature"
        raise BadRequest(f"{param}: expected 0, or at least {TEMPERATURE_MIN:g}", param)
    for name in nvext.extra_fields or ():
        if name in EXTRA_FIELDS_LATER:
            raise NotAvailableYet(f"nvext.extra_fields: {name}", "nvext.extra_fields")
        if name not in EXTRA_FIELDS:
            raise BadRequest(f"nvext.extra_fields: unknown {shown(name)}", "nvext.extra_fields")
    for annotation in nvext.annotations or ():
        name, _, value = annotation.partition(":")
        if name in ANNOTATIONS_LATER:
            raise NotAvailableYet(f"nvext.annotations: {name}", "nvext.annotations")
        if name != QUERY_INSTANCE_ID or value:
            raise BadRequest(f"nvext.annotations: unknown {shown(annotation)}", "nvext.annotations")


def _check_messages(messages: list[dict[str, Any]]) -> None:
    try:
        checked = msgspec.convert(messages, list[Message])
    except msgspec.ValidationError as error:
        raise _schema_error(str(error), "messages") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", None, "invalid_json") from error
    for index, message in enumerate(checked):
        _check_message(message, f"messages[{index}]")


def _check_tools(request: ChatRequest) -> None:
    try:
        check_tools(request.tools or [])
    except msgspec.ValidationError as error:
        raise _schema_error(str(error), "tools") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", None, "invalid_json") from error
    use = tool_use(request)
    for schema in use.callable.values():
        check_depth(schema, "tools")
    if use.demanded:
        calls_schema(use)
        if any(getattr(request, name) is not None for name in _GUIDED):
            raise BadRequest("tool_choice demands a call, guided by itself", "tool_choice")
    guided_decoding(request)


_GUIDED = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")


def _check_message(message: Message, place: str) -> None:
    if message.audio is not None:
        raise NotAvailableYet(f"{place}.audio", f"{place}.audio")
    calls = message.tool_calls or message.function_call is not None
    if calls and message.role != "assistant":
        raise BadRequest(f"{place}: only an assistant calls tools", f"{place}.tool_calls")
    if not calls and (message.content is None or message.content == []):
        raise BadRequest(f"{place}.content is required", f"{place}.content", "missing_field")
    if not isinstance(message.content, list):
        return
    for index, part in enumerate(message.content):
        where = f"{place}.content[{index}]"
        if part.type in PARTS_LATER:
            raise NotAvailableYet(f"{where}: {part.type}", where)
        if part.type in MEDIA_PARTS:
            check_part(part, where)
            continue
        if part.type not in ("text", "refusal"):
            raise BadRequest(f"{where}: unknown type {shown(part.type)}", f"{where}.type")
        if (part.text if part.type == "text" else part.refusal) is None:
            raise BadRequest(f"{where}.{part.type} is required", f"{where}.{part.type}")


def _stops(request: CommonRequest) -> tuple[list[str], list[int]]:
    """Stop strings and stop token ids; one of them is empty."""
    stop = request.stop if isinstance(request.stop, list) else [request.stop]
    texts = [entry for entry in stop if isinstance(entry, str)]
    ids = [entry for entry in stop if isinstance(entry, int)]
    if texts and ids:
        raise BadRequest("stop is either strings or token ids", "stop")
    if len(stop) > STOPS_MAX:
        raise BadRequest(f"stop takes at most {STOPS_MAX} entries", "stop")
    if not all(texts):
        raise BadRequest("a stop string can't be empty", "stop")
    if any(len(text) > STOP_CHARS_MAX for text in texts):
        raise BadRequest(f"a stop string has at most {STOP_CHARS_MAX} characters", "stop")
    return texts, ids


# --- a request to what workers take ---------------------------------------------------------------


def prompts(request: CompletionRequest) -> list[Prompt]:
    """One to `PROMPTS_MAX` non-empty prompts. Raises BadRequest."""
    given = request.prompt
    found: list[Any] = [given] if isinstance(given, str) else given
    kinds = set(map(type, found))
    if len(kinds) > 1:
        raise BadRequest("prompt is a text, a list of texts or lists of token ids", "prompt")
    if kinds == {int}:
        found = [given]
    if not found or not all(found):
        raise BadRequest("a prompt can't be empty", "prompt")
    if len(found) > PROMPTS_MAX:
        raise BadRequest(f"prompt takes at most {PROMPTS_MAX} prompts", "prompt")
    return found


def max_output_tokens(request: CommonRequest) -> int | None:
    """None: as many as the context has room for."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the chat template is told besides messages and tools."""
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return variables | (request.chat_template_args or request.chat_template_kwargs or {})


def stop_conditions(request: ChatRequest | CompletionRequest) -> StopConditions:
    """As the client gave them: a caller that knows the context fills in `max_tokens`, and gives the
    engine no end tokens if `ignore_eos`."""
    texts, ids = _stops(request)
    return StopConditions(
        max_tokens=max_output_tokens(request),
        min_tokens=request.min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop=texts,
        stop_token_ids_hidden=list(dict.fromkeys([*ids, *(request.stop_token_ids or ())])),
    )


def sampling_options(
    request: ChatRequest | CompletionRequest, *, demands_call: bool = False
) -> SamplingOptions:
    """demands_call: guide the output to the calls that the request demands."""
    guided: dict[str, Any] | None
    if demands_call and isinstance(request, ChatRequest):
        guided = {"json": calls_schema(tool_use(request))}
    else:
        guided = guided_decoding(request)
    return SamplingOptions(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
        logit_bias=request.logit_bias,
        guided_decoding=guided,
        logprobs=_logprobs(request),
    )


def for_choice(sampling: SamplingOptions, choice: int) -> SamplingOptions:
    """The same for one of several outputs of a prompt, which differ by their seeds if the client
    gave one: it is the first one's."""
    if sampling.seed is None or not choice:
        return sampling
    # An i64, as seeds are.
    return replace(sampling, seed=(sampling.seed + choice + 2**63) % 2**64 - 2**63)


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None
