"""Which messages are taken, which are refused, and for which of their fields."""

from typing import Any

import pytest

from tests.unit.test_openai_types import CALL, USER, chat, refusal


@pytest.mark.parametrize(
    "message",
    [
        {"role": "developer", "content": "x"},
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": ""}], "name": "u"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": None},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "audio": None},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": [
            {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
        {"role": "function", "content": "42", "name": "f"},
    ],
)  # fmt: skip
def test_messages_that_are_taken_as_they_are(message: dict[str, Any]) -> None:
    assert chat(messages=[message]).messages == [message]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "poem"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "file"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "https://x"}]},
         "messages[1].content[0].image_url"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "file:///x"}}]},
         "messages[1].content[0].video_url.url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]},
         "messages[1].content[0].input_audio.format"),
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "x"}]},
         "messages[1].tool_calls[0].type"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "messages[1].audio"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[1].tool_call_id"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(message: Any, param: str) -> None:
    assert refusal(messages=[USER, message]).param == param
