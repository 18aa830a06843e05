"""A worker that fails again and again is set aside for a while, in full view, and tried again."""

from typing import Any

import pytest

from eventstore.events import RequestCancelled, RequestRouted, WorkerSetAside
from tests.integration.asking import Client, client, facts, got
from tests.integration.harness import Harness, ScriptedWorker, frontend
from tests.waiting import eventually

FAILURES_MAX = 5
SETTINGS: dict[str, Any] = {"router_mode": "round-robin"}
FAILS = ("internal", "out of order")


async def failed_in_a_row(asking: Client, worker: ScriptedWorker, count: int) -> None:
    """Ask until so many requests have failed on the worker."""
    for _ in range(2 * count):
        if len(worker.streams) == count:
            return
        answer = await asking.ask().answer()
        assert answer.status in (200, 500)
    assert len(worker.streams) == count


async def set_aside(asking: Client) -> list[dict[str, Any]]:
    found = (await asking.get("/health"))["set_aside"]
    assert isinstance(found, list)
    return found


async def two_workers(here: Harness) -> tuple[ScriptedWorker, ScriptedWorker]:
    """The first fails whatever it gets."""
    failing, working = await here.add_worker(5), await here.add_worker(6, echo="x")
    failing.error = FAILS
    await here.until_served(aggregated=2)
    return failing, working


async def test_five_failures_in_a_row_set_a_worker_aside_and_it_comes_back() -> None:
    async with frontend(**SETTINGS) as here, client(here) as asking:
        failing, working = await two_workers(here)
        await failed_in_a_row(asking, failing, FAILURES_MAX - 1)
        assert await set_aside(asking) == []
        await failed_in_a_row(asking, failing, FAILURES_MAX)

        (shown,) = await set_aside(asking)
        assert (shown["instance_id"], shown["failures"]) == (5, FAILURES_MAX)
        assert 0 < shown["for_s"] <= 1
        assert await asking.metric("reckon_workers_set_aside") == 1
        total = await asking.metric("reckon_worker_set_aside_total", cause="engine_error")
        assert total == 1
        (told,) = await facts(here, WorkerSetAside)
        assert (told.worker_id, told.failures, told.cause) == (5, FAILURES_MAX, "engine_error")
        assert 0.75 <= told.seconds <= 1.0

        before = len(working.streams)
        for _ in range(4):
            assert (await asking.ask().answer()).status == 200
        assert len(working.streams) == before + 4
        routed = (await facts(here, RequestRouted))[-1]
        assert (routed.worker_id, routed.candidate_count, routed.set_aside) == (6, 1, 1)

        failing.error, failing.echo = None, "well again"

        async def tried_again() -> bool:
            assert (await asking.ask().answer()).status == 200
            return len(failing.streams) > FAILURES_MAX

        await eventually(tried_again)
        await eventually(lambda: not here.process.router.workers_set_aside())
        assert await set_aside(asking) == []
        assert await asking.metric("reckon_workers_set_aside") == 0
        await here.assert_nothing_left()


async def test_a_failed_trial_is_followed_by_a_longer_pause() -> None:
    async with frontend(**SETTINGS) as here, client(here) as asking:
        failing, _ = await two_workers(here)
        await failed_in_a_row(asking, failing, FAILURES_MAX)

        async def tried_again() -> bool:
            await asking.ask().answer()
            return len(failing.streams) > FAILURES_MAX

        await eventually(tried_again)
        first, second = await facts(here, WorkerSetAside)
        assert (second.failures, second.seconds > 1.4) == (FAILURES_MAX + 1, True)
        assert first.seconds <= 1


async def test_when_all_are_set_aside_all_are_used() -> None:
    """Who gets a failure knows more than who is refused."""
    async with frontend(**SETTINGS) as here, client(here) as asking:
        worker = await here.add_worker(5)
        worker.error = FAILS
        await here.until_served()
        for _ in range(FAILURES_MAX + 3):
            answer = await asking.ask().answer()
            assert (answer.status, answer.code) == (500, "engine_error")
        assert len(worker.streams) == FAILURES_MAX + 3
        assert len(await facts(here, WorkerSetAside)) == 1, "late failures are no news"
        worker.error, worker.echo = None, "x"
        assert (await asking.ask().answer()).status == 200
        assert await set_aside(asking) == [], "a success is enough"


async def test_what_a_request_is_to_blame_for_does_not_count() -> None:
    """The engine refuses it, or its client leaves before there is a token."""
    async with frontend(**SETTINGS) as here, client(here) as asking:
        worker = await here.add_worker(5)
        worker.error = ("invalid_request", "no")
        await here.until_served()
        for _ in range(2 * FAILURES_MAX):
            assert (await asking.ask().answer()).status == 400
        worker.error = None
        for _ in range(2 * FAILURES_MAX):
            asked = asking.ask()
            await got(worker, asked)
            asked.leave()
        await eventually(
            lambda: all(each.cancelled for each in worker.streams[-2 * FAILURES_MAX :])
        )
        await here.assert_nothing_left()
        assert len(await facts(here, RequestCancelled)) == 2 * FAILURES_MAX
        assert await facts(here, WorkerSetAside) == []
        assert await set_aside(asking) == []


@pytest.mark.parametrize("leaves", [False, True])
async def test_lost_connections_count_until_the_worker_leaves(leaves: bool) -> None:
    async with frontend(**SETTINGS) as here, client(here) as asking:
        worker = await here.add_worker(5)
        for _ in range(FAILURES_MAX):
            await here.until_served()
            asked = asking.ask()
            (await got(worker, asked)).connection.abort()
            assert (await asked.answer()).status == 502
        await eventually(lambda: bool(here.process.router.workers_set_aside()))
        (told,) = await facts(here, WorkerSetAside)
        assert told.cause == "worker_lost"
        if leaves:
            here.discovery.expire(5)
            assert here.process.router.workers_set_aside() == []
