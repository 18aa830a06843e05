"""Busy thresholds in a deployment: set anywhere, in force everywhere, and what they refuse."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from eventstore.claims import MemoryClaims
from eventstore.control import record_reset
from eventstore.errors import LogUnavailable
from eventstore.events import BusyThresholdChanged, RequestRejected, RequestRouted
from eventstore.snapshots import MemorySnapshots
from frontend import busy_threshold
from router.snapshot_steps import Outcome, SnapshotTaker
from router.snapshot_trigger import Snapshots
from tests.integration.asking import Asked, Client, client, facts, got
from tests.integration.harness import MODEL, Harness, ScriptedWorker, card, frontend
from tests.waiting import eventually

PATH = busy_threshold.PATH
PEER_MESSAGE = "Service temporarily unavailable: All workers are busy, please retry later"
NO_QUEUE: dict[str, Any] = {"router_queue_threshold": None}
MODES = ["round-robin", "random", "power-of-two", "least-loaded", "kv"]


async def thresholds(asking: Client) -> dict[str, Any]:
    """Those of the one model there is."""
    (only,) = (await asking.get(PATH))["thresholds"]
    assert isinstance(only, dict)
    return only


async def change(asking: Client, **values: object) -> None:
    answer = await asking.post(PATH, {"model": MODEL, **values})
    assert answer.status == 200, answer.body


class Busy(NamedTuple):
    """A frontend with two workers, of which the first computes a prompt of 64 tokens."""

    here: Harness
    asking: Client
    busy: ScriptedWorker
    free: ScriptedWorker
    running: Asked


@asynccontextmanager
async def one_of_two_busy(**settings: object) -> AsyncIterator[Busy]:
    """Above 63 active prefill tokens a worker takes no more."""
    chosen: dict[str, Any] = {**NO_QUEUE, "active_prefill_tokens_threshold": 63, **settings}
    async with frontend(**chosen) as here, client(here) as asking:
        busy, free = [await here.add_worker(5), await here.add_worker(6)]
        await here.until_served(aggregated=2)
        running = asking.ask(64, headers={"x-worker-instance-id": "5"})
        await got(busy, running)
        await eventually(lambda: bool(here.process.replica.state.thresholds))
        yield Busy(here, asking, busy, free, running)


# --- whom they keep away --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_every_mode_goes_around_the_busy_ones(mode: str) -> None:
    async with one_of_two_busy(router_mode=mode) as (here, asking, busy, free, _):
        free.echo = "x"
        for _ in range(8):
            assert (await asking.ask(64).answer()).status == 200
        assert (len(busy.streams), len(free.streams)) == (1, 8)
        chosen = [each for each in await facts(here, RequestRouted) if each.mode == mode]
        assert [(each.worker_id, each.candidate_count, each.set_aside) for each in chosen] == [
            (6, 1, 1)
        ] * 8
        busy.streams[0].send("x", finish="stop", cached=0)
        await here.assert_nothing_left()


@pytest.mark.parametrize("mode", [*MODES, "direct"])
async def test_every_mode_refuses_when_all_are_busy(mode: str) -> None:
    """Who names a busy worker is refused too, although another one is free."""
    async with one_of_two_busy(router_mode=mode) as (here, asking, busy, free, _):
        named = await asking.ask(headers={"x-worker-instance-id": "5"}).answer()
        assert (named.status, named.code) == (503, "all_workers_busy")
        assert "the worker of tiny is busy" in named.message
        also_running = asking.ask(100, headers={"x-worker-instance-id": "6"})
        await got(free, also_running)
        if mode != "direct":
            for stream in (False, True):
                refused = await asking.ask(stream=stream).answer()
                assert (refused.status, refused.code) == (503, "all_workers_busy")
                assert refused.headers["Retry-After"] == "1"
                assert refused.message == (
                    f"{PEER_MESSAGE}; all 2 workers of tiny are busy: the one that is least so "
                    "has 64, and active_prefill_tokens_threshold is 63"
                )
        for worker in (busy, free):
            worker.streams[0].send("x", finish="stop", cached=0)
        await here.assert_nothing_left()


async def test_ranks_are_busy_one_by_one() -> None:
    settings: dict[str, Any] = {**NO_QUEUE, "active_prefill_tokens_threshold_frac": 0.5}
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5, model=card(max_num_batched_tokens=100), dp_size=2)
        await here.until_served(aggregated=2)
        await eventually(lambda: bool(here.process.replica.state.thresholds))
        asking.ask(51, headers={"x-dp-rank": "1"})
        await worker.next()
        second = await got(worker, asking.ask(50))
        assert second.request.dp_rank == 0
        third = await got(worker, asking.ask(1))
        assert third.request.dp_rank == 0, "at the threshold it takes more"
        refused = await asking.ask().answer()
        assert refused.status == 503
        assert "has 0.51, and active_prefill_tokens_threshold_frac is 0.5" in refused.message


async def test_a_prefill_worker_is_kept_from_too_many_prompts() -> None:
    """The thresholds are a model's, and hold for the workers of each role."""
    settings: dict[str, Any] = {**NO_QUEUE, "active_prefill_tokens_threshold": 40}
    async with frontend(**settings) as here, client(here) as asking:
        prefill = await here.add_worker(5, model=card(worker_type="prefill"))
        await here.add_worker(6, model=card(worker_type="decode"))
        await here.until_served(prefill=1, decode=1)
        await eventually(lambda: bool(here.process.replica.state.thresholds))
        await got(prefill, asking.ask(48))
        refused = await asking.ask().answer()
        assert (refused.status, refused.code) == (503, "all_workers_busy")
        assert "has 48" in refused.message


