"""Asking a frontend for where requests go, and telling its log what workers would."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp
from msgspec import Struct

from eventstore import codec, events
from eventstore.subjects import subject
from indexer.blocks import prompt_hashes
from tests.integration.harness import MODEL, Harness, ScriptedWorker
from tests.waiting import eventually

BLOCK_SIZE = 16
_numbers = count()


def prompt(first: int, blocks: int) -> list[int]:
    """Token ids of so many complete blocks. first: tells prompts apart."""
    return [first] * BLOCK_SIZE * blocks


class Answer(Struct, frozen=True):
    """What a client saw of where its request went; None: it was not said."""

    status: int
    worker_id: int | None
    dp_rank: int | None
    predicted_tokens: int | None
    code: str | None
    headers: dict[str, str]


async def ask(
    here: Harness,
    token_ids: list[int],
    *,
    headers: dict[str, str] | None = None,
    **nvext: Any,
) -> Answer:
    """One request, to its end. With annotations=["query_instance_id:"] it is only asked about."""
    body = {
        "model": MODEL,
        "prompt": token_ids,
        "nvext": {"extra_fields": ["worker_id", "predicted_cached_tokens"], **nvext},
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(here.url + "/v1/completions", json=body, headers=headers) as response,
    ):
        answer = await response.json()
        told = answer.get("nvext", {})
        worker = told.get("worker_id", {})
        return Answer(
            response.status,
            worker.get("decode_worker_id"),
            worker.get("decode_dp_rank"),
            told.get("predicted_cached_tokens"),
            answer.get("error", {}).get("code"),
            dict(response.headers),
        )


async def where(
    here: Harness, token_ids: list[int], times: int = 1, **more: Any
) -> set[int | None]:
    """The workers that so many requests would go to, each as things stand now."""
    asked = [
        await ask(here, token_ids, annotations=["query_instance_id:"], **more) for _ in range(times)
    ]
    assert {answer.status for answer in asked} == {200}
    return {answer.worker_id for answer in asked}


async def write(here: Harness, *written: events.AnyEvent) -> None:
    """Append facts that no process of the test writes, and wait until they are folded."""
    producer = f"test.{next(_numbers)}"
    data = codec.encode(producer, 1, 0, list(written))
    await here.log.append(subject("test", producer), data, msg_id=producer)
    await here.settle()


async def announce(here: Harness, worker: ScriptedWorker, token_ids: list[int]) -> None:
    """The worker says that it caches the prompt."""
    hashes = prompt_hashes(token_ids, BLOCK_SIZE)
    await write(here, events.BlockStored(worker.worker_id, 0, None, hashes))


async def routed(here: Harness) -> list[events.RequestRouted]:
    """Every decision in the log."""
    await here.settle()
    return [each for each in await here.recorded() if isinstance(each, events.RequestRouted)]


@asynccontextmanager
async def running(
    here: Harness,
    worker: ScriptedWorker,
    token_ids: list[int],
    *,
    output_tokens: int = 1,
    **nvext: Any,
) -> AsyncIterator[None]:
    """A request that runs on the worker, with so many tokens of output so far; 0: its prompt is
    being computed."""
    index = len(worker.streams)
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(
            ask(here, token_ids, backend_instance_id=worker.worker_id, **nvext)
        )
        stream = await worker.next(index)
        if output_tokens:
            stream.send(ids=[100] * output_tokens)
            await eventually(lambda: not any(here.process.router.load().prefill_tokens))
        await here.settle()
        yield
        stream.send(finish="stop")
        assert (await asked).status == 200
