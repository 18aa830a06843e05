"""Several choices, log probabilities, echoes and media through the real `openai` SDK."""

from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from tests.integration.harness import MODEL, TOKENIZER, Harness, card, frontend
from tests.integration.mock_workers import mock_worker
from workers.protocol import Output, TokenLogprobs

QUESTION: Any = [{"role": "user", "content": "Hello!"}]
TEXT = "Grüße, friend 👋"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)


async def client_of(here: Harness, says: str | None = None, **fields: Any) -> openai.AsyncOpenAI:
    await here.add_worker(3, echo=says, model=card(**fields))
    await here.until_served()
    return openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0)


def answer_with_logprobs(here: Harness) -> None:
    """Have the worker say TEXT token by token, then an end token, with what it was asked for."""
    worker = here.workers[0]

    def on_generate(connection: Any, stream: int, request: Any) -> None:
        count = request.sampling_options.logprobs
        ids = [*IDS, TOKENIZER.eos_token_ids[0]]
        for number, token_id in enumerate(ids):
            last = number == len(ids) - 1
            top = [(token_id, -0.5), (IDS[0], float("-inf"))][:count]
            logprobs = [TokenLogprobs(-0.5, top)]
            reason = "eos" if last else None
            connection.send([Output(stream, [token_id], reason, 0, logprobs=logprobs)])

    worker.on_generate = on_generate  # type: ignore[method-assign]


async def test_several_choices_are_generations_of_their_own() -> None:
    async with frontend() as here, await client_of(here, TEXT) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=3, seed=5, temperature=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert {choice.message.content for choice in answer.choices} == {TEXT}
        requests = [stream.request for stream in here.workers[0].streams]
        assert sorted(request.sampling_options.seed or 0 for request in requests) == [5, 6, 7]
        assert all(request.sampling_options.n is None for request in requests)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(requests[0].token_ids)
        assert answer.usage.completion_tokens == 3 * len(IDS)
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=2, stream=True
        )
        texts, roles, ends = ["", ""], [0, 0], [0, 0]
        async for chunk in stream:
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role is not None
            ends[choice.index] += choice.finish_reason is not None
        assert (texts, roles, ends) == ([TEXT, TEXT], [1, 1], [1, 1])
        both = await client.completions.create(model=MODEL, prompt=["one", "two three"], n=2)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert len({len(s.request.token_ids) for s in here.workers[0].streams[-4:]}) == 2
        await here.assert_nothing_left()


async def test_chat_logprobs_whole_and_streamed_are_the_same() -> None:
    async with frontend() as here, await client_of(here) as client:
        answer_with_logprobs(here)
        asked: Any = {"model": MODEL, "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
        answer = await client.chat.completions.create(**asked)
        assert answer.choices[0].logprobs is not None
        whole = answer.choices[0].logprobs.content or []
        assert len(whole) == len(IDS), "the end token is no part of the output"
        assert b"".join(bytes(one.bytes or []) for one in whole).decode() == TEXT
        assert whole[0].logprob == -0.5
        assert [one.logprob for one in whole[0].top_logprobs] == [-0.5, -9999.0]
        streamed: list[Any] = []
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            logprobs = chunk.choices[0].logprobs
            streamed += (logprobs.content or []) if logprobs is not None else []
        assert streamed == whole
        del asked["top_logprobs"]
        bare = await client.chat.completions.create(**asked)
        assert bare.choices[0].logprobs is not None
        assert [one.top_logprobs for one in bare.choices[0].logprobs.content or []] == [[]] * len(
            IDS
        )
        plain = await client.chat.completions.create(model=MODEL, messages=QUESTION)
        assert plain.choices[0].logprobs is None


async def test_logprobs_end_with_what_a_stop_string_ends() -> None:
    async with frontend() as here, await client_of(here) as client:
        answer_with_logprobs(here)
        answer = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, logprobs=True, stop=[","]
        )
        assert answer.choices[0].message.content == "Grüße"
        assert answer.choices[0].logprobs is not None
        tokens = [one.token for one in answer.choices[0].logprobs.content or []]
        assert tokens[-1] == "," and len(tokens) < len(IDS)


