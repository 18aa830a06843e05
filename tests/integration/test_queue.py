"""The router's queue through HTTP: who waits, who goes next, and what ends a wait.

The threshold is 0 unless a test says otherwise: a worker that computes a prompt takes no other.
"""

from typing import Any

import pytest

from eventstore.control import record_reset
from eventstore.events import (
    BlockStored,
    RequestAccepted,
    RequestCancelled,
    RequestFailed,
    RequestQueued,
    RequestRejected,
    RequestRouted,
)
from eventstore.publisher import Publisher
from eventstore.subjects import kv_producer
from indexer.blocks import prompt_hashes
from router.lifecycle import Phase
from tests.integration.asking import Asked, Client, client, facts, got, parked
from tests.integration.harness import Harness, ScriptedWorker, card, frontend
from tests.waiting import eventually

QUEUE: dict[str, Any] = {"router_queue_threshold": 0.0}


async def order_of_release(worker: ScriptedWorker, waiting: list[Asked]) -> list[Asked]:
    """Who reaches the worker, one after the other, as each prompt before is computed.

    The worker has one stream, which is being prefilled, before the first of them.
    """
    order: list[Asked] = []
    before = worker.streams[-1]
    for _ in waiting:
        count = len(worker.streams)
        before.send("x", finish="stop", cached=0)
        stream = await worker.next(count)
        assert len(worker.streams) == count + 1, "one at a time"
        order += [asked for asked in waiting if asked.prompt == stream.request.token_ids]
        before = stream
    before.send("x", finish="stop", cached=0)
    return order


