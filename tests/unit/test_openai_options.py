"""What requests ask of engines beyond plain sampling: seeds, log probabilities, guided outputs."""

import json
from typing import Any

import pytest

from frontend.guided import SCHEMA_DEPTH_MAX
from frontend.openai import for_choice, sampling_options
from tests.unit.test_openai_types import TOOL, chat, completion, refusal


def test_choices_of_a_prompt_differ_by_their_seeds() -> None:
    seven = sampling_options(chat(seed=7))
    assert [for_choice(seven, index).seed for index in range(3)] == [7, 8, 9]
    assert for_choice(sampling_options(chat(seed=2**63 - 1)), 1).seed == -(2**63)
    assert for_choice(sampling_options(chat(n=3)), 2).seed is None


def test_logprobs_say_how_many_alternatives() -> None:
    assert sampling_options(chat(logprobs=True)).logprobs == 0
    assert sampling_options(chat(logprobs=True, top_logprobs=5)).logprobs == 5
    assert sampling_options(chat(logprobs=False)).logprobs is None
    assert sampling_options(completion(logprobs=0)).logprobs == 0


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "guided"),
    [
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": SCHEMA}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        (
            {"guided_grammar": "g", "guided_decoding_backend": "b"},
            {"grammar": "g", "backend": "b"},
        ),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "},
         {"regex": "a", "whitespace_pattern": " "}),
        ({"guided_decoding_backend": "b"}, None),
    ],
)  # fmt: skip
def test_what_the_output_must_conform_to_goes_to_the_engine(
    fields: dict[str, Any], guided: dict[str, Any] | None
) -> None:
    assert sampling_options(chat(**fields)).guided_decoding == guided


def test_a_demanded_call_is_guided_to_the_tools_that_may_be_called() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    tools = {"tools": [TOOL, other]}
    any_of_them = sampling_options(chat(**tools, tool_choice="required"), demands_call=True)
    assert any_of_them.guided_decoding is not None
    schema = any_of_them.guided_decoding["json"]
    names = [one["properties"]["name"]["enum"] for one in schema["items"]["anyOf"]]
    assert (schema["type"], schema["minItems"], names) == ("array", 1, [["f"], ["g"]])
    named = {"tool_choice": {"type": "function", "function": {"name": "g"}}}
    one = sampling_options(chat(**tools, **named, parallel_tool_calls=False), demands_call=True)
    assert one.guided_decoding is not None
    schema = one.guided_decoding["json"]
    assert (schema["maxItems"], schema["items"]["properties"]["name"]) == (
        1,
        {"type": "string", "enum": ["g"]},
    )


def test_definitions_of_tools_go_to_the_root_of_the_schema() -> None:
    def tool(name: str, definition: Any) -> Any:
        parameters = {"$defs": {"d": definition}, "properties": {"x": {"$ref": "#/$defs/d"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    asked = chat(tools=[tool("a", {"type": "null"})], tool_choice="required")
    guided = sampling_options(asked, demands_call=True).guided_decoding
    assert guided is not None and guided["json"]["$defs"] == {"d": {"type": "null"}}
    assert "$defs" not in guided["json"]["items"]["properties"]["parameters"]
    tools = [tool("a", {"type": "null"}), tool("b", {"type": "string"})]
    assert refusal(tools=tools, tool_choice="required").param == "tools"
    chat(tools=tools)


def test_schemas_are_nested_as_deep_as_every_coder_can_follow() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for level in range(1, depth):
            schema = {"a": [schema]} if level % 3 == 0 else {"a": schema, "b": "x"}
        return schema

    deep = nested(SCHEMA_DEPTH_MAX - SCHEMA_DEPTH_MAX // 3)
    too_deep = nested(SCHEMA_DEPTH_MAX)
    for schema, is_taken in ((deep, True), (too_deep, False)):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        format = {"type": "json_schema", "json_schema": {"schema": schema}}
        for param, value in (
            ("tools", [tool]),
            ("guided_json", schema),
            ("guided_json", json.dumps(schema)),
            ("response_format", format),
        ):
            if is_taken:
                chat(**{param: value})
            else:
                assert refusal(**{param: value}).param == param