async def test_completion_logprobs_say_where_their_tokens_begin() -> None:
    async with frontend() as here, await client_of(here) as client:
        answer_with_logprobs(here)
        answer = await client.completions.create(model=MODEL, prompt="x", logprobs=1)
        [choice] = answer.choices
        logprobs = choice.logprobs
        assert logprobs is not None and choice.text == TEXT
        assert logprobs.tokens is not None and logprobs.text_offset is not None
        assert logprobs.token_logprobs == [-0.5] * len(IDS)
        assert logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens]
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert "\ufffd" in token or TEXT[offset:].startswith(token)
        offsets: list[int] = []
        stream = await client.completions.create(model=MODEL, prompt="x", logprobs=1, stream=True)
        async for chunk in stream:
            if chunk.choices[0].logprobs is not None:
                offsets += chunk.choices[0].logprobs.text_offset or []
        assert offsets == logprobs.text_offset
        await here.assert_nothing_left()


async def test_an_echo_is_the_prompt_before_the_text() -> None:
    async with frontend() as here, await client_of(here, " and more") as client:
        for prompt in ("one", ["one", "two"], TOKENIZER.encode("one", add_special_tokens=False)):
            answer = await client.completions.create(model=MODEL, prompt=prompt, echo=True, n=2)
            expected = ["one and more"] * 2
            if prompt == ["one", "two"]:
                expected += ["two and more"] * 2
            assert [choice.text for choice in answer.choices] == expected
        stream = await client.completions.create(model=MODEL, prompt="one", echo=True, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one and more"


async def test_media_go_to_workers_that_take_them_and_are_refused_for_others() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    both: Any = [
        {"role": "user", "content": [{"type": "text", "text": "See:"}, image]},
        {"role": "user", "content": [sound, {**image, "image_url": {"url": "data:image/png,x"}}]},
    ]
    async with (
        frontend() as here,
        await client_of(here, "ok", modalities=["text", "image", "audio"]) as client,
    ):
        await client.chat.completions.create(model=MODEL, messages=both)
        assert here.workers[0].streams[0].request.multi_modal_data == {
            "image_url": [{"Url": "https://example.com/a.png"}, {"Url": "data:image/png,x"}],
            "audio_url": [{"Url": "data:audio/wav;base64,UklGRg=="}],
        }
    async with frontend() as here, await client_of(here, "ok", modalities=["text"]) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=MODEL, messages=both)
        assert refused.value.param == "messages[0].content[1]"
        assert "takes no image" in refused.value.message
        assert not here.workers[0].streams


@pytest.mark.parametrize("roles", [("aggregated",), ("prefill", "decode")])
async def test_the_mock_engines_choices_and_logprobs_are_the_same_in_a_stream(
    roles: tuple[str, ...],
) -> None:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(frontend())
        for role in roles:
            await stack.enter_async_context(mock_worker(here, role))
        counts: Any = dict.fromkeys(roles, 1)
        await here.until_served(**counts)
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0)
        )
        asked: Any = {
            "model": MODEL, "messages": QUESTION, "n": 2, "seed": 3, "max_tokens": 9,
            "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        whole = await client.chat.completions.create(**asked)
        texts = [choice.message.content for choice in whole.choices]
        assert len(set(texts)) == 2
        streamed: list[Any] = [[], []]
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            [choice] = chunk.choices
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content or []
        for choice, tokens in zip(whole.choices, streamed, strict=True):
            assert choice.logprobs is not None and choice.logprobs.content == tokens
            assert len(tokens) == 9 and all(len(one.top_logprobs) == 3 for one in tokens)
            told = b"".join(bytes(one.bytes or []) for one in tokens)
            assert told.decode("utf-8", "replace") == choice.message.content
        await here.assert_nothing_left()
