"""Tools and reasoning through the real `openai` SDK; the worker says what a model would write."""

import asyncio
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.integration.harness import MODEL, TOKENIZER, Harness, card, frontend
from tests.waiting import eventually
from workers.protocol import Output, TokenLogprobs

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln"}'
THOUGHT = "<think>Where is it?\nIn Köln.</think>"
QUESTION: Any = [{"role": "user", "content": "How is the weather?"}]


async def client_of(here: Harness, says: str, **fields: Any) -> openai.AsyncOpenAI:
    await here.add_worker(3, echo=says, model=card(**fields))
    await here.until_served()
    return openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0)


def function_call(call: Any) -> tuple[str, str]:
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    return call.function.name, call.function.arguments


async def test_a_whole_message_has_its_reasoning_its_text_and_its_calls() -> None:
    says = f"{THOUGHT}Let me look. {CALL}\n{CALL}"
    async with (
        frontend() as here,
        await client_of(here, says, tool_call_parser="hermes", reasoning_parser="qwen3") as client,
    ):
        answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[TOOL])
        [choice] = answer.choices
        message = choice.message
        assert choice.finish_reason == "tool_calls"
        assert message.content is not None and message.content.strip() == "Let me look."
        assert message.model_extra == {"reasoning_content": "Where is it?\nIn Köln."}
        assert message.tool_calls is not None
        assert [function_call(call) for call in message.tool_calls] == [("weather", ARGUMENTS)] * 2
        assert len({call.id for call in message.tool_calls}) == 2

        # The conversation goes on with the call and its result, as the SDK has them.
        after = [
            *QUESTION,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
        ]
        await client.chat.completions.create(model=MODEL, messages=after, tools=[TOOL])
        one = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[TOOL], parallel_tool_calls=False
        )
        assert len(one.choices[0].message.tool_calls or []) == 1
        await here.assert_nothing_left()


async def test_a_stream_has_the_same_parts_token_by_token() -> None:
    says = f"{THOUGHT}Let me look. {CALL}"
    async with (
        frontend() as here,
        await client_of(here, "", tool_call_parser="hermes", reasoning_parser="qwen3") as client,
    ):
        worker = here.workers[0]
        worker.echo = None
        stream = await _streamed(client, worker, says, tools=[TOOL])
        assert stream["reasoning"] == "Where is it?\nIn Köln."
        assert stream["content"].strip() == "Let me look."
        assert stream["calls"] == [(0, "weather", ARGUMENTS)]
        assert stream["finish"] == "tool_calls"
        assert stream["roles"] == 1
        await here.assert_nothing_left()


async def _streamed(
    client: openai.AsyncOpenAI, worker: Any, says: str, **fields: Any
) -> dict[str, Any]:
    """What a client collects of a stream that comes a few characters at a time."""
    async with asyncio.TaskGroup() as tasks:
        before = len(worker.streams)

        async def feed() -> None:
            await eventually(lambda: len(worker.streams) > before)
            stream = worker.streams[before]
            for start in range(0, len(says), 3):
                stream.send(says[start : start + 3])
            stream.send(finish="stop")

        tasks.create_task(feed())
        chunks = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, stream=True, **fields
        )
        found: dict[str, Any] = {
            "content": "", "reasoning": "", "calls": [], "finish": None, "roles": 0,
        }  # fmt: skip
        async for chunk in chunks:
            [choice] = chunk.choices
            delta = choice.delta
            found["roles"] += delta.role is not None
            found["content"] += delta.content or ""
            found["reasoning"] += (delta.model_extra or {}).get("reasoning_content", "")
            found["calls"] += [
                (call.index, call.function.name, call.function.arguments)
                for call in delta.tool_calls or []
                if call.function is not None
            ]
            found["finish"] = choice.finish_reason or found["finish"]
        return found


