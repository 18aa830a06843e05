"""How long a request may take: to its first token, from token to token, and in all."""

import asyncio
import json
from typing import Any

import pytest

from eventstore.events import (
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestQueued,
    WorkerSetAside,
)
from tests.integration.asking import Client, client, facts, got
from tests.integration.harness import frontend
from tests.waiting import eventually

LIMIT_S = 0.15
FIRST: dict[str, Any] = {"request_first_token_timeout_secs": LIMIT_S}
BETWEEN: dict[str, Any] = {"request_inter_token_timeout_secs": LIMIT_S}
TOTAL: dict[str, Any] = {"request_timeout_secs": LIMIT_S}


def events_of(body: str) -> list[Any]:
    """The data of a stream's events; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


async def counted(asking: Client, kind: str) -> float:
    return await asking.metric("reckon_deadlines_exceeded_total", kind=kind)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "kind"), [(FIRST, "first_token"), (TOTAL, "total")], ids=["first", "total"]
)
async def test_before_the_first_byte_it_is_a_504(
    settings: dict[str, Any], kind: str, stream: bool
) -> None:
    """The worker is told to stop, the end is in the log, and it is counted."""
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asked = asking.ask(stream=stream)
        held = await got(worker, asked)
        answer = await asked.answer()
        assert (answer.status, answer.code) == (504, f"{kind}_timeout")
        assert f"{LIMIT_S:g} s" in answer.message
        await eventually(lambda: held.cancelled)
        await here.assert_nothing_left()
        (failed,) = await facts(here, RequestFailed)
        assert (failed.osl, failed.code) == (0, f"{kind}_timeout")
        assert await counted(asking, kind) == 1
        labels = {"status": "error", "error_type": "timeout"}
        assert await asking.metric("dynamo_frontend_requests_total", **labels) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "kind"), [(BETWEEN, "inter_token"), (TOTAL, "total")], ids=["between", "total"]
)
async def test_after_it_it_is_an_event_of_the_stream(
    settings: dict[str, Any], kind: str, stream: bool
) -> None:
    """Who asked for one body gets a status all the same: no byte of it has been sent."""
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asked = asking.ask(stream=stream)
        held = await got(worker, asked)
        held.send("some words", cached=0)
        answer = await asked.answer()
        if stream:
            begun, *_, last = events_of(answer.body)
            assert answer.status == 200
            assert begun["choices"][0]["text"] == "some words"
            assert last["error"]["code"] == f"{kind}_timeout"
        else:
            assert (answer.status, answer.code) == (504, f"{kind}_timeout")
        await eventually(lambda: held.cancelled)
        await here.assert_nothing_left()
        (failed,) = await facts(here, RequestFailed)
        assert failed.osl > 0
        assert failed.code == f"{kind}_timeout"
        assert await counted(asking, kind) == 1


async def test_who_is_in_time_is_left_alone() -> None:
    """The limit counts from the last token, not from the first."""
    limit_s = 3 * LIMIT_S
    settings: dict[str, Any] = {**FIRST, "request_inter_token_timeout_secs": limit_s}
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asked = asking.ask(stream=True)
        held = await got(worker, asked)
        for _ in range(6):
            held.send("word ", cached=0)
            await asyncio.sleep(limit_s / 5)  # time itself is what is tested
        held.send(finish="stop")
        *_, last = events_of((await asked.answer()).body)
        assert last["choices"][0]["finish_reason"] == "stop"
        await here.assert_nothing_left()
        assert len(await facts(here, RequestCompleted)) == 1


@pytest.mark.parametrize("settings", [FIRST, TOTAL], ids=["first", "total"])
async def test_waiting_in_the_queue_counts(settings: dict[str, Any]) -> None:
    """A deadline holds however little the queue minds. Another frontend keeps the worker busy."""
    async with (
        frontend() as other,
        frontend(beside=other, router_queue_threshold=0.0, **settings) as here,
        client(other) as asking_other,
        client(here) as asking,
    ):
        worker = await other.add_worker(5)
        await other.until_served()
        await here.until_served()
        held = await got(worker, asking_other.ask())
        await eventually(lambda: any(here.process.replica.state.active.prefill_tokens))
        answer = await asking.ask().answer()
        assert (answer.status, answer.body["error"]["type"]) == (504, "timeout_error")
        assert [each.depth for each in await facts(here, RequestQueued)] == [0]
        held.send(finish="stop")
        await other.assert_nothing_left()
        await here.assert_nothing_left()
        assert len(worker.streams) == 1


@pytest.mark.parametrize("begun", [False, True])
async def test_a_late_worker_is_left_for_another(begun: bool) -> None:
    """With --migration-limit, and without the client's noticing; but not for the total."""
    async with (
        frontend(migration_limit=1, router_mode="round-robin", **FIRST, **BETWEEN) as here,
        client(here) as asking,
    ):
        late, other = await here.add_worker(5), await here.add_worker(6, echo=" and more")
        await here.until_served(aggregated=2)
        asked = asking.ask()
        held = await got(late, asked)
        if begun:
            held.send("begun", cached=0)
        answer = await asked.answer()
        assert answer.status == 200
        assert answer.body["choices"][0]["text"] == ("begun and more" if begun else " and more")
        await eventually(lambda: held.cancelled)
        await here.assert_nothing_left()
        kind = "inter_token" if begun else "first_token"
        (migrated,) = await facts(here, RequestMigrated)
        assert migrated.cause == f"{kind}_timeout"
        assert await counted(asking, kind) == 1
        assert len(other.streams) == 1


async def test_lateness_is_the_workers_failure_but_not_that_of_the_total() -> None:
    for settings, aside in ((FIRST, 1), (TOTAL, 0)):
        async with frontend(**settings) as here, client(here) as asking:
            await here.add_worker(5)
            await here.until_served()
            asked = [asking.ask() for _ in range(5)]
            assert [(await each.answer()).status for each in asked] == [504] * 5
            assert len(await facts(here, WorkerSetAside)) == aside
