"""Prefixes that clients pin: who is told, what the log has, and that requests go there."""

import asyncio
import time
from typing import Any

from eventstore import events
from indexer.blocks import prompt_hashes
from tests.integration.harness import Harness, card, frontend
from tests.integration.mock_workers import RunningWorker, complete, mock_worker, of_type
from tests.waiting import eventually
from workers.protocol import Pin

PROMPT = list(range(500, 588))
"""Five blocks and a half."""
HASHES = prompt_hashes(PROMPT, 16)
FIVE_MINUTES: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
AN_HOUR: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


async def pinned(here: Harness, worker: RunningWorker, *, ttl_s: int) -> None:
    """Until the worker's pin of the prompt is in the log, and in the state."""

    async def told() -> bool:
        found = await of_type(here, events.PrefixPinned)
        return [(each.worker_id, each.sequence_hashes, each.ttl_s) for each in found] == [
            (worker.worker_id, HASHES, ttl_s)
        ]

    await eventually(told)
    assert len(here.process.replica.state.pinned) == len(HASHES)


async def test_a_pin_reaches_the_engine_the_log_and_the_state() -> None:
    async with frontend(enable_cache_control=True) as here, mock_worker(here) as worker:
        await here.until_served()
        await complete(here, PROMPT, max_tokens=3)
        assert await of_type(here, events.PrefixPinned) == []
        await complete(here, PROMPT, max_tokens=3, nvext=AN_HOUR)
        await pinned(here, worker, ttl_s=3600)
        now_ms = asyncio.get_running_loop().time() * 1000
        assert [each.sequence_hashes for each in worker.engine.pinned(now_ms)] == [HASHES]


async def test_pinned_blocks_draw_requests_also_without_kv_events() -> None:
    settings: dict[str, Any] = {"router_kv_events": False, "router_ttl_secs": 1e-3}
    async with (
        frontend(enable_cache_control=True, **settings) as here,
        mock_worker(here) as one,
        mock_worker(here) as other,
    ):
        await here.until_served(aggregated=2)
        answer = await complete(here, PROMPT, max_tokens=2, nvext=FIVE_MINUTES)
        chosen = answer.workers["decode_worker_id"]
        holder = one if chosen == one.worker_id else other
        await pinned(here, holder, ttl_s=300)
        state = here.process.replica.state
        for tail in range(5):
            # What was predicted is over: only the pin tells.
            await eventually(lambda: not state.predicted.match_depths(HASHES, time.time_ns()))
            answer = await complete(here, [*PROMPT, tail], max_tokens=2)
            assert answer.workers["decode_worker_id"] == chosen
            assert answer.body["nvext"]["predicted_cached_tokens"] == 16 * len(HASHES)
        *_, last = await of_type(here, events.RequestRouted)
        assert last.overlap_blocks == last.predicted_blocks == len(HASHES)


async def test_a_prefill_worker_is_told_where_there_is_one() -> None:
    async with (
        frontend(enable_cache_control=True) as here,
        mock_worker(here, "prefill") as one,
        mock_worker(here, "decode"),
    ):
        await here.until_served(prefill=1, decode=1)
        await complete(here, PROMPT, max_tokens=3, nvext=FIVE_MINUTES, stream=True)
        await pinned(here, one, ttl_s=300)


async def test_who_finished_is_told_and_only_after_a_whole_answer() -> None:
    async with frontend(enable_cache_control=True, migration_limit=1) as here:
        workers = [await here.add_worker(1 + index) for index in range(2)]
        await here.until_served(aggregated=2)
        asked = asyncio.create_task(complete(here, PROMPT, nvext=FIVE_MINUTES))
        await eventually(lambda: any(worker.streams for worker in workers))
        first, second = sorted(workers, key=lambda worker: not worker.streams)
        first.streams[0].connection.abort()
        stream = await second.next()
        stream.send("some")
        assert not second.pins
        stream.send(" more", finish="stop")
        await asked
        await eventually(lambda: second.pins == [Pin(0, PROMPT, 300)])
        asked = asyncio.create_task(complete(here, PROMPT, nvext=FIVE_MINUTES))
        await eventually(lambda: len(first.streams) + len(second.streams) == 3)
        (first.streams[1:] or second.streams[1:])[0].send(error=("internal", "secret"))
        assert (await asked).status == 500
        await here.assert_nothing_left()
        assert len(first.pins) + len(second.pins) == 1


async def test_without_the_option_it_is_taken_and_does_nothing() -> None:
    async with frontend() as here:
        worker = await here.add_worker(5, "fine", card())
        await here.until_served()
        assert (await complete(here, PROMPT, nvext=AN_HOUR)).status == 200
        assert (await complete(here, PROMPT)).status == 200
        await here.assert_nothing_left()
        assert worker.pins == []