async def test_the_status_of_a_refusal_can_be_chosen() -> None:
    """It is the client's, and that of the record; and the metrics tell of it."""
    settings: dict[str, Any] = {"http_overload_status_code": 529}
    async with one_of_two_busy(**settings) as (here, asking, busy, _, _):
        here.discovery.expire(6)
        await here.until_served(aggregated=1)
        for _ in range(3):
            refused = await asking.ask().answer()
            assert (refused.status, refused.headers["Retry-After"]) == (529, "1")
        rejected = await facts(here, RequestRejected)
        assert [(each.code, each.status) for each in rejected] == [("all_workers_busy", 529)] * 3
        assert "the worker of tiny is busy: it has 64" in rejected[0].reason
        labels = {"model": MODEL, "endpoint": "completions"}
        assert await asking.metric("dynamo_frontend_model_rejection_total", **labels) == 3
        labels = {"model": MODEL, "code": "all_workers_busy"}
        assert await asking.metric("reckon_requests_rejected_total", **labels) == 3
        labels = {"status": "error", "error_type": "overload"}
        assert await asking.metric("dynamo_frontend_requests_total", **labels) == 3
        busy.streams[0].send("x", finish="stop", cached=0)
        await here.assert_nothing_left()


# --- who sets them, and for how long --------------------------------------------------------------


async def test_options_hold_for_a_model_from_its_first_worker_on() -> None:
    settings: dict[str, Any] = {
        "active_decode_blocks_threshold": 0.9,
        "active_prefill_tokens_threshold": 100,
    }
    async with frontend(**settings) as here, client(here) as asking:
        assert (await asking.get(PATH)) == {"thresholds": []}
        await here.add_worker(5)
        await eventually(lambda: bool(here.process.replica.state.thresholds))
        (changed,) = await facts(here, BusyThresholdChanged)
        source = f"options of frontend {here.process.router.router_id}"
        assert changed == BusyThresholdChanged(MODEL, 0.9, 100, None, source)
        shown = await thresholds(asking)
        assert (shown["active_decode_blocks_threshold"], shown["source"]) == (0.9, source)


