"""What /metrics tells of requests, workers and the queue after some that are known."""

from typing import Any

import pytest

from eventstore.events import AllBlocksCleared, BlockRemoved, BlockStored
from eventstore.publisher import Publisher
from eventstore.subjects import kv_producer
from tests.integration.asking import Client, client, got, parked
from tests.integration.harness import MODEL, ScriptedWorker, frontend
from tests.waiting import eventually

QUEUE = {"model": MODEL, "worker_type": "aggregated", "policy_class": "default"}


async def queue(asking: Client) -> tuple[float, float, float]:
    """Requests, tokens of their prompts, and cached ones of these."""
    prefix = "dynamo_frontend_router_queue_pending_"
    requests = await asking.metric(f"{prefix}requests", **QUEUE)
    isl = await asking.metric(f"{prefix}isl_tokens", **QUEUE)
    return requests, isl, await asking.metric(f"{prefix}cached_tokens", **QUEUE)


def finish(worker: ScriptedWorker) -> None:
    """End all that runs there."""
    for stream in worker.streams:
        if not stream.forgotten:
            stream.forgotten = True
            stream.send("x", finish="stop", cached=0)


async def test_the_queue_is_shown_while_requests_wait_and_after() -> None:
    settings: dict[str, Any] = {"router_queue_threshold": 0.0, "router_queue_len_max": 2}
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        held = asking.ask()
        await got(worker, held)
        for count, tokens in enumerate((100, 200), start=1):
            asking.ask(tokens)
            await parked(here, count)
        assert await queue(asking) == (2, 300, 0)
        assert (await asking.ask().answer()).code == "queue_full"
        backpressure = "dynamo_frontend_router_queue_backpressure_total"
        assert await asking.metric(backpressure, **QUEUE, reason="request_limit") == 1
        assert await asking.metric("reckon_queue_wait_seconds_count", model=MODEL) == 0

        def all_ended() -> bool:
            finish(worker)
            return here.process.router.live_requests == 0

        await eventually(all_ended)
        assert await queue(asking) == (0, 0, 0)
        assert await asking.metric("reckon_queue_wait_seconds_count", model=MODEL) == 2
        assert await asking.metric(backpressure, **QUEUE, reason="request_limit") == 1
        assert await asking.metric("dynamo_frontend_model_rejection_total", model=MODEL) == 1


async def test_a_wait_that_was_too_long_is_backpressure_too() -> None:
    settings: dict[str, Any] = {
        "router_queue_threshold": 0.0,
        "router_queue_wait_max_secs": 0.01,
    }
    async with frontend(**settings) as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        await got(worker, asking.ask())
        assert (await asking.ask().answer()).code == "queue_timeout"
        backpressure = "dynamo_frontend_router_queue_backpressure_total"
        assert await asking.metric(backpressure, **QUEUE, reason="wait_limit") == 1
        labels = {"model": MODEL, "code": "queue_timeout"}
        assert await asking.metric("reckon_requests_rejected_total", **labels) == 1


async def test_requests_are_counted_for_the_router_and_for_their_worker() -> None:
    async with frontend() as here, client(here) as asking:
        worker = await here.add_worker(5)
        await here.until_served()
        asked = asking.ask(64)
        stream = await got(worker, asked)
        stream.send("three words here", cached=0)
        stream.send(" and more", finish="stop")
        assert (await asked.answer()).status == 200
        await here.assert_nothing_left()
        router = {"router_id": here.process.router.router_id}
        for name in (
            "dynamo_router_requests_total",
            "dynamo_router_time_to_first_token_seconds_count",
            "dynamo_router_input_sequence_tokens_count",
            "dynamo_router_output_sequence_tokens_count",
            "dynamo_router_overhead_block_hashing_ms_count",
            "dynamo_router_overhead_seq_hashing_ms_count",
            "dynamo_router_overhead_indexer_find_matches_ms_count",
            "dynamo_router_overhead_scheduling_ms_count",
            "dynamo_router_overhead_total_ms_count",
        ):
            assert await asking.metric(name, **router) == 1, name
        tokens = (await asked.answer()).body["usage"]["completion_tokens"]
        assert await asking.metric("dynamo_router_input_sequence_tokens_sum", **router) == 64
        assert await asking.metric("dynamo_router_output_sequence_tokens_sum", **router) == tokens
        gaps = await asking.metric("dynamo_router_inter_token_latency_seconds_count", **router)
        assert 0 < gaps < tokens
        parts = ("block_hashing", "seq_hashing", "indexer_find_matches", "scheduling")
        sums = [
            await asking.metric(f"dynamo_router_overhead_{part}_ms_sum", **router) for part in parts
        ]
        total = await asking.metric("dynamo_router_overhead_total_ms_sum", **router)
        assert total == pytest.approx(sum(sums))

        at = {"worker_id": "5", "dp_rank": "0", "worker_type": "aggregated"}
        last = "dynamo_frontend_worker_last_"
        assert await asking.metric(f"{last}input_sequence_tokens", **at) == 64
        assert await asking.metric(f"{last}time_to_first_token_seconds", **at) > 0
        assert await asking.metric(f"{last}inter_token_latency_seconds", **at) > 0
        here.discovery.expire(5)
        await eventually(lambda: not here.process.replica.state.workers)
        assert f"{last}input_sequence_tokens{{" not in await asking.get("/metrics")


async def test_kv_events_beliefs_and_sessions_are_counted() -> None:
    settings: dict[str, Any] = {
        "router_session_affinity_ttl_secs": 60.0,
        "router_predicted_ttl_secs": 60.0,
    }
    async with frontend(**settings) as here, client(here) as asking:
        await here.add_worker(5, echo="x")
        await here.until_served()
        async with Publisher(here.log, "test", kv_producer(5, 0), 1) as publisher:
            publisher.publish(BlockStored(5, 0, None, [1, 2, 3]))
            publisher.publish(BlockRemoved(5, 0, [3]))
            publisher.publish(AllBlocksCleared(5, 0))
            publisher.publish(BlockStored(5, 0, None, [4]))
            await publisher.flush(5)
        session = {"x-dynamo-session-id": "s"}
        assert (await asking.ask(64, headers=session).answer()).status == 200
        await here.settle()
        applied = "dynamo_component_kv_cache_events_applied"
        for kind, count in (("stored", 2), ("removed", 1), ("cleared", 1)):
            assert await asking.metric(applied, status="ok", event_type=kind) == count
        assert await asking.metric("reckon_index_blocks") == 1
        assert await asking.metric("reckon_predicted_pairs") == 4
        assert await asking.metric("reckon_sessions") == 1
        assert await asking.metric("reckon_pinned_pairs") == 0
