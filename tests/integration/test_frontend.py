"""The HTTP side over a real socket: shapes, streams, errors, and what the log says of each."""

import asyncio
import gc
import json
from typing import Any

import aiohttp
import pytest

from eventstore import events
from frontend.generation import Generation
from tests.integration.harness import MODEL, TOKENIZER, Harness, card, frontend
from tests.waiting import eventually

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}


async def post(here: Harness, path: str, body: Any, **more: Any) -> tuple[int, Any, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(here.url + path, json=body, **more) as response,
    ):
        return response.status, await response.json(), response.headers


async def get(here: Harness, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(here.url + path) as response:
        return response.status, await response.json()


def frames(body: str) -> list[Any]:
    """The data of every frame; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


async def test_a_chat_is_rendered_routed_answered_and_recorded() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5, echo="Hi, friend!")
        await here.until_served()
        status, body, headers = await post(here, "/v1/chat/completions", CHAT)
        assert status == 200
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi, friend!", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ]
        sent = (await worker.next()).request
        text = TOKENIZER.decode(sent.token_ids, skip_special_tokens=False)
        assert text == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
        assert body["usage"]["prompt_tokens"] == len(sent.token_ids)
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert headers["x-request-id"]
        await here.assert_nothing_left()
        kinds = [type(event) for event in await here.recorded()]
        assert kinds == [
            events.WorkerRegistered,
            events.RequestAccepted,
            events.RequestRouted,
            events.PrefillCompleted,
            events.RequestCompleted,
        ]


async def test_a_stream_tells_role_text_finish_usage_and_done() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5)
        await here.until_served()
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        async with aiohttp.ClientSession() as session:
            asked = asyncio.create_task(session.post(here.url + "/v1/chat/completions", json=body))
            stream = await worker.next()
            stream.send("Hello", cached=0)
            response = await asked
            assert response.headers["content-type"] == "text/event-stream"
            # "é" in two halves: nothing may be sent between them.
            first, second = TOKENIZER.encode("é", add_special_tokens=False) or (0, 0)
            stream.send(ids=[first])
            stream.send(ids=[second])
            stream.send(finish="length")
            got = frames(await response.text())
        assert [c["choices"][0]["delta"] for c in got[:-1]] == [
            {"role": "assistant", "content": "Hello"},
            {"content": "é"},
            {},
        ]
        assert got[-2]["choices"][0]["finish_reason"] == "length"
        assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == 3
        await here.assert_nothing_left()


async def test_stop_strings_end_the_work_on_the_worker() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5)
        await here.until_served()
        body = {"model": MODEL, "prompt": "count", "stop": ["three"]}
        asked = asyncio.create_task(post(here, "/v1/completions", body))
        stream = await worker.next()
        stream.send("one two th")
        stream.send("ree four five")
        status, answer, _ = await asked
        assert status == 200
        assert answer["choices"][0]["text"] == "one two "
        assert answer["choices"][0]["finish_reason"] == "stop"
        await eventually(lambda: stream.cancelled)
        await here.assert_nothing_left()


async def test_several_prompts_are_several_choices_of_one_answer() -> None:
    async with frontend() as here:
        await here.add_worker(5, echo=" x")
        await here.until_served()
        ids = TOKENIZER.encode("token ids", add_special_tokens=False)
        for prompts in (["a", "b", "c"], [ids, ids, ids]):
            _, answer, _ = await post(here, "/v1/completions", {"model": MODEL, "prompt": prompts})
            assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
            assert [c["text"] for c in answer["choices"]] == [" x"] * 3
            assert answer["usage"]["completion_tokens"] == 3
        await here.assert_nothing_left()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_work_and_frees_the_booking(stream: bool) -> None:
    async with frontend() as here:
        worker = await here.add_worker(5)
        await here.until_served()
        async with aiohttp.ClientSession() as session:
            body = {**CHAT, "stream": stream}
            asked = asyncio.create_task(session.post(here.url + "/v1/chat/completions", json=body))
            running = await worker.next()
            running.send("some")
            if stream:
                response = await asked
                await response.content.readany()
                response.close()
            else:
                asked.cancel()
            await eventually(lambda: running.cancelled)
        await here.assert_nothing_left()
        assert any(isinstance(e, events.RequestCancelled) for e in await here.recorded())
        async with aiohttp.ClientSession() as session:
            shown = await (await session.get(here.url + "/metrics")).text()
        assert "dynamo_frontend_disconnected_clients 1.0" in shown


async def test_a_worker_lost_in_a_stream_is_an_error_frame_and_before_it_a_502() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5)
        await here.until_served()
        async with aiohttp.ClientSession() as session:
            url, body = here.url + "/v1/chat/completions", {**CHAT, "stream": True}
            asked = asyncio.create_task(session.post(url, json=body))
            running = await worker.next()
            running.send("some")
            response = await asked
            running.connection.abort()
            got = frames(await response.text())
            assert got[-1]["error"]["code"] == "worker_lost"
            await here.until_served()
            asked = asyncio.create_task(session.post(url, json=body))
            (await worker.next(1)).connection.abort()
            response = await asked
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "worker_lost"
        await here.assert_nothing_left()


async def test_an_engines_refusal_has_a_status_and_its_words_stay_inside() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5)
        await here.until_served()
        expected = {"invalid_request": 400, "overloaded": 503, "internal": 500}
        for index, (code, status) in enumerate(expected.items()):
            asked = asyncio.create_task(post(here, "/v1/chat/completions", CHAT))
            (await worker.next(index)).send(error=(code, "secret detail"))
            got, answer, headers = await asked
            assert got == status
            assert "secret" not in json.dumps(answer)
            assert ("Retry-After" in headers) == (status == 503)
        await here.assert_nothing_left()


async def test_direct_routing_by_header_and_by_nvext() -> None:
    async with frontend() as here:
        first = await here.add_worker(5, echo="a")
        second = await here.add_worker(6, echo="b")
        await here.until_served()
        await eventually(lambda: len(here.process.router.candidates(MODEL).ranks) == 2)
        by_header = {"x-worker-instance-id": "6"}
        _, answer, _ = await post(here, "/v1/chat/completions", CHAT, headers=by_header)
        assert answer["choices"][0]["message"]["content"] == "b"
        nvext = {"backend_instance_id": 5, "extra_fields": ["worker_id"]}
        _, answer, _ = await post(here, "/v1/chat/completions", {**CHAT, "nvext": nvext})
        assert answer["choices"][0]["message"]["content"] == "a"
        assert answer["nvext"]["worker_id"]["decode_worker_id"] == 5
        for bad in ("7", "x", ""):
            headers = {"x-worker-instance-id": bad}
            status, answer, _ = await post(here, "/v1/chat/completions", CHAT, headers=headers)
            assert status == 400 and answer["error"]["type"] == "invalid_request_error"
        assert (len(first.streams), len(second.streams)) == (1, 1)
        await here.assert_nothing_left()


async def test_models_health_and_live_tell_the_truth_before_and_after() -> None:
    async with frontend() as here:
        assert (await get(here, "/v1/models"))[1]["data"] == []
        status, health = await get(here, "/health")
        assert (status, health["status"], health["instances"]) == (200, "healthy", [])
        status, answer, _ = await post(here, "/v1/chat/completions", CHAT)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        await here.add_worker(2**64 - 1, echo="x")
        await here.until_served()
        status, models = await get(here, "/v1/models")
        assert [m["id"] for m in models["data"]] == [MODEL]
        status, health = await get(here, "/health")
        assert [i["instance_id"] for i in health["instances"]] == [2**64 - 1]
        assert (await get(here, "/live"))[0] == 200
        here.discovery.expire(2**64 - 1)
        await eventually(lambda: not here.process.router.has_workers(MODEL))
        await here.settle()
        assert (await get(here, "/v1/models"))[1]["data"] == []
        removed = [e for e in await here.recorded() if isinstance(e, events.WorkerRemoved)]
        assert removed == [events.WorkerRemoved(2**64 - 1, "lease_expired")]


async def test_a_worker_that_differs_from_its_model_is_refused_in_full_view() -> None:
    async with frontend() as here:
        await here.add_worker(5, echo="x")
        await here.until_served()
        await here.add_worker(6, echo="y", model=card(block_size=32))

        refused: list[Any] = []

        async def look() -> None:
            refused[:] = (await get(here, "/health"))[1]["refused"]

        async with asyncio.timeout(5):
            while not refused:
                await look()
        assert refused[0]["instance_id"] == 6 and "block_size" in refused[0]["why"]
        assert (await get(here, "/v1/models"))[1]["data"]


async def test_a_running_stream_outlives_the_shutdown_only_as_long_as_promised() -> None:
    """What finishes in time is whole; what does not ends with an error frame and [DONE]."""
    async with frontend(http_graceful_shutdown_timeout_secs=0.3) as here:
        worker = await here.add_worker(5)
        await here.until_served()
        async with aiohttp.ClientSession() as session:
            url, body = here.url + "/v1/chat/completions", {**CHAT, "stream": True}
            responses = []
            for index in range(2):
                asked = asyncio.create_task(session.post(url, json=body))
                (await worker.next(index)).send("begun")
                responses.append(await asked)
            here.stop.set()
            refused = await session.post(url, json=body)
            assert refused.status == 503 and refused.headers["Retry-After"]
            assert (await session.get(here.url + "/live")).status == 503
            worker.streams[0].send(" ended", finish="stop")
            whole, cut = [frames(await r.text()) for r in responses]
        assert whole[-1]["choices"][0]["finish_reason"] == "stop"
        assert cut[-1]["error"]["code"] == "shutting_down"
        await eventually(lambda: worker.streams[1].cancelled)


async def test_a_request_leaves_memory_when_it_ends() -> None:
    """By reference counts alone: a long prompt must not wait for the cycle collector."""

    def generations() -> int:
        return sum(type(each) is Generation for each in gc.get_objects())

    async with frontend() as here:
        await here.add_worker(1, echo="fine")
        await here.until_served()
        gc.collect()
        before = generations()
        gc.disable()
        try:
            for stream in (False, True):
                for _ in range(3):
                    body = {"model": MODEL, "prompt": "hello", "stream": stream}
                    async with (
                        aiohttp.ClientSession() as session,
                        session.post(here.url + "/v1/completions", json=body) as response,
                    ):
                        await response.read()
            await here.assert_nothing_left()
            await eventually(lambda: generations() == before)
        finally:
            gc.enable()
