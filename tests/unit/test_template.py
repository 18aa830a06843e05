"""Chat templates: what they are given, what they may do, and how they fail."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from frontend.errors import TemplateFailed
from frontend.template import CHARS_MAX, LOOPS_MAX, ChatTemplate, normalise_message
from frontend.tokenizer import BadTokenizer, Tokenizer, read_files
from tests.text import MODEL

FILES = read_files(MODEL)
NOON_NS = 1_700_000_000_123_456_789  # 2023-11-14 22:13:20 UTC
USER = {"role": "user", "content": "hi"}


def render(source: str, *messages: Mapping[str, Any], **options: Any) -> str:
    return ChatTemplate(source).render(messages or [USER], now_ns=NOON_NS, **options)


def files_with(chat_template: object, **others: bytes) -> dict[str, bytes]:
    config = {"chat_template": chat_template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    return {"tokenizer_config.json": msgspec.json.encode(config), **others}


# --- the shipped template -------------------------------------------------------------------------


def test_the_shipped_template_takes_every_role() -> None:
    template = ChatTemplate.from_files(FILES)
    assert template is not None
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You help."},
        {"role": "developer", "content": "Briefly."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "function", "name": "f", "content": "43"},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    text = template.render(messages, now_ns=0, tools=[tool])
    assert text == (
        "<|im_start|>system\nTools that may be called, one JSON object a line:\n"
        '{"type": "function", "function": {"name": "f", '
        '"parameters": {"type": "object", "properties": {}}}}\n<|im_end|>\n'
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>system\nBriefly.<|im_end|>\n"
        "<|im_start|>user\na\nb<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>tool\n43<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    """What makes a prefix cache worth having."""
    template, tokenizer = ChatTemplate.from_files(FILES), Tokenizer.from_files(FILES)
    assert template is not None
    answer = {"role": "assistant", "content": "hello there"}
    first = template.render([USER], now_ns=0)
    second = template.render([USER, answer, USER], now_ns=0)
    assert second.startswith(first)
    ids = tokenizer.encode(first, add_special_tokens=False)
    assert tokenizer.encode(second, add_special_tokens=False)[: len(ids)] == ids


# --- where templates come from --------------------------------------------------------------------


def test_a_model_without_a_template_has_none() -> None:
    assert ChatTemplate.from_files({"tokenizer_config.json": b"{}"}) is None
    assert ChatTemplate.from_files({}) is None


def test_a_list_of_templates_has_one_for_tools() -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    template = ChatTemplate.from_files(files_with(named))
    assert template is not None
    assert template.render([USER], now_ns=0) == "d"
    assert template.render([USER], now_ns=0, tools=[{}]) == "t"
    assert template.render([USER], now_ns=0, tools=[]) == "d"


def test_the_template_file_wins_and_special_tokens_have_names() -> None:
    source = b"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    template = ChatTemplate.from_files(files_with("other", **{"chat_template.jinja": source}))
    assert template is not None
    assert template.render([USER], now_ns=0) == "<s>hi</s>"


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (files_with("{% if %}"), "tokenizer_config.json"),
        (files_with("{{ x | no_such_filter }}"), "tokenizer_config.json"),
        (files_with(3), "tokenizer_config.json"),
        (files_with([{"name": "default"}]), "tokenizer_config.json"),
        (files_with([{"name": "rag", "template": ""}]), "tokenizer_config.json"),
        (files_with("", **{"chat_template.jinja": b"\xff"}), "chat_template.jinja"),
        (files_with("", **{"chat_template.jinja": b"{{"}), "chat_template.jinja"),
        (
            {"tokenizer_config.json": b'{"chat_template": "", "bos_token": 3}'},
            "tokenizer_config.json",
        ),
        ({"tokenizer_config.json": b"["}, "tokenizer_config.json"),
    ],
)
def test_a_broken_template_is_found_at_loading(files: dict[str, bytes], name: str) -> None:
    with pytest.raises(BadTokenizer) as raised:
        ChatTemplate.from_files(files)
    assert raised.value.file_name == name


# --- what templates see ---------------------------------------------------------------------------


def test_the_client_may_set_variables() -> None:
    source = "{{ add_generation_prompt }} {{ enable_thinking }} {{ tools is none }}"
    assert render(source) == "True  True"
    variables = {"add_generation_prompt": "mine", "enable_thinking": False}
    assert render(source, variables=variables) == "mine False True"


def test_a_client_cannot_set_the_loop_bound() -> None:
    source = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailed, match="loops more than"):
        render(source, variables={"count_loop_iteration": 1})


@pytest.mark.parametrize(
    ("message", "normal"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        (
            {"role": "user", "content": "a", "name": None, "thinking": "t"},
            {"role": "user", "content": "a", "thinking": "t"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": None},
            {"role": "assistant", "content": None},
        ),
        *(
            (
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": given}}],
                },
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": seen}}],
                },
            )
            for given, seen in [
                ('{"a": 1}', {"a": 1}),
                ({"a": 1}, {"a": 1}),
                ("", {}),
                (None, {}),
                ("not json", "not json"),
                ("[1]", "[1]"),
                ('{"a":' * 5000, '{"a":' * 5000),
            ]
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "assistant", "function_call": {"name": "f", "arguments": {}}},
        ),
    ],
)
def test_messages_are_normalised(message: dict[str, Any], normal: dict[str, Any]) -> None:
    assert normalise_message(message) == normal


@pytest.mark.parametrize(
    ("source", "text"),
    [
        # Blocks take no line of their own, as Hugging Face has it.
        ("{% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{{ {'b': 'é<&>', 'a': [1, none]} | tojson }}", '{"b": "é<&>", "a": [1, null]}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ strftime_now('%Y-%m-%d %H') }}", "2023-11-14 22"),
        ("{{ none }}|{{ missing }}", "|"),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
         "13"),
        ("{% for i in range(9) if i > 6 %}{{ i }}{{ loop.last }}{% endfor %}", "7False8True"),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% generation %}a{{ messages[0].role }}{% endgeneration %}", "auser"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}"
         "{{ ns.n }}", "3"),
        ("{% macro f(x) %}{% for i in x %}<{{ i }}>{% endfor %}{% endmacro %}{{ f('ab') }}",
         "<a><b>"),
        ("{{ messages[0].content.strip().upper() }} {{ 'ab' * 2 }} {{ 3 * 4 }} {{ 2 ** 8 }}",
         "HI abab 12 256"),
    ],
)  # fmt: skip
def test_the_language(source: str, text: str) -> None:
    assert render(source) == text


# --- how they fail --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ strftime_now(3) }}", "str"),
        ("{{ messages | slice(0) | list }}", "zero"),
        ("{{ messages | tojson(indent=messages) }}", ""),
        ("{% include 'x' %}", "loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__name__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", "nested too deeply"),
        ("{{ 'x' * 1000000000 }}", str(CHARS_MAX)),
        ("{{ 1000000000 * [1] }}", str(CHARS_MAX)),
        ("{{ 9 ** 9999999 }}", "power"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         f"loops more than {LOOPS_MAX}"),
        ("{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}"
         "{% endfor %}{% endmacro %}{{ f() }}", f"loops more than {LOOPS_MAX}"),
        ("{% set x = 'x' * 30000000 %}{{ x }}{{ x }}", f"more than {CHARS_MAX} characters"),
        ("{{ raise_exception('y' * 1000000) }}", "yyy…"),
    ],
)  # fmt: skip
def test_a_failing_rendering_is_the_requests_error(source: str, why: str) -> None:
    with pytest.raises(TemplateFailed) as raised:
        render(source)
    assert why in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_failed_rendering_leaves_the_template_as_it_was() -> None:
    template = ChatTemplate(
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}ok"
    )
    for _ in range(2):
        with pytest.raises(TemplateFailed):
            template.render([USER, USER], now_ns=0)
        assert template.render([USER], now_ns=0) == "ok"


def test_loops_over_what_a_client_sends_are_bounded() -> None:
    source = "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailed, match="loops more than"):
        render(source, *[USER] * 1000)
    assert render(source, *[USER] * 100) == ""


def test_parts_stay_parts_where_one_is_no_text() -> None:
    """Its place among the texts is the template's to mark."""
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    text = {"type": "text", "text": "see"}
    assert normalise_message({"role": "user", "content": [text, image]})["content"] == [text, image]
    assert normalise_message({"role": "user", "content": [text, text]})["content"] == "see\nsee"
