"""Frontends and workers as processes over one NATS server, and an observer that folds their log."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp

from eventstore import codec, events
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.log import Record
from router.replica import Replica
from tests.integration.log_audit import Answer, Ended, View, audit
from tests.waiting import eventually

START_S = 30.0
ANSWER_S = 60.0
"""Longer than any fault here lasts; who has no answer by then gets none."""
MODEL = "reckon-mock"


class Child:
    def __init__(self, process: Process, ready: str) -> None:
        self.process = process
        self.ready = ready

    @property
    def name(self) -> str:
        return f"process {self.process.pid}"

    @property
    def url(self) -> str:
        return self.ready.split()[1]

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


@asynccontextmanager
async def child(module: str, *options: str) -> AsyncIterator[Child]:
    """A process, from its ready line on; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *module.split(), *options),
        stdout=PIPE,
        stderr=None if os.environ.get("SHOW_PROCESS_LOGS") else DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("ready "), line
        yield Child(process, line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Deployment:
    """`observer` is a replica of the test's own."""

    def __init__(self, nats_url: str, namespace: str, log: JetStreamLog) -> None:
        self.nats_url = nats_url
        self.namespace = namespace
        self.log = log
        self.observer = Replica(log, time.time_ns)
        self.frontends: list[Child] = []
        self.workers: list[Child] = []
        self._stack = AsyncExitStack()

    def _common(self) -> tuple[str, ...]:
        return ("--nats-url", self.nats_url, "--namespace", self.namespace)

    async def add_frontend(self, *options: str) -> Child:
        fixed = ("--http-host", "127.0.0.1", "--http-port", "0", "--router-mode", "kv")
        made = await self._stack.enter_async_context(
            child("frontend", *fixed, "--router-replica-sync", *self._common(), *options)
        )
        self.frontends.append(made)
        return made

    async def add_worker(self, *options: str) -> Child:
        made = await self._stack.enter_async_context(
            child("workers mock", *self._common(), *options)
        )
        self.workers.append(made)
        return made

    async def until_serving(self, workers: int) -> None:
        """Every running frontend can choose that many workers."""
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_S):
            for frontend in self.frontends:
                while frontend.running:
                    async with session.get(frontend.url + "/health") as response:
                        if len((await response.json())["instances"]) == workers:
                            break
                    await asyncio.sleep(0.05)

    async def health(self, frontend: Child) -> dict[str, object]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(frontend.url + "/health") as response,
        ):
            answer: dict[str, object] = await response.json()
            return answer

    async def until_quiet(self, within_s: float = 30.0) -> None:
        """The observer is at the head, and believes in no request."""
        state = self.observer.state

        def quiet() -> bool:
            return not self.observer.state.requests and not self.observer.state.unbased

        await eventually(quiet, within_s)
        head = (await self.log.extent()).last_seq
        await eventually(lambda: self.observer.state.cursor >= head, within_s)
        state = self.observer.state
        state.check()
        assert not any(state.active.blocks) and not any(state.active.prefill_tokens)

    async def recorded(self) -> list[events.AnyEvent]:
        found: list[events.AnyEvent] = []
        for record in await self.records():
            batch = codec.decode(record.data).batch
            found += [] if batch is None else batch.events
        return found

    async def records(self) -> list[Record]:
        """The whole log. Whoever leads it may still be elected."""
        async with asyncio.timeout(START_S):
            while True:
                try:
                    return [record async for record in self.log.read(1)]
                except LogUnavailable:
                    await asyncio.sleep(0.2)

    async def views(self) -> list[View]:
        """Of the observer and every running frontend; none while one of them holds facts that it
        has not written."""
        state = self.observer.state
        found = [View("observer", state.cursor, state.digest())]
        for frontend in self.frontends:
            if frontend.running:
                health = await self.health(frontend)
                log, replica = health["log"], health["replica"]
                assert isinstance(log, dict) and isinstance(replica, dict)
                if log["buffered_events"]:
                    return []
                found.append(View(frontend.name, replica["cursor"], replica["digest"]))
        return found

    async def settled(self, within_s: float = 30.0) -> tuple[list[Record], list[View]]:
        """The whole log and everybody's views of it, once they all are at its end."""
        records: list[Record] = []
        views: list[View] = []

        async def at_the_head() -> bool:
            views[:] = await self.views()
            records[:] = await self.records() if views else []
            return bool(records) and all(view.cursor == records[-1].seq for view in views)

        await eventually(at_the_head, within_s)
        return records, views

    async def audit(self, answers: Iterable[Answer] = ()) -> list[str]:
        """What is wrong with the log (see `log_audit`). answers: all that its clients saw."""
        records, views = await self.settled()
        return audit(records, answers, views)


@asynccontextmanager
async def deployment(nats_url: str, namespace: str) -> AsyncIterator[Deployment]:
    nats = await Nats.connect(nats_url.split(","), name="observer", wait_s=START_S)
    log = await JetStreamLog.open(nats, namespace, wait_s=START_S)
    made = Deployment(nats_url, namespace, log)
    async with made._stack:
        observing = asyncio.create_task(made.observer.run())
        try:
            yield made
        finally:
            while not observing.done():
                observing.cancel()
                await asyncio.wait([observing], timeout=0.2)
            await log.close()
            await nats.close()


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int
) -> tuple[int, str]:
    """Status, and the whole answer as text; a connection that breaks gives status 0."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        async with session.post(url + "/v1/completions", json=body) as response:
            return response.status, await response.text()
    except aiohttp.ClientError:
        return 0, ""


async def ask(
    session: aiohttp.ClientSession,
    frontend: Child,
    prompt: str,
    mark: int,
    *,
    streaming: bool,
    patience_s: float | None = None,
) -> Answer:
    """One request of at most `mark` tokens, and what its client saw.

    patience_s: the client gives up after it; its answer would take all its tokens. None: it waits,
    and the engine ends the answer when it likes.
    """
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": mark,
        "ignore_eos": patience_s is not None,
        "stream": streaming,
    }
    status = 0
    try:
        async with asyncio.timeout(ANSWER_S if patience_s is None else patience_s):
            async with session.post(frontend.url + "/v1/completions", json=body) as response:
                status = response.status
                text = await response.text()
    except aiohttp.ClientError:
        return Answer(frontend.name, mark, status, Ended.BROKEN)
    except TimeoutError:
        ended = Ended.BROKEN if patience_s is None else Ended.ABORTED
        return Answer(frontend.name, mark, status, ended)
    frames = [line.removeprefix("data: ") for line in text.splitlines() if line]
    parts = [json.loads(frame) for frame in frames if frame.startswith("{")]
    request_id = next((part["id"].removeprefix("cmpl-") for part in parts if "id" in part), None)
    for part in parts:
        if "error" in part:
            code = part["error"]["code"]
            return Answer(frontend.name, mark, status, Ended.ERROR, code, request_id)
    is_whole = frames[-1:] == ["[DONE]"] if streaming else status == 200
    ended = Ended.WHOLE if is_whole else Ended.BROKEN
    return Answer(frontend.name, mark, status, ended, request_id=request_id)
