"""Mock workers in the test's own process, behind real sockets, for a frontend of `harness`."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from eventstore import events
from tests.integration.harness import FILES, MODEL, Harness, card
from workers.card import Instance
from workers.engine import EngineConfig, MockEngine
from workers.model_facts import ModelFacts
from workers.service import MockWorker

_ids = itertools.count(1001)

ENGINE = EngineConfig(
    block_size=16,
    num_gpu_blocks=1000,
    context_length=4096,
    speedup=200,
    output_token_ids=ModelFacts.read(FILES).text_token_ids,
)
"""Equal in all workers, and so is their seed: what one says of a prompt all say."""


class RunningWorker(NamedTuple):
    worker_id: int
    engine: MockEngine


@asynccontextmanager
async def mock_worker(
    here: Harness,
    role: str = "aggregated",
    *,
    bootstrap: bool = False,
    engine: EngineConfig = ENGINE,
) -> AsyncIterator[RunningWorker]:
    """A worker from its registration to its orderly end."""
    mock = MockEngine(engine, seed=7, worker_id=0)
    instance = Instance(
        worker_id=0,
        namespace="test",
        component="backend",
        endpoint="generate",
        address="",
        card=card(
            worker_type=role,
            total_kv_blocks=engine.num_gpu_blocks,
            max_num_batched_tokens=engine.max_num_batched_tokens,
        ),
    )
    worker = MockWorker(
        instance,
        [mock],
        here.log,
        here.discovery,
        new_id=lambda: next(_ids),
        drain_s=1.0,
        bootstrap_port=0 if bootstrap else None,
        bootstrap_wait_s=5.0,
    )
    ready: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run("127.0.0.1", 0, "127.0.0.1", ready.set_result))
        try:
            yield RunningWorker((await ready).worker_id, mock)
        finally:
            worker.stop()


class Answer(NamedTuple):
    """What a client got."""

    status: int
    body: dict[str, Any]
    """The JSON; of a stream the last chunk's, and its error if it has one."""
    text: str

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["error"]
        return found

    @property
    def workers(self) -> dict[str, int]:
        """`nvext.worker_id`."""
        found: dict[str, int] = self.body["nvext"]["worker_id"]
        return found

    @property
    def usage(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["usage"]
        return found


async def complete(
    here: Harness | str,
    prompt: str | list[int],
    *,
    model: str = MODEL,
    headers: dict[str, str] | None = None,
    nvext: dict[str, Any] | None = None,
    **fields: Any,
) -> Answer:
    """Ask /v1/completions, in a stream if `stream` is set, for all that nvext tells."""
    url = here if isinstance(here, str) else here.url
    body = {
        "model": model,
        "prompt": prompt,
        "nvext": {"extra_fields": ["worker_id", "predicted_cached_tokens"], **(nvext or {})},
        **({"stream_options": {"include_usage": True}} if fields.get("stream") else {}),
        **fields,
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body, headers=headers) as response,
    ):
        if response.content_type == "application/json":
            answer = await response.json()
            whole = answer["choices"][0]["text"] if "choices" in answer else ""
            return Answer(response.status, answer, whole)
        frames = [frame for frame in (await response.text()).split("\n\n") if frame]
    assert frames[-1] == "data: [DONE]"
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    text = "".join(
        choice["text"] for chunk in chunks if "choices" in chunk for choice in chunk["choices"]
    )
    return Answer(response.status, chunks[-1], text)


async def health(here: Harness) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(here.url + "/health") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def metric(here: Harness, line: str) -> float:
    """The value of a series of /metrics, 0 if there is none."""
    async with aiohttp.ClientSession() as session, session.get(here.url + "/metrics") as response:
        for shown in (await response.text()).splitlines():
            if shown.startswith(line + " "):
                return float(shown.rpartition(" ")[2])
    return 0.0


async def of_type(here: Harness, *kinds: type[events.Event]) -> list[Any]:
    """The events of these types in the log, in order, once all there are have been written."""
    await here.settle()
    return [event for event in await here.recorded() if isinstance(event, kinds)]


async def moves(here: Harness) -> list[tuple[str, str]]:
    """Which workers were left, in order: ("hop", cause) or ("decode", cause)."""
    found = await of_type(here, events.PrefillHopEnded, events.RequestMigrated)
    is_hop = events.PrefillHopEnded
    return [("hop" if isinstance(each, is_hop) else "decode", each.cause) for each in found]


MIGRATIONS = 'dynamo_frontend_model_migration_total{migration_type="%s",model="tiny"}'
