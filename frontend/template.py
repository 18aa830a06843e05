"""Chat messages to the prompt text that a model was trained on, by its own Jinja template.

Templates are code that comes with a model, and what they loop over comes from clients. They run in
Jinja's immutable sandbox with the settings and helpers that Hugging Face gives them, and bounded:
`LOOPS_MAX` loop iterations and `CHARS_MAX` characters of output a rendering. Whatever goes wrong
while rendering is the request's fault as far as anybody can tell, hence `TemplateFailed`, a 400.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from frontend.errors import TemplateFailed
from frontend.openai_types import MEDIA_PARTS
from frontend.tokenizer import BadTokenizer, read_json, token_text

LOOPS_MAX = 200_000
"""More than any conversation that fits a context; at about 1 µs each, 0.2 s."""

CHARS_MAX = 32 * 1024 * 1024
"""Four times what a context of a million tokens holds."""

WHY_CHARS_MAX = 300
"""What a failing template says of itself is repeated to the client up to this length."""

Message = Mapping[str, Any]

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_TICK = "count_loop_iteration"
_NO_PARAMETERS = {"type": "object", "properties": {}}


class ChatTemplate:
    """A model's compiled templates: the usual one, and one for requests with tools if it has it."""

    __slots__ = ("_default", "_tokens", "_tool_use")

    def __init__(
        self, source: str, tool_use_source: str | None = None, tokens: Mapping[str, str] = {}
    ) -> None:
        """tokens: special tokens by their name in the template, such as bos_token.

        Raises jinja2.TemplateSyntaxError. About 5 ms.
        """
        environment = _environment()
        self._default = _compile(environment, source)
        self._tool_use = self._default
        if tool_use_source is not None:
            self._tool_use = _compile(environment, tool_use_source)
        self._tokens = dict(tokens)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "ChatTemplate | None":
        """From chat_template.jinja, else tokenizer_config.json; None if the model has no template.

        Raises BadTokenizer.
        """
        config = read_json(files, "tokenizer_config.json")
        file_name = "chat_template.jinja"
        if file_name in files:
            try:
                found: object = files[file_name].decode()
            except UnicodeDecodeError as error:
                raise BadTokenizer(file_name, str(error)) from error
        else:
            file_name = "tokenizer_config.json"
            found = config.get("chat_template")
        if found is None:
            return None
        sources = _sources(file_name, found)
        tokens: dict[str, str] = {}
        for name in _TOKEN_NAMES:
            text = token_text("tokenizer_config.json", name, config.get(name))
            if text is not None:
                tokens[name] = text
        try:
            return cls(sources["default"], sources.get("tool_use"), tokens)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadTokenizer(file_name, f"chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        now_ns: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = {},
    ) -> str:
        """The prompt's text, special tokens included.

        messages: as the client sent them, already validated. variables: more for the template to
        see; they override what it would see otherwise. now_ns: Unix time for `strftime_now`, UTC.
        Raises TemplateFailed. About 20 µs for a short conversation.
        """
        context = {
            **self._tokens,
            "messages": [normalise_message(message) for message in messages],
            "tools": [_normalise_tool(tool) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": partial(_strftime, now_ns),
            **variables,
            _TICK: _loop_counter(),
        }
        template = self._tool_use if tools else self._default
        pieces: list[str] = []
        room = CHARS_MAX
        try:
            for piece in template.generate(context):
                room -= len(piece)
                if room < 0:
                    raise _OverBound(f"it makes more than {CHARS_MAX} characters")
                pieces.append(piece)
        except _FAILURES as error:
            raise TemplateFailed(_why(error)) from error
        return "".join(pieces)


# --- what a template is given ---------------------------------------------------------------------


def normalise_message(message: Message) -> dict[str, Any]:
    """A message in the form that templates are written for.

    Keys that are null are absent, content excepted; content parts are one text, joined by newlines,
    and stay parts where one is an image, a sound or a video, whose place the template marks;
    the arguments of tool calls are objects where they are an object's JSON. Other keys stay.
    """
    normal = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = normal.get("content")
    if isinstance(content, list) and not any(part.get("type") in MEDIA_PARTS for part in content):
        normal["content"] = "\n".join(
            part.get("text") or part.get("refusal", "") for part in content
        )
    if "tool_calls" in normal:
        normal["tool_calls"] = [
            {**call, "function": _normalise_call(call["function"])} for call in normal["tool_calls"]
        ]
    if "function_call" in normal:
        normal["function_call"] = _normalise_call(normal["function_call"])
    return normal


def _normalise_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            # Models write broken JSON at times; the conversation must be able to go on.
            pass
    return {**call, "arguments": arguments}


def _normalise_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    if isinstance(function, dict) and function.get("parameters") is None:
        return {**tool, "function": {**function, "parameters": _NO_PARAMETERS}}
    return tool


def _strftime(now_ns: int, form: str) -> str:
    return datetime.fromtimestamp(now_ns // 1_000_000_000, UTC).strftime(form)


def _sources(file_name: str, found: object) -> dict[str, str]:
    """Template name → source, from a text or a list of {name, template}."""
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {
            entry.name: entry.template for entry in msgspec.convert(found, list[_NamedTemplate])
        }
    except msgspec.ValidationError as error:
        raise BadTokenizer(file_name, f"chat_template: {error}") from error
    if "default" not in named:
        raise BadTokenizer(file_name, "chat_template: none of them is named default")
    return named


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


# --- the environment ------------------------------------------------------------------------------


class _OverBound(Exception):
    """A rendering went over one of its bounds."""


class _Raised(Exception):
    """The template called `raise_exception`."""


_FAILURES = (
    _OverBound,
    _Raised,
    jinja2.TemplateError,
    # What a template's expressions can raise, as any Python code can.
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _why(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error) or type(error).__name__
    return text if len(text) <= WHY_CHARS_MAX else text[:WHY_CHARS_MAX] + "…"


class _Environment(ImmutableSandboxedEnvironment):
    """Also refuses repetitions and powers that would take all memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and right > 64:
                raise _OverBound("a power is too large")
        else:
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                    if len(sequence) * count > CHARS_MAX:
                        raise _OverBound(f"it makes more than {CHARS_MAX} characters")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks for training what a model said: a mere body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, LoopControlExtension],
        finalize=_finalise,
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _compile(environment: _Environment, source: str) -> jinja2.Template:
    """The template with a call of the loop counter in the body of every loop."""
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno, override=True))
    return environment.from_string(tree)


def _loop_counter() -> Callable[[], None]:
    left = LOOPS_MAX

    def count_loop_iteration() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _OverBound(f"it loops more than {LOOPS_MAX} times")

    return count_loop_iteration


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message))


def _finalise(value: object) -> object:
    # A null value in a prompt would read "None".
    return "" if value is None else value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