async def park(here: Harness, asking: Client, *asked: dict[str, Any]) -> list[Asked]:
    """Ask for these, each when the one before has been parked."""
    before = len(here.process.router.parking)
    waiting = []
    for count, each in enumerate(asked, start=before + 1):
        waiting.append(asking.ask(**each))
        await parked(here, count)
    return waiting


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2]), ("wspt", [1, 2, 0])])
async def test_what_waits_goes_in_the_order_of_the_policy(policy: str, expected: list[int]) -> None:
    """First come first, or the least to compute first; and everything that happened is told."""
    async with frontend(router_queue_policy=policy, **QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask(64)
        await worker.next()
        waiting = await park(here, asking, {"tokens": 320}, {"tokens": 100}, {"tokens": 200})
        order = await order_of_release(worker, waiting)
        assert order == [waiting[index] for index in expected]
        assert [(await asked.answer()).status for asked in waiting] == [200] * 3
        await here.assert_nothing_left()
        queued = await facts(here, RequestQueued)
        assert [(each.depth, each.uncached_tokens, each.role) for each in queued] == [
            (0, 320, "aggregated"),
            (1, 100, "aggregated"),
            (2, 200, "aggregated"),
        ]
        routed = {each.request_id: each for each in await facts(here, RequestRouted)}
        assert all(routed[each.request_id].queued_ms > 0 for each in queued)
        assert sum(each.queued_ms > 0 for each in routed.values()) == 3


async def test_priorities_are_seconds_and_tiers_go_before_them() -> None:
    """By agent hints, the older name of them too, and by headers, which go before the body."""
    async with frontend(**QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        plain, negative, older, hinted, by_header, strict = await park(
            here,
            asking,
            {},
            {"nvext": {"agent_hints": {"priority": -9}}},
            {"nvext": {"agent_hints": {"latency_sensitivity": 20.5}}},
            {"nvext": {"agent_hints": {"priority": 50}}},
            {
                "nvext": {"agent_hints": {"priority": 1}},
                "headers": {"x-dynamo-request-priority": "100"},
            },
            {"headers": {"x-dynamo-request-strict-priority": "1"}},
        )
        waiting = [plain, negative, older, hinted, by_header, strict]
        order = await order_of_release(worker, waiting)
        assert order == [strict, by_header, hinted, older, plain, negative]
        priorities = [
            (each.priority, each.strict_priority) for each in await facts(here, RequestQueued)
        ]
        assert priorities == [(0, 0), (0, 0), (20.5, 0), (50, 0), (100, 0), (0, 1)]
        await here.assert_nothing_left()


async def test_nobody_waits_while_a_worker_is_idle() -> None:
    """Not even for prompts that no worker can batch at once: each idle worker takes one."""
    async with frontend(router_queue_threshold=1.0) as here, client(here) as asking:
        workers = [
            await here.add_worker(worker_id, model=card(max_num_batched_tokens=16))
            for worker_id in (5, 6)
        ]
        await here.until_served(aggregated=2)
        for _ in workers:
            asking.ask(3000)
        await eventually(lambda: all(len(worker.streams) == 1 for worker in workers))
        waiting = asking.ask(1)
        await parked(here, 1)
        workers[1].streams[0].send("x", cached=0)
        await got(workers[1], waiting)
        # A prompt as long as the cap leaves room for one more: only above it a worker is full.
        workers[0].streams[0].send("x", cached=0)
        workers[1].streams[1].send("x", cached=0)
        asking.ask(16)
        asking.ask(16)
        await eventually(lambda: sum(len(worker.streams) for worker in workers) == 5)
        assert len(here.process.router.parking) == 0


async def test_a_full_queue_refuses_with_the_reason() -> None:
    settings: dict[str, Any] = {
        **QUEUE,
        "router_queue_len_max": 1,
        "http_overload_status_code": 529,
    }
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        (waiting,) = await park(here, asking, {})
        for stream in (False, True):
            refused = await asking.ask(stream=stream).answer()
            assert (refused.status, refused.code) == (529, "queue_full")
            assert refused.headers["Retry-After"] == "1"
            assert "1 request waits for a worker already" in refused.message
        worker.streams[0].send("x", finish="stop", cached=0)
        (await got(worker, waiting)).send("x", finish="stop", cached=0)
        assert (await waiting.answer()).status == 200
        await here.assert_nothing_left()
        for rejected in await facts(here, RequestRejected):
            assert (rejected.code, rejected.status) == ("queue_full", 529)
            assert "no more may" in rejected.reason


async def test_a_wait_has_an_end() -> None:
    settings: dict[str, Any] = {**QUEUE, "router_queue_wait_max_secs": 0.05}
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        refused = await asking.ask().answer()
        assert (refused.status, refused.code) == (503, "queue_timeout")
        assert refused.headers["Retry-After"] == "1"
        assert refused.message.startswith("Service temporarily unavailable: All workers are busy")
        assert "no worker had room for the request" in refused.message
        (rejected,) = await facts(here, RequestRejected)
        assert (rejected.code, rejected.status) == ("queue_timeout", 503)
        worker.streams[0].send("x", finish="stop", cached=0)
        await here.assert_nothing_left()
        assert len(worker.streams) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_does_not_wait_any_longer(stream: bool) -> None:
    """Its place is free at once, its end is in the log, and who came after it goes before it."""
    async with frontend(**QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        leaving, staying = await park(here, asking, {"stream": stream}, {})
        leaving.leave()
        await parked(here, 1)
        (cancelled,) = await facts(here, RequestCancelled)
        queued = await facts(here, RequestQueued)
        assert cancelled.request_id == queued[0].request_id
        assert (cancelled.osl, cancelled.cause) == (0, "client disconnected")
        assert await order_of_release(worker, [staying]) == [staying]
        await here.assert_nothing_left()
        assert len(worker.streams) == 2, "the worker never heard of it"


async def test_what_is_cached_is_looked_up_again_at_the_release() -> None:
    async with frontend(**QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        (waiting,) = await park(here, asking, {"tokens": 100})
        publisher = Publisher(here.log, "test", kv_producer(5, 0), 1)
        async with publisher:
            publisher.publish(BlockStored(5, 0, None, prompt_hashes(waiting.prompt, 16)[:4]))
            await publisher.flush(5)
        await here.settle()
        assert await order_of_release(worker, [waiting]) == [waiting]
        (queued,) = await facts(here, RequestQueued)
        routed = (await facts(here, RequestRouted))[-1]
        assert routed.request_id == queued.request_id
        assert (queued.uncached_tokens, routed.overlap_blocks) == (100, 4)
        await here.assert_nothing_left()


async def test_other_replicas_see_who_waits() -> None:
    async with (
        frontend(**QUEUE) as here,
        frontend(beside=here, **QUEUE) as other,
        client(here) as asking,
    ):
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        (waiting,) = await park(here, asking, {})
        (queued,) = await facts(here, RequestQueued)
        await other.settle()
        assert other.process.replica.state.requests[queued.request_id].phase is Phase.QUEUED
        digests = {each.process.replica.state.digest() for each in (here, other)}
        assert len(digests) == 1
        assert len(other.process.router.parking) == 0, "each frontend has its own queue"
        await order_of_release(worker, [waiting])
        await here.assert_nothing_left()
        await other.settle()
        assert not other.process.replica.state.requests


async def test_who_waits_is_announced_again_after_a_reset() -> None:
    async with frontend(**QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        (waiting,) = await park(here, asking, {"tokens": 48})
        (queued,) = await facts(here, RequestQueued)
        await record_reset(here.log, "test", "a test wants it", 1)
        await here.settle()
        state = here.process.replica.state
        assert queued.request_id not in state.requests
        for _ in range(2):  # what is missing twice is missing
            here.process.router.reconcile()
        await here.settle()
        assert state.requests[queued.request_id].phase is Phase.QUEUED
        assert await facts(here, RequestQueued) == [queued, queued]
        assert len(await facts(here, RequestAccepted)) == 4
        assert await order_of_release(worker, [waiting]) == [waiting]
        assert (await waiting.answer()).status == 200
        await here.assert_nothing_left()


async def test_who_has_no_choice_does_not_wait() -> None:
    """A named worker, a named rank, and the worker of a session."""
    settings: dict[str, Any] = {**QUEUE, "router_session_affinity_ttl_secs": 60.0}
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        session = {"x-dynamo-session-id": "s"}
        for count, headers in enumerate(
            [session, {"x-worker-instance-id": "5"}, {"x-dp-rank": "0"}, session]
        ):
            asking.ask(headers=headers)
            await worker.next(count)
            await here.settle()
        (waiting,) = await park(here, asking, {"headers": {"x-dynamo-session-id": "another"}})
        for stream in worker.streams:
            stream.send("x", finish="stop", cached=0)
        (await got(worker, waiting)).send("x", finish="stop", cached=0)
        await here.assert_nothing_left()
        assert [each.mode for each in await facts(here, RequestRouted)] == [
            "kv",
            "direct",
            "kv",
            "session",
            "kv",
        ]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_waits_at_the_shutdown_is_refused(stream: bool) -> None:
    async with frontend(http_graceful_shutdown_timeout_secs=0.1, **QUEUE) as here:
        async with client(here) as asking:
            worker = await here.add_worker(5)
            await here.until_served()
            running = asking.ask(stream=stream)
            await worker.next()
            waiting = await park(here, asking, {"stream": stream}, {"stream": stream})
            here.stop.set()
            for asked in (running, *waiting):
                refused = await asked.answer()
                assert (refused.status, refused.code) == (503, "shutting_down")
                assert refused.headers["Retry-After"] == "1"
            await eventually(lambda: worker.streams[0].cancelled)
        failed = [each for each in await here.recorded() if isinstance(each, RequestFailed)]
        assert [(each.osl, each.code) for each in failed] == [(0, "shutting_down")] * 3
        assert len(worker.streams) == 1


async def test_a_prompt_waits_for_a_prefill_worker() -> None:
    """Who computes prompts has a queue; who gets them computed has nothing to wait for."""
    async with frontend(**QUEUE) as here, client(here) as asking:
        prefill = await here.add_worker(5, model=card(worker_type="prefill"))
        decode = await here.add_worker(6, model=card(worker_type="decode"), echo="x")
        await here.until_served(prefill=1, decode=1)
        first = asking.ask(32)
        await got(prefill, first)
        (waiting,) = await park(here, asking, {"tokens": 48})
        for asked in (first, waiting):
            (await got(prefill, asked)).send("x", finish="length", cached=0, params={})
            assert (await asked.answer()).status == 200
        assert len(decode.streams) == 2
        (queued,) = await facts(here, RequestQueued)
        assert (queued.role, queued.uncached_tokens) == ("prefill", 48)
        await here.assert_nothing_left()


async def test_a_worker_that_comes_takes_what_waits_and_none_at_all_ends_the_wait() -> None:
    async with frontend(**QUEUE) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asking.ask()
        await worker.next()
        first, second = await park(here, asking, {}, {})
        another = await here.add_worker(6)
        await got(another, first)
        for worker_id in (5, 6):
            here.discovery.expire(worker_id)
        refused = await second.answer()
        assert (refused.status, refused.code) == (503, "no_workers")
        await here.assert_nothing_left()
