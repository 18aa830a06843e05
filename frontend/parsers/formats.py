"""The formats by name: those that the peer, vLLM and SGLang use.

A name counts in any case and with hyphens for underscores. Any reasoning format goes with any tool
format whose markers can be told from its own; harmony is both, and goes with itself alone.
"""

from collections.abc import Mapping
from functools import cache

from frontend.parsers.deltas import Content, Delta, OutputParser, WholeCalls
from frontend.parsers.grammar import Grammar, GrammarParser, ToolFormat, Tools
from frontend.parsers.harmony import harmony
from frontend.parsers.json_calls import bare_json, mistral, tagged_json
from frontend.parsers.pythonic import pythonic
from frontend.parsers.text import ThinkTags, text_grammar
from frontend.parsers.token_calls import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    KIMI_K2,
    KIMI_SECTION_BEGIN,
    fenced_calls,
)
from frontend.parsers.xml_calls import MINIMAX_M2, QWEN3_CODER, dsml, xml_calls

HARMONY = "harmony"
GPT_OSS = "gpt_oss"
APPEND_THINK = "minimax_append_think"
GUIDED = "guided"
"""What a request that demands a call makes an engine with guided decoding write."""

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": tagged_json("<tool_call>", closing="</tool_call>"),
    "llama3_json": tagged_json("<|python_tag|>", bare=True),
    "mistral": mistral(),
    "qwen3_coder": xml_calls(QWEN3_CODER),
    "deepseek_v3": fenced_calls(DEEPSEEK_V3),
    "deepseek_v3_1": fenced_calls(DEEPSEEK_V3_1),
    "deepseek_v3_2": xml_calls(dsml("function_calls")),
    "deepseek_v4": xml_calls(dsml("tool_calls")),
    "pythonic": pythonic(),
    "kimi_k2": fenced_calls(KIMI_K2),
    "minimax_m2": xml_calls(MINIMAX_M2),
    "nemotron_deci": tagged_json("<TOOLCALL>", closing="</TOOLCALL>"),
    "jamba": tagged_json("<tool_calls>", closing="</tool_calls>"),
    "default": tagged_json("<TOOLCALL>", "<|python_tag|>", closing="</TOOLCALL>", bare=True),
    "phi4": tagged_json("functools"),
    GUIDED: bare_json(),
}

TOOL_ALIASES: Mapping[str, str] = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "qwen3_xml": "qwen3_coder",
    "nemotron_nano": "qwen3_coder",
    "mimo": "qwen3_coder",
    "step3p5": "qwen3_coder",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v3_1",
    "deepseek_v31": "deepseek_v3_1",
    "deepseekv32": "deepseek_v3_2",
    "deepseek_v32": "deepseek_v3_2",
    "deepseekv4": "deepseek_v4",
    "llama4_pythonic": "pythonic",
    "gpt_oss": HARMONY,
    "openai": HARMONY,
    "kimi_k25": "kimi_k2",
    "phi4_mini_json": "phi4",
}

_THINK = ThinkTags()
_INSIDE_THINK = ThinkTags(inside=True)

