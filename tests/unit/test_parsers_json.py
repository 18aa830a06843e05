"""Calls as JSON objects: hermes, llama3_json, mistral and kin."""

import pytest

from frontend.parsers import (
    Content,
    Message,
    ToolArguments,
    ToolCall,
    ToolCallAbandoned,
    ToolCallEnded,
    ToolCallStarted,
    Tools,
    collect,
    output_parser,
)

WEATHER = ToolCall("get_weather", '{"city": "Łódź", "days": 3}')


def parse(text: str, tools_as: str, tools: Tools | None = None) -> Message:
    parser = output_parser(tools_as=tools_as, tools=tools)
    return collect(parser.push(text) + parser.finish())


def test_hermes_with_text_before_and_two_calls() -> None:
    text = (
        "I'll look that up.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Łódź", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    )
    message = parse(text, "hermes")
    assert message == Message("I'll look that up.\n", "", [WEATHER, ToolCall("now", "{}")])


def test_a_call_in_its_deltas() -> None:
    parser = output_parser(tools_as="hermes")
    assert parser.push("Sure. <tool") == [Content("Sure. ")]
    assert parser.push('_call>{"name": "now", "argu') == []
    assert parser.push('ments": {"zo') == [ToolCallStarted(0, "now"), ToolArguments(0, '{"zo')]
    assert parser.push('ne": "UTC"') == [ToolArguments(0, 'ne": "UTC"')]
    assert parser.push("}}</tool_call>") == [ToolArguments(0, "}"), ToolCallEnded(0)]
    assert parser.finish() == []


def test_what_could_become_a_tag_and_does_not_goes_out() -> None:
    parser = output_parser(tools_as="hermes")
    assert parser.push("a <tool") == [Content("a ")]
    assert parser.push("box> b <") == [Content("<toolbox> b ")]
    assert parser.finish() == [Content("<")]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"text": "} </tool_call> {"}',
        '{"text": "she said \\"<tool_call>\\" \\\\"}',
        '{"text": "caf\\u00e9 \\ud83d\\ude00", "list": [[], {}, [{"a": null}]]}',
        '{ "n" : -1.5E+3 ,\n"b":false}',
        '{"<think>": "</think>"}',
    ],
)
def test_arguments_stay_as_the_model_wrote_them(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    parser = output_parser(tools_as="hermes", reasoning_as="qwen3")
    assert collect(parser.push(text)).calls == [ToolCall("f", arguments)]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"type": "function", "name": "f", "x": [1], "parameters": {}}', "{}"),
    ],
)
def test_other_ways_to_write_a_call(call: str, arguments: str) -> None:
    assert parse(f"<tool_call>{call}</tool_call>", "hermes").calls == [ToolCall("f", arguments)]


@pytest.mark.parametrize(
    "body",
    [
        "nothing here",
        "{",
        "{}",
        '{"name": "f"}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no object"}',
        '{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"} "}x',
        '{"name": "f", "arguments": {"a": tru}}',
        '{"name": "f", "arguments": {"a": 01}}',
        '{"name": "f", "arguments": {"a": "line\nbreak"}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": ' + '{"a":' * 200 + "1" + "}" * 201,
    ],
)
def test_what_is_no_call_is_content(body: str) -> None:
    for text in (f"<tool_call>{body}</tool_call> ok", f"\n<tool_call>{body}"):
        message = parse(text, "hermes")
        if "\\\\ud800" in body:
            # JSON may escape what UTF-8 can't encode, and such arguments are passed on.
            assert [call.arguments for call in message.calls] == ['{"a": "\\ud800"}']
        else:
            assert message == Message(text)


def test_a_broken_call_between_good_ones() -> None:
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    broken = '<tool_call>{"name": "f", "arguments": {"a" 1}}</tool_call>'
    message = parse(good + broken + "\n" + good, "hermes")
    assert message == Message(broken + "\n", "", [ToolCall("f", "{}")] * 2)


def test_a_call_that_has_started_and_breaks_is_abandoned() -> None:
    parser = output_parser(tools_as="hermes")
    text = '<tool_call>{"name": "f", "arguments": {"a": '
    assert parser.push(text + "oops") == [
        ToolCallStarted(0, "f"),
        ToolArguments(0, '{"a": '),
        ToolCallAbandoned(0, text),
        Content("oops"),
    ]


