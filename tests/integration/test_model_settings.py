"""--model-name, --model-path, --kv-cache-block-size, and workers that don't fit, over HTTP."""

import asyncio
import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer as Trained
from tokenizers import models as kinds
from tokenizers import pre_tokenizers

from eventstore import events
from frontend.tokenizer import Tokenizer
from indexer.blocks import prompt_hashes
from tests.integration.harness import (
    FILES,
    MODEL,
    NAMESPACE,
    TOKENIZER,
    Harness,
    card,
    frontend,
)
from tests.integration.mem_backings import MemBackings
from tests.waiting import eventually
from workers.card import Instance
from workers.engine import EngineConfig, MockEngine
from workers.service import MockWorker

PROMPT = "one two three four five six seven eight nine ten eleven twelve"
WORDS = {word: number for number, word in enumerate(["?", *PROMPT.split()])}


def other_files() -> dict[str, bytes]:
    """A tokenizer with a token for each word of PROMPT, and no chat template."""
    trained = Trained(kinds.WordLevel(WORDS, unk_token="?"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"tokenizer.json": trained.to_str().encode(), "tokenizer_config.json": b"{}"}


def named(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


OTHER = other_files()
OTHER_TOKENIZER = Tokenizer.from_files(OTHER)


def backings_of(*models: Mapping[str, bytes]) -> MemBackings:
    """One namespace, with the files of these models."""
    stored = {digest: files[name] for files in models for name, digest in named(files).items()}

    async def from_store(wanted: Mapping[str, str]) -> Mapping[str, bytes]:
        return {name: stored[digest] for name, digest in wanted.items()}

    made = MemBackings(from_store)
    made.add(NAMESPACE)
    return made


async def complete(here: Harness, model: str) -> tuple[int, Any]:
    body = {"model": model, "prompt": PROMPT}
    async with (
        aiohttp.ClientSession() as session,
        session.post(here.url + "/v1/completions", json=body) as response,
    ):
        return response.status, await response.json()


async def get(here: Harness, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(here.url + path) as response:
        return await response.json()


async def models(here: Harness) -> list[str]:
    return [model["id"] for model in (await get(here, "/v1/models"))["data"]]


async def refused(here: Harness) -> dict[int, str]:
    health = await get(here, "/health")
    return {each["instance_id"]: each["why"] for each in health["refused"]}


async def hashes(here: Harness) -> list[list[int]]:
    """Of each request's prompt, as it was routed."""
    await here.settle()
    recorded = await here.recorded()
    return [each.sequence_hashes for each in recorded if isinstance(each, events.RequestRouted)]


# --- --model-name ---------------------------------------------------------------------------------


async def test_clients_call_the_model_as_the_option_says_and_workers_as_they_do() -> None:
    async with frontend(model_name="alias") as here:
        worker = await here.add_worker(5, echo="x")
        await here.until_served("alias")
        assert await models(here) == ["alias"]
        status, answer = await complete(here, "alias")
        assert (status, answer["model"]) == (200, "alias")
        assert worker.streams[0].request.model == MODEL
        assert (await complete(here, MODEL))[0] == 404
        await here.assert_nothing_left()


async def test_under_one_name_there_is_one_model() -> None:
    """The second is refused for as long as the first is served, and told so; then it is served."""
    async with frontend(model_name="alias") as here:
        await here.add_worker(5, echo="of the first")
        await here.until_served("alias")
        second = await here.add_worker(6, echo="of the second", model=card(name="second"))
        await eventually(lambda: second.refusals != [])
        why = "it serves second, and --model-name is for one model, which is tiny"
        assert await refused(here) == {6: why}
        assert {refusal.why for refusal in second.refusals} == {why}
        for _ in range(4):
            assert (await complete(here, "alias"))[1]["choices"][0]["text"] == "of the first"
        here.discovery.expire(5)
        await eventually(
            lambda: [i.worker_id for i in here.process.service.models.instances()] == [6]
        )
        await here.until_served("alias")
        assert (await complete(here, "alias"))[1]["choices"][0]["text"] == "of the second"
        assert await refused(here) == {}


# --- --model-path ---------------------------------------------------------------------------------


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


async def test_tokenizer_and_template_are_those_of_the_folder(tmp_path: Path) -> None:
    files = {**OTHER, "chat_template.jinja": b"one two {{ messages[0].content }} ten"}
    # The worker's own files are not to be had: nobody asks for them.
    async with frontend(model_path=folder(tmp_path, files), backings=backings_of()) as here:
        worker = await here.add_worker(5, echo="")
        await here.until_served()
        assert (await complete(here, MODEL))[0] == 200
        assert worker.streams[0].request.token_ids == list(range(1, 13))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "seven"}]}
        async with aiohttp.ClientSession() as session:
            await (await session.post(here.url + "/v1/chat/completions", json=body)).read()
        assert worker.streams[1].request.token_ids == [
            WORDS[w] for w in ("one", "two", "seven", "ten")
        ]
        # A worker that brings other files would be refused without the option.
        await here.add_worker(6, echo="", model=card(files={"tokenizer.json": "0"}))
        await here.until_served(aggregated=2)
        second = await here.add_worker(7, model=card(name="second"))
        await eventually(lambda: second.refusals != [])
        assert "--model-path is for one model" in (await refused(here))[7]
        await here.assert_nothing_left()