REASONING_FORMATS: Mapping[str, ThinkTags] = {
    "basic": _THINK,
    "deepseek_r1": _INSIDE_THINK,
    "qwen3": _THINK,
    "mistral": ThinkTags(("[THINK]",), ("[/THINK]",)),
    "kimi": ThinkTags(("◁think▷",), ("◁/think▷",)),
    APPEND_THINK: ThinkTags((), ()),
    "kimi_k25": ThinkTags(inside=True, interrupts=KIMI_SECTION_BEGIN),
    "granite": ThinkTags(
        ("Here's my thought process:", "Here is my thought process:"),
        ("Here's my response:", "Here is my response:"),
    ),
    "cohere_command": ThinkTags(
        ("<|START_THINKING|>",),
        ("<|END_THINKING|>",),
        dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "seed_oss": ThinkTags(("<seed:think>",), ("</seed:think>",)),
}

REASONING_ALIASES: Mapping[str, str] = {
    "deepseek_v3": "basic",
    "deepseek_v3_1": "basic",
    "deepseek_v3_2": "basic",
    "deepseek_v4": "basic",
    "deepseekv4": "basic",
    "nemotron_deci": "basic",
    "glm45": "basic",
    "glm47": "basic",
    "mimo": "basic",
    "minimax": "basic",
    "olmo3": "basic",
    "qwen3_coder": "basic",
    "qwen3_thinking": "deepseek_r1",
    "step3": "deepseek_r1",
    "step3p5": "deepseek_r1",
    "nemotron_nano": "deepseek_r1",
    "nemotron3": "deepseek_r1",
    "nemotron_3": "deepseek_r1",
    "nemotron_v3": "deepseek_r1",
    "nano_v3": "deepseek_r1",
    "minimax_m2": "deepseek_r1",
    "kimi_k2": "kimi_k25",
    "cohere_command3": "cohere_command",
    "cohere_command4": "cohere_command",
    "openai_gptoss": GPT_OSS,
    "harmony": GPT_OSS,
    "minimax_m2_append_think": APPEND_THINK,
}


class UnknownFormat(ValueError):
    """No format has this name, or two don't go together. The message says what there is."""


def tool_format(name: str) -> str:
    """The format's own name. UnknownFormat: there is none."""
    return _canonical("tool", name, TOOL_ALIASES, [*TOOL_FORMATS, HARMONY])


def reasoning_format(name: str) -> str:
    """The format's own name. UnknownFormat: there is none."""
    return _canonical("reasoning", name, REASONING_ALIASES, [*REASONING_FORMATS, GPT_OSS])


def _canonical(kind: str, name: str, aliases: Mapping[str, str], known: list[str]) -> str:
    plain = name.lower().replace("-", "_")
    plain = aliases.get(plain, plain)
    if plain not in known:
        listed = ", ".join(sorted([*known, *aliases]))
        raise UnknownFormat(f"unknown {kind} parser {name!r}; known are {listed}")
    return plain


def output_parser(
    *,
    tools_as: str | None = None,
    reasoning_as: str | None = None,
    tools: Tools | None = None,
    prompt: str = "",
    whole_calls: bool = False,
) -> OutputParser:
    """A parser for one output. UnknownFormat: a name is none, or harmony is mixed with another.

    tools_as, reasoning_as: formats; None: such text is content. tools: what may be called, with
    the parameters' schemas; None: anything. prompt: the rendered prompt, or its end, which may tell
    whether the output begins with reasoning. whole_calls: a call comes at once when it is complete.
    """
    tool_name = None if tools_as is None else tool_format(tools_as)
    reasoning_name = None if reasoning_as is None else reasoning_format(reasoning_as)
    tags = None if reasoning_name is None else REASONING_FORMATS.get(reasoning_name)
    inside = tags is not None and tags.inside_after(prompt)
    if tool_name is None and reasoning_name == GPT_OSS:
        tools = {}  # no call is one then
    parser: OutputParser
    parser = GrammarParser(_grammar(tool_name, reasoning_name, inside), tools)
    if reasoning_name == APPEND_THINK:
        parser = _AppendThink(parser)
    return WholeCalls(parser) if whole_calls else parser


@cache
def _grammar(tool_name: str | None, reasoning_name: str | None, inside: bool) -> Grammar:
    """By the formats' own names."""
    if tool_name == HARMONY or reasoning_name == GPT_OSS:
        if tool_name not in (None, HARMONY) or reasoning_name not in (None, GPT_OSS):
            raise UnknownFormat(f"{tool_name} and {reasoning_name} are of different models")
        return harmony
    calls_as = None if tool_name is None else TOOL_FORMATS[tool_name]
    tags = None if reasoning_name is None else REASONING_FORMATS[reasoning_name]
    try:
        return text_grammar(calls_as, tags, inside)
    except ValueError as error:
        raise UnknownFormat(f"{tool_name} does not go with {reasoning_name}: {error}") from None


class _AppendThink:
    """MiniMax's habit of leaving reasoning in the content: the opening tag, which is in the prompt,
    is put back before it."""

    __slots__ = ("_begun", "_parser")

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._begun = False

    def push(self, text: str) -> list[Delta]:
        deltas = self._parser.push(text)
        if deltas and not self._begun:
            self._begun = True
            return [Content("<think>"), *deltas]
        return deltas

    def finish(self) -> list[Delta]:
        return self._parser.finish()