def test_whole_calls_are_counted_without_the_abandoned_ones() -> None:
    parser = output_parser(tools_as="hermes", whole_calls=True)
    broken = '<tool_call>{"name": "f", "arguments": {oops'
    assert parser.push(broken + '<tool_call>{"name": "g", "arguments": {"a"') == [
        Content(broken.removesuffix("oops")),
        Content("oops"),
    ]
    assert parser.push(": 1}}") == [
        ToolCallStarted(0, "g"),
        ToolArguments(0, '{"a": 1}'),
        ToolCallEnded(0),
    ]


def test_a_missing_closing_tag_undoes_nothing() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}'
    for after, content in ((" and on", " and on"), ("\n", ""), ("\n" + text, "")):
        message = parse(text + after, "hermes")
        assert message.content == content
        assert {call.name for call in message.calls} == {"f"}


def test_only_what_is_a_tool_can_be_called() -> None:
    text = '<tool_call>{"name": "rm", "arguments": {"a": 1}}</tool_call>'
    assert parse(text, "hermes", {"ls": {}}) == Message(text)
    assert parse(text, "hermes", {"rm": {}}).calls == [ToolCall("rm", '{"a": 1}')]


def test_text_after_calls_keeps_its_spaces() -> None:
    text = ' <tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nDone. \n'
    assert parse(text, "hermes") == Message("\n\nDone. \n", "", [ToolCall("f", "{}")])


# --- llama3_json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["", "<|python_tag|>", "\n\n", "Here: <|python_tag|>"])
def test_llama_with_or_without_its_tag(tag: str) -> None:
    text = '{"name": "get_weather", "parameters": {"city": "Łódź", "days": 3}}'
    message = parse(tag + text + "; " + text, "llama3_json")
    assert message.calls == [WEATHER, WEATHER]
    assert message.content == ("Here: " if "Here" in tag else "")


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 42, "name": "Deep Thought", "parameters": {}}',
        '{"name": "Ada"}',
        "[1, 2]",
        'As in {"name": "f", "parameters": {}}.',
        '<|python_tag|>brave_search.call(query="weather")',
    ],
)
def test_llama_may_answer_in_json(text: str) -> None:
    assert parse(text, "llama3_json") == Message(text)


def test_an_answer_in_json_is_not_held_back() -> None:
    parser = output_parser(tools_as="llama3_json")
    assert parser.push('{"answer": ') == [Content('{"answer": ')]


def test_text_after_a_separator_is_content() -> None:
    text = '{"name": "f", "parameters": {}}'
    assert parse(text + "; bye", "llama3_json") == Message("; bye", "", [ToolCall("f", "{}")])


# --- mistral and others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "call_id"),
    [
        ('[{"name": "get_weather", "arguments": {"city": "Łódź", "days": 3}}]', None),
        (' [{"id": "a1b2c3d4e", "name": "get_weather", "arguments": ARGUMENTS}]', "a1b2c3d4e"),
        # An id behind the arguments comes too late for a stream.
        ('[{"name": "get_weather", "arguments": ARGUMENTS, "id": "a1b2c3d4e"}]', None),
        ("get_weatherARGUMENTS", None),
        ("get_weather[ARGS]ARGUMENTS", None),
        ("get_weather[CALL_ID]a1b2c3d4e[ARGS]ARGUMENTS", "a1b2c3d4e"),
    ],
)
def test_mistral_in_all_its_ways(text: str, call_id: str | None) -> None:
    text = text.replace("ARGUMENTS", WEATHER.arguments)
    message = parse("Ok." + 2 * ("[TOOL_CALLS]" + text), "mistral")
    call = ToolCall(WEATHER.name, WEATHER.arguments, call_id)
    assert message == Message("Ok.", "", [call, call])


@pytest.mark.parametrize("text", ["[TOOL_CALLS]", "[TOOL_CALLS] f g", "[TOOL_CALLS]f[ARGS][1]"])
def test_mistral_broken(text: str) -> None:
    assert parse(text, "mistral") == Message(text)


def test_an_array_that_breaks_off_keeps_its_first_calls() -> None:
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "argu'
    assert parse(text, "mistral") == Message(', {"name": "g", "argu', "", [ToolCall("f", "{}")])


@pytest.mark.parametrize(
    ("tools_as", "before", "after"),
    [
        ("nemotron_deci", "<TOOLCALL>", "</TOOLCALL>"),
        ("jamba", "<tool_calls>", "</tool_calls>"),
        ("phi4", "functools", ""),
        ("guided", "", ""),
    ],
)
def test_arrays_between_other_tags(tools_as: str, before: str, after: str) -> None:
    text = '[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {}}]'
    message = parse(before + text + after, tools_as)
    assert message == Message("", "", [ToolCall("f", "{}"), ToolCall("g", "{}")])
