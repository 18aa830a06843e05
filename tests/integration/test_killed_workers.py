"""Worker processes that are killed while they serve, and what their clients get all the same."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from eventstore import events
from tests.integration.processes import MODEL, Child, Deployment, deployment
from tests.waiting import eventually

TOKENS = 30
SLOW = ("--speedup-ratio", "0.2")
"""About 30 ms a token."""


async def chunks(url: str, prompt: str, **headers: str) -> AsyncIterator[dict[str, Any]]:
    """The frames of a streamed answer."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "nvext": {"extra_fields": ["worker_id"]},
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body, headers=headers) as response,
    ):
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


async def answer(url: str, prompt: str, **headers: str) -> tuple[list[str], dict[str, Any]]:
    """The text, piece by piece, and the last frame."""
    return parts([frame async for frame in chunks(url, prompt, **headers)])


def parts(frames: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    return [choice["text"] for frame in frames for choice in frame["choices"]], frames[-1]


def id_of(worker: Child) -> int:
    """As its ready line has it."""
    return int(worker.ready.split()[1].removeprefix("worker="), 16)


async def booked_on(here: Deployment, role: str) -> Child:
    """The worker with this role that a request is booked on, once one is."""

    def booked() -> list[Child]:
        state = here.observer.state
        return [
            worker
            for worker in here.workers
            if worker.running
            and (known := state.workers.get(id_of(worker))) is not None
            and known.worker_type == role
            and any(
                state.active.requests[state.tree.slot_of(r)] for r in state.ranks_of(id_of(worker))
            )
        ]

    await eventually(lambda: len(booked()) == 1)
    return booked()[0]


async def kill(worker: Child) -> None:
    worker.signal(signal.SIGKILL)
    await worker.process.wait()


async def test_killed_in_the_middle_of_a_stream_and_before_its_first_token(
    nats_url: str, namespace: str
) -> None:
    async with deployment(nats_url, namespace) as here:
        frontend, *_ = await asyncio.gather(
            here.add_frontend("--migration-limit", "1"), *(here.add_worker(*SLOW) for _ in range(3))
        )
        await here.until_serving(3)
        whole, end = await answer(frontend.url, "a prompt of some words " * 40)
        usage = end["usage"]

        frames: list[dict[str, Any]] = []
        async for frame in chunks(frontend.url, "a prompt of some words " * 40):
            frames.append(frame)
            if len(frames) == 7:
                await kill(await booked_on(here, "aggregated"))
        text, end = parts(frames)
        assert "".join(text) == "".join(whole)
        assert (end["usage"]["prompt_tokens"], end["usage"]["completion_tokens"]) == (
            usage["prompt_tokens"],
            TOKENS,
        )
        served_by = [end["nvext"]["worker_id"]["decode_worker_id"]]

        await eventually(lambda: not here.observer.state.requests)
        # Half a second of prefill.
        asked = asyncio.create_task(answer(frontend.url, "another prompt, which is long " * 800))
        await kill(await booked_on(here, "aggregated"))
        text, end = await asked
        served_by.append(end["nvext"]["worker_id"]["decode_worker_id"])
        again, _ = await answer(frontend.url, "another prompt, which is long " * 800)
        assert "".join(text) == "".join(again)

        await here.until_quiet()
        recorded = await here.recorded()
        moved = [event for event in recorded if isinstance(event, events.RequestMigrated)]
        assert [each.cause for each in moved] == ["worker_lost"] * 2
        assert 5 <= moved[0].osl < TOKENS and moved[1].osl == 0
        for each, finisher in zip(moved, served_by, strict=True):
            one, other = (
                event
                for event in recorded
                if isinstance(event, events.RequestRouted) and event.request_id == each.request_id
            )
            assert (one.attempt, other.attempt) == (0, 1)
            assert other.isl == one.isl + each.osl
            assert other.worker_id == finisher != one.worker_id
        assert await here.audit() == []


async def test_a_prefill_worker_killed_while_it_computes(nats_url: str, namespace: str) -> None:
    prompt = "one prompt, which is long " * 800
    async with deployment(nats_url, namespace) as here:
        frontend, *_ = await asyncio.gather(
            here.add_frontend("--decode-fallback"),
            here.add_worker("--role", "prefill", "--bootstrap", "--speedup-ratio", "0.1"),
            here.add_worker("--role", "decode"),
        )
        await here.until_serving(2)
        asked = asyncio.create_task(answer(frontend.url, prompt))
        await kill(await booked_on(here, "prefill"))
        text, end = await asked
        chosen = end["nvext"]["worker_id"]
        assert chosen["decode_worker_id"] == chosen["prefill_worker_id"]
        again, _ = await answer(frontend.url, prompt)
        assert "".join(text) == "".join(again)
        await here.until_quiet()
        recorded = await here.recorded()
        (hop,) = (event for event in recorded if isinstance(event, events.PrefillHopEnded))
        assert hop.cause in ("worker_lost", "prefill_failed")
        assert await here.audit() == []