async def test_reasoning_is_counted_and_log_probabilities_are_of_every_token() -> None:
    """Alike in a stream and at once, where tokens come one by one."""
    thought, rest = THOUGHT.removesuffix("</think>"), f"</think>So: {CALL}"
    ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in (thought, rest)]

    def on_generate(connection: Any, stream: int, request: Any) -> None:
        for token_id in [*ids[0], *ids[1]]:
            connection.send([Output(stream, [token_id], logprobs=[TokenLogprobs(-1.0, [])])])
        connection.send([Output(stream, [], "stop")])

    async with (
        frontend() as here,
        await client_of(here, "", tool_call_parser="hermes", reasoning_parser="qwen3") as client,
    ):
        here.workers[0].on_generate = on_generate  # type: ignore[method-assign]
        asked: Any = {"model": MODEL, "messages": QUESTION, "tools": [TOOL], "logprobs": True}
        whole = await client.chat.completions.create(**asked)
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        chunks = [
            chunk async for chunk in await client.chat.completions.create(**asked, stream=True)
        ]
        for usage in (whole.usage, chunks[-1].usage):
            assert usage is not None and usage.completion_tokens_details is not None
            counted = usage.completion_tokens_details.reasoning_tokens
            assert counted is not None and abs(counted - len(ids[0])) <= 1
            assert usage.completion_tokens == len(ids[0]) + len(ids[1])
        assert all(chunk.usage is not None for chunk in chunks)
        told = whole.choices[0].logprobs
        assert told is not None and told.content is not None
        spoken = b"".join(bytes(one.bytes or []) for one in told.content)
        assert spoken.decode() == thought + rest
        streamed: list[Any] = []
        for chunk in chunks[:-1]:
            logprobs = chunk.choices[0].logprobs
            streamed += (logprobs.content or []) if logprobs is not None else []
        assert streamed == told.content


async def test_the_sdk_accumulates_a_stream_into_the_whole_message() -> None:
    async with (
        frontend() as here,
        await client_of(here, f"So: {CALL}", tool_call_parser="hermes") as client,
    ):
        async with client.chat.completions.stream(
            model=MODEL, messages=QUESTION, tools=[TOOL]
        ) as stream:
            final = await stream.get_final_completion()
        [call] = final.choices[0].message.tool_calls or []
        assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
        assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_a_demanded_call_is_guided_and_read_without_any_parser(choice: Any) -> None:
    says = '[{"name": "weather", "parameters": {"city": "Köln"}}]'
    async with frontend() as here, await client_of(here, says) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice=choice
        )
        message = answer.choices[0].message
        assert message.content is None
        [call] = message.tool_calls or []
        assert function_call(call) == ("weather", ARGUMENTS)
        guided = here.workers[0].streams[0].request.sampling_options.guided_decoding
        assert guided is not None
        assert guided["json"]["items"]["properties"]["name"]["enum"] == ["weather"]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(
                model=MODEL, messages=QUESTION, tool_choice="required"
            )
        assert refused.value.param == "tool_choice"


async def test_markup_stays_text_where_nothing_was_to_be_called() -> None:
    async with (
        frontend() as here,
        await client_of(here, CALL, tool_call_parser="hermes") as client,
    ):
        none: Any = {"tools": [TOOL], "tool_choice": "none"}
        nothing: Any = {}
        for fields in (nothing, none):
            answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, **fields)
            assert answer.choices[0].message.content == CALL
            assert answer.choices[0].finish_reason == "stop"
        other: Any = {"type": "function", "function": {"name": "other"}}
        answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[other])
        assert answer.choices[0].message.tool_calls is None
        assert "Köln" in (answer.choices[0].message.content or "")
        # With `none` the template says nothing of tools either.
        prompts = [len(stream.request.token_ids) for stream in here.workers[0].streams]
        assert prompts[0] == prompts[1] < prompts[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_call_parser": "morse"},
        {"reasoning_parser": "morse"},
        {"tool_call_parser": "harmony", "reasoning_parser": "qwen3"},
    ],
)
async def test_a_worker_whose_output_nobody_can_read_is_refused_and_told(
    fields: dict[str, str],
) -> None:
    async with frontend() as here:
        worker = await here.add_worker(3, echo="", model=card(**fields))
        await eventually(lambda: bool(worker.refusals))
        assert not here.process.router.has_workers(MODEL)
        assert "morse" in worker.refusals[0].why or "different models" in worker.refusals[0].why
