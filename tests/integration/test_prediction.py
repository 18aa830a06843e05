"""What is believed cached because it was sent somewhere: instead of KV events, and beside them."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from eventstore import events
from tests.integration.harness import Harness, frontend
from tests.integration.routing import Answer, announce, ask, prompt, routed, where, write
from tests.waiting import eventually

A, B, C = prompt(101, 4), prompt(102, 4), prompt(103, 4)
ALL = 64
"""Tokens of each of them."""


async def serve(here: Harness, workers: int = 2) -> None:
    for number in range(1, workers + 1):
        await here.add_worker(number, "x")
    await eventually(lambda: len(here.process.router.candidates("tiny").ranks) == workers)
    await here.settle()


async def quiet(here: Harness) -> None:
    """Nothing more comes into the log, and the time of its last record is over."""
    await here.settle()
    last_ns = here.process.replica.state.time_ns
    await eventually(lambda: time.time_ns() > last_ns + 5_000_000)
    assert here.process.replica.state.time_ns == last_ns


async def ask_settled(here: Harness, token_ids: list[int], **more: Any) -> Answer:
    answer = await ask(here, token_ids, **more)
    assert answer.status == 200
    await here.settle()
    return answer


async def test_without_kv_events_only_what_was_routed_counts() -> None:
    async with frontend(router_kv_events=False) as here:
        await serve(here)
        await announce(here, here.workers[0], A)
        first = await ask_settled(here, A, backend_instance_id=2)
        assert first.predicted_tokens == 0, "what workers announce is not listened to"
        again = await ask_settled(here, A)
        assert (again.worker_id, again.predicted_tokens) == (2, ALL)
        why = (await routed(here))[-1]
        assert (why.overlap_blocks, why.predicted_blocks) == (4, 4)
        assert why.prediction == events.Prediction(120_000, 2**20, 838_860)
        here.process.replica.state.check()


async def test_with_kv_events_only_what_is_announced_counts() -> None:
    async with frontend() as here:
        await serve(here)
        await ask_settled(here, A, backend_instance_id=2)
        assert (await ask_settled(here, A, backend_instance_id=2)).predicted_tokens == 0
        await announce(here, here.workers[0], A)
        assert await where(here, A, 3) == {1}
        assert all(each.prediction is None for each in await routed(here))


async def test_a_query_is_not_a_belief() -> None:
    async with frontend(router_kv_events=False) as here:
        await serve(here, 1)
        await where(here, A)
        assert (await ask(here, A)).predicted_tokens == 0


@pytest.mark.parametrize("kv_events", [False, True])
async def test_a_belief_is_over_after_its_time_even_if_the_log_is_silent(kv_events: bool) -> None:
    option = "router_predicted_ttl_secs" if kv_events else "router_ttl_secs"
    for ttl_secs, expected in ((120.0, ALL), (0.001, 0)):
        settings: dict[str, Any] = {"router_kv_events": kv_events, option: ttl_secs}
        async with frontend(**settings) as here:
            await serve(here)
            await ask_settled(here, A, backend_instance_id=2)
            await quiet(here)
            answer = await ask(here, A, backend_instance_id=2)
            assert answer.predicted_tokens == expected
            ttl_ms = round(1000 * ttl_secs)
            assert {e.prediction.ttl_ms for e in await routed(here) if e.prediction} == {ttl_ms}


@pytest.mark.parametrize(
    ("size", "ratio", "kept"),
    [(2**20, 0.8, "ABC"), (8, 1.0, "BC"), (8, 0.5, "C"), (8, 0.0, "")],
)
async def test_more_beliefs_than_fit_are_pruned(size: int, ratio: float, kept: str) -> None:
    """Three prompts of four blocks, one after the other; the oldest goes first."""
    prompts = {"A": A, "B": B, "C": C}
    for name, token_ids in prompts.items():
        async with frontend(
            router_kv_events=False, router_max_tree_size=size, router_prune_target_ratio=ratio
        ) as here:
            await serve(here, 1)
            for each in prompts.values():
                await ask_settled(here, each)
            answer = await ask(here, token_ids)
            assert answer.predicted_tokens == (ALL if name in kept else 0), name


async def test_beside_kv_events_a_prediction_counts_at_once() -> None:
    """Before the log has told of it, and before the worker has announced anything."""
    async with frontend(router_predicted_ttl_secs=60.0) as here:
        await serve(here)
        for worker in here.workers:
            worker.echo = None
        asked = [asyncio.create_task(ask(here, A)) for _ in range(6)]
        await eventually(lambda: sum(len(worker.streams) for worker in here.workers) == 6)
        decisions = await routed(here)
        first = decisions[0].worker_id
        for why in decisions[1:]:
            (there,) = (c for c in why.candidates if c.worker_id == first)
            assert there.overlap_blocks == 4
        for worker in here.workers:
            for stream in worker.streams:
                stream.send("x", finish="stop", cached=0)
        assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
        assert all(each.prediction is not None for each in decisions)


async def test_replicas_predict_alike_and_a_restart_keeps_it() -> None:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(frontend(router_kv_events=False))
        await serve(here)
        with_events = await stack.enter_async_context(frontend(beside=here))
        other = await stack.enter_async_context(frontend(beside=here, router_kv_events=False))
        await ask_settled(here, A, backend_instance_id=2)
        later = await stack.enter_async_context(frontend(beside=here, router_kv_events=False))
        for each in (other, later, with_events):
            await eventually(lambda: len(each.process.router.candidates("tiny").ranks) == 2)  # noqa: B023
            await each.settle()
        digests = {each.process.replica.state.digest() for each in (here, other, later)}
        assert digests == {with_events.process.replica.state.digest()}
        for each in (other, later):
            assert await where(each, A, 5) == {2}
        assert (await ask(with_events, A, backend_instance_id=2)).predicted_tokens == 0


async def test_what_a_worker_evicts_is_believed_no_more() -> None:
    async with frontend(router_predicted_ttl_secs=60.0) as here:
        await serve(here)
        await ask_settled(here, A, backend_instance_id=2)
        hashes = (await routed(here))[-1].sequence_hashes
        await write(here, events.BlockRemoved(2, 0, hashes[2:]))
        assert (await ask(here, A, backend_instance_id=2)).predicted_tokens == ALL // 2
