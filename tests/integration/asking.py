"""Asking a frontend of `harness` several things at once, and telling what became of each."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from eventstore.events import Event
from tests.integration.harness import MODEL, Harness, ScriptedWorker, Stream
from tests.waiting import eventually

COMPLETIONS = "/v1/completions"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def code(self) -> str:
        """`error.code`."""
        return str(self.body["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


class Asked:
    """One request on its way. Its prompt is `tokens` long, and like no other's."""

    def __init__(self, task: "asyncio.Task[Answer]", prompt: list[int]) -> None:
        self.task = task
        self.prompt = prompt

    async def answer(self, within_s: float = 10.0) -> Answer:
        """AssertionError if there is none within the deadline."""
        done, _ = await asyncio.wait([self.task], timeout=within_s)
        assert done, f"no answer in {within_s} s"
        return await self.task

    def leave(self) -> None:
        """The client goes away."""
        self.task.cancel()


class Client:
    """Requests to one frontend, each on a connection of its own."""

    def __init__(self, here: Harness, session: aiohttp.ClientSession) -> None:
        self._here = here
        self._session = session
        self._first_ids = itertools.count(1)
        self._tasks: list[asyncio.Task[Answer]] = []

    def ask(
        self,
        tokens: int = 32,
        *,
        prompt: list[int] | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> Asked:
        if prompt is None:
            prompt = [next(self._first_ids)] * tokens
        asked = {"model": MODEL, "prompt": prompt, **body}
        task = asyncio.create_task(self.post(COMPLETIONS, asked, headers))
        self._tasks.append(task)
        return Asked(task, prompt)

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """A stream's body is its text."""
        url = self._here.url + path
        async with self._session.post(url, json=body, headers=headers) as response:
            is_json = response.content_type == "application/json"
            content = await response.json() if is_json else await response.text()
            return Answer(response.status, response.headers, content)

    async def get(self, path: str) -> Any:
        async with self._session.get(self._here.url + path) as response:
            if response.content_type == "application/json":
                return await response.json()
            return await response.text()

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have all of these labels; 0 if there is none."""
        found = 0.0
        for line in (await self.get("/metrics")).splitlines():
            sample, _, value = line.rpartition(" ")
            of, _, rest = sample.partition("{")
            if of == name and all(f'{key}="{text}"' in rest for key, text in labels.items()):
                found += float(value)
        return found

    async def gone(self) -> None:
        """Until all that was asked has ended; what was left is not waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def client(here: Harness) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        made = Client(here, session)
        try:
            yield made
        finally:
            await made.gone()


async def parked(here: Harness, count: int) -> None:
    """Until so many requests wait in the frontend's queue."""
    await eventually(lambda: len(here.process.router.parking) == count)


async def got(worker: ScriptedWorker, asked: Asked) -> Stream:
    """The request as it reached the worker."""

    def found() -> list[Stream]:
        return [each for each in worker.streams if each.request.token_ids == asked.prompt]

    await eventually(lambda: bool(found()))
    return found()[-1]


async def facts(here: Harness, *kinds: type[Event]) -> list[Any]:
    """What has been recorded of these kinds, once all is written."""
    await here.settle()
    return [event for event in await here.recorded() if isinstance(event, kinds)]