async def test_options_count_less_than_an_operators_word_and_come_back_after_a_reset() -> None:
    settings: dict[str, Any] = {"active_prefill_tokens_threshold": 100}
    async with frontend() as here, client(here) as asking:
        await here.add_worker(5)
        await here.until_served()
        await change(asking, active_prefill_tokens_threshold=7)
        async with frontend(beside=here, **settings) as late, client(late) as asking_late:
            await late.until_served()
            await change(asking, active_decode_blocks_threshold=0.5)
            await late.settle()
            shown = await thresholds(asking_late)
            assert shown["active_prefill_tokens_threshold"] == 7
            await record_reset(here.log, "test", "a test wants it", 1)

            async def by_options() -> bool:
                shown = await thresholds(asking_late)
                return bool(shown["active_prefill_tokens_threshold"] == 100)

            await eventually(by_options)
            assert (await thresholds(asking_late))["active_decode_blocks_threshold"] is None


async def test_what_one_frontend_sets_all_have_and_null_clears() -> None:
    async with (
        frontend(**NO_QUEUE) as here,
        frontend(beside=here, **NO_QUEUE) as other,
        client(here) as asking,
        client(other) as asking_other,
    ):
        worker = await here.add_worker(5)
        await here.until_served()
        await other.until_served()
        await change(asking, active_prefill_tokens_threshold=0, active_decode_blocks_threshold=1.0)
        await other.settle()
        shown = await thresholds(asking_other)
        assert shown == await thresholds(asking)
        assert shown["since_seq"] == (await here.log.extent()).last_seq
        assert shown["source"] == "POST /busy_threshold from 127.0.0.1"
        assert shown["since_time"].startswith("20")

        await got(worker, asking.ask())
        await here.settle()
        await other.settle()
        refused = await asking_other.ask().answer()
        assert (refused.status, refused.code) == (503, "all_workers_busy")
        await change(asking, active_prefill_tokens_threshold=None)
        await other.settle()
        await got(worker, asking_other.ask())
        shown = await thresholds(asking_other)
        assert shown["active_prefill_tokens_threshold"] is None
        assert shown["active_decode_blocks_threshold"] == 1.0
        await other.settle()
        await here.settle()
        await other.settle()
        digests = {each.process.replica.state.digest() for each in (here, other)}
        assert len(digests) == 1


async def test_they_survive_a_restart_by_a_snapshot_and_what_came_after_it() -> None:
    store, claims = MemorySnapshots(), MemoryClaims(lambda: 0.0)

    async def never() -> Outcome:
        raise AssertionError("none is due")

    snapshots = Snapshots(store, claims, never)
    async with frontend(snapshots=snapshots) as here, client(here) as asking:
        await here.add_worker(5)
        await here.until_served()
        await change(asking, active_prefill_tokens_threshold=7)
        await here.settle()
        taker = SnapshotTaker(here.log, "test", store, claims, kept=2, version="v")
        assert (await taker.run("a test")).taken
        await change(asking, active_decode_blocks_threshold=0.25)
        before = await thresholds(asking)
        async with frontend(beside=here) as again, client(again) as asking_again:
            await again.until_served()
            report = again.process.replica.status().snapshot
            assert report is not None and report.name is not None
            assert await thresholds(asking_again) == before
            assert before["active_prefill_tokens_threshold"] == 7
            assert before["active_decode_blocks_threshold"] == 0.25


@pytest.mark.parametrize("answers", [False, True])
async def test_a_change_that_the_log_does_not_take_is_refused_in_time(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the log says that it is away, or says nothing at all; and nothing has changed."""

    async def append(*args: object, **more: object) -> None:
        if not answers:
            await asyncio.Event().wait()
        raise LogUnavailable("10.0.0.7:4222 refused")

    monkeypatch.setattr(busy_threshold, "CHANGE_S", 0.05)
    async with frontend() as here, client(here) as asking:
        await here.add_worker(5)
        await here.until_served()
        with monkeypatch.context() as away:
            away.setattr(here.log, "append", append)
            answer = await asking.post(PATH, {"model": MODEL, "active_prefill_tokens_threshold": 1})
        assert answer.status == 503
        assert answer.headers["Retry-After"]
        assert "10.0.0.7" not in str(answer.body)
        assert (await thresholds(asking))["active_prefill_tokens_threshold"] is None
        await change(asking, active_prefill_tokens_threshold=1)
        assert (await thresholds(asking))["active_prefill_tokens_threshold"] == 1