async def test_a_folder_without_the_files_ends_the_start(tmp_path: Path, nats_url: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for path, code, said in (
        (tmp_path, 1, f"Error: --model-path {tmp_path}: tokenizer.json: is missing"),
        (tmp_path / "no", 2, f"Error: --model-path: {tmp_path / 'no'} is not a folder"),
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "frontend"),
            *("--nats-url", nats_url, "--http-port", "0", "--model-path", str(path)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await process.communicate()
        assert (process.returncode, stderr.decode().splitlines()[-1]) == (code, said)


# --- --kv-cache-block-size ------------------------------------------------------------------------


async def test_workers_of_another_block_size_are_refused_even_if_they_come_first() -> None:
    async with frontend(kv_cache_block_size=4) as here:
        wrong = await here.add_worker(5, echo="wrong")
        await eventually(lambda: wrong.refusals != [])
        assert wrong.refusals[0].why == "its block_size is 16, --kv-cache-block-size 4"
        assert (await complete(here, MODEL))[0] == 404, "nobody serves it"
        await here.add_worker(6, echo="right", model=card(block_size=4))
        await here.until_served()
        for _ in range(3):
            assert (await complete(here, MODEL))[1]["choices"][0]["text"] == "right"
        ids = TOKENIZER.encode(PROMPT, add_special_tokens=True)
        assert await hashes(here) == [prompt_hashes(ids, 4)] * 3
        assert wrong.streams == []


# --- models side by side --------------------------------------------------------------------------


async def test_two_models_with_tokenizers_and_block_sizes_of_their_own() -> None:
    async with frontend(backings=backings_of(FILES, OTHER)) as here:
        first = await here.add_worker(5, echo="")
        words = card(name="words", block_size=4, files=named(OTHER), eos_token_ids=[0])
        second = await here.add_worker(6, echo="", model=words)
        await here.until_served()
        await here.until_served("words")
        assert await models(here) == [MODEL, "words"] and await refused(here) == {}
        for model in (MODEL, "words", MODEL):
            status, answer = await complete(here, model)
            assert (status, answer["model"]) == (200, model)
        ids = TOKENIZER.encode(PROMPT, add_special_tokens=True)
        assert [s.request.token_ids for s in first.streams] == [ids, ids]
        assert [s.request.token_ids for s in second.streams] == [list(range(1, 13))]
        long = prompt_hashes(ids, 16)
        assert await hashes(here) == [long, prompt_hashes(list(range(1, 13)), 4), long]
        for series in (f'{{model="{MODEL}"}} 16.0', '{model="words"} 4.0'):
            async with aiohttp.ClientSession() as session:
                shown = await (await session.get(here.url + "/metrics")).text()
            assert f"dynamo_frontend_model_kv_cache_block_size{series}" in shown
        await here.assert_nothing_left()


@pytest.mark.parametrize(
    ("different", "why"),
    [
        ({"block_size": 32}, "its block_size is 32, tiny is served with 16"),
        (
            {"files": named(OTHER)},
            "its model files differ from those tiny is served with",
        ),
    ],
    ids=["block size", "tokenizer"],
)
async def test_a_worker_that_differs_is_told_on_every_connection(
    different: dict[str, Any], why: str
) -> None:
    async with frontend() as here:
        await here.add_worker(5, echo="x")
        await here.until_served()
        other = await here.add_worker(6, echo="y", model=card(**different))
        await eventually(lambda: len(other.refusals) == 1)
        (said,) = other.refusals
        assert (said.worker_id, said.why) == (6, why)
        assert await refused(here) == {6: why}
        for connection in other.server.connections:
            connection.abort()
        await eventually(lambda: len(other.refusals) == 2)
        assert other.refusals == [said, said]
        assert other.streams == []


async def test_a_mock_worker_logs_its_refusal_once_a_frontend(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = EngineConfig(block_size=32, num_gpu_blocks=100, context_length=4096)
    instance = Instance(
        worker_id=0,
        namespace=NAMESPACE,
        component="backend",
        endpoint="generate",
        address="",
        card=card(block_size=32),
    )

    def logged() -> list[str]:
        return [r.getMessage() for r in caplog.records if "no requests from" in r.getMessage()]

    why = "its block_size is 32, tiny is served with 16"
    async with frontend() as here, frontend(beside=here) as beside:
        await here.add_worker(5, echo="x")
        await here.until_served()
        await beside.until_served()
        engine = MockEngine(config, seed=1, worker_id=0)
        mock = MockWorker(
            instance, [engine], here.log, here.discovery, new_id=lambda: 9, drain_s=0.1
        )
        ready: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(mock.run("127.0.0.1", 0, "127.0.0.1", ready.set_result))
            with caplog.at_level(logging.ERROR, "workers.service"):
                await eventually(lambda: len(logged()) == 2)
                for space in (here.process, beside.process):
                    client = space.service.clients.get(9)
                    assert client is not None
                    client.refuse(0x5EED, why)
                    client.refuse(0x5EED, why)
                await eventually(lambda: len(logged()) == 3)
            mock.stop()
    assert all(line.endswith(f"why={why}") for line in logged())
    assert f"no requests from frontend 0000000000005eed why={why}" in logged()
