"""The real `openai` SDK, asynchronous and synchronous, against a frontend over a real socket."""

import asyncio

import openai
import pytest

from tests.integration.harness import MODEL, Harness, frontend


def messages() -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


async def client_of(here: Harness) -> openai.AsyncOpenAI:
    await here.add_worker(3, echo="Grüße, friend 👋")
    await here.until_served()
    return openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0)


async def test_async_chat_whole_and_streamed() -> None:
    async with frontend() as here, await client_of(here) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        whole = await client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=9)
        assert whole.choices[0].message.content == "Grüße, friend 👋"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages(),
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Grüße, friend 👋"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
        await here.assert_nothing_left()


async def test_async_completions_of_texts_and_token_ids() -> None:
    async with frontend() as here, await client_of(here) as client:
        for prompt in ("one", ["one", "two"], [5, 6, 7]):
            answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
            assert len(answer.choices) == (2 if prompt == ["one", "two"] else 1)
            stream = await client.completions.create(model=MODEL, prompt=prompt, stream=True)
            chunks = [chunk async for chunk in stream]
            assert {c.choices[0].index for c in chunks} == {c.index for c in answer.choices}
        await here.assert_nothing_left()


async def test_errors_arrive_as_the_sdks_own_exceptions() -> None:
    async with frontend() as here, await client_of(here) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nope", messages=messages())
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=messages(), temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=[])
        await here.assert_nothing_left()


async def test_the_synchronous_client_too() -> None:
    async with frontend() as here:
        await here.add_worker(3, echo="fine")
        await here.until_served()

        def talk() -> tuple[str | None, str]:
            with openai.OpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0) as client:
                whole = client.chat.completions.create(model=MODEL, messages=messages())
                stream = client.chat.completions.create(
                    model=MODEL, messages=messages(), stream=True
                )
                parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
            return whole.choices[0].message.content, "".join(parts)

        assert await asyncio.to_thread(talk) == ("fine", "fine")
        await here.assert_nothing_left()
