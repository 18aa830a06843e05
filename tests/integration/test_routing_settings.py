"""The options about modes, cost and load, by where requests really go."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eventstore import events
from tests.integration.harness import MODEL, Harness, ScriptedWorker, frontend
from tests.integration.routing import announce, ask, prompt, routed, running, where, write
from tests.waiting import eventually

A, B, C = prompt(101, 4), prompt(102, 4), prompt(103, 6)
MODES = ["round-robin", "random", "power-of-two", "least-loaded", "kv"]
TRIES = 40
"""At even chances, one run in 2^39 sees only one of two."""


@asynccontextmanager
async def deployment(
    workers: int = 2, echo: str | None = None, **settings: Any
) -> AsyncIterator[tuple[Harness, list[ScriptedWorker]]]:
    """A frontend and its workers 1, 2, …"""
    async with frontend(**settings) as here:
        made = [await here.add_worker(number, echo) for number in range(1, workers + 1)]
        await eventually(lambda: len(here.process.router.candidates(MODEL).ranks) == workers)
        await here.settle()
        yield here, made


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("kv", {1}),
        ("least-loaded", {3}),
        ("power-of-two", {2, 3}),
        ("random", {1, 2, 3}),
    ],
)
async def test_a_mode_chooses_by_its_rule(mode: str, expected: set[int]) -> None:
    """Worker 1 caches the prompt and runs two requests, worker 2 runs one, worker 3 none."""
    async with deployment(3, router_mode=mode) as (here, (one, two, _)):
        await announce(here, one, C)
        async with (
            running(here, one, A),
            running(here, one, A),
            running(here, two, B),
        ):
            assert await where(here, C, TRIES) == expected


async def test_round_robin_takes_turns_whoever_else_is_named() -> None:
    async with deployment(3, echo="x", router_mode="round-robin") as (here, (one, *_)):
        await announce(here, one, A)
        turns = []
        for _ in range(6):
            turns.append((await ask(here, A)).worker_id)
            assert (await ask(here, A, backend_instance_id=2)).worker_id == 2
        assert turns[:3] == turns[3:]
        assert set(turns) == {1, 2, 3}


async def test_direct_goes_where_the_client_says() -> None:
    async with deployment(echo="x", router_mode="direct") as (here, _):
        for worker_id in (1, 2, 1):
            by_header = await ask(here, A, headers={"x-worker-instance-id": str(worker_id)})
            by_body = await ask(here, A, backend_instance_id=worker_id)
            assert (by_header.worker_id, by_body.worker_id) == (worker_id, worker_id)
        unknown = await ask(here, A, backend_instance_id=9)
        assert (unknown.status, unknown.code) == (400, "unknown_worker")
        unknown = await ask(here, A, headers={"x-worker-instance-id": "9"})
        assert (unknown.status, unknown.code) == (400, "unknown_worker")
        none = await ask(here, A)
        assert (none.status, none.code) == (400, "worker_required")
        assert {each.mode for each in await routed(here)} == {"direct"}
        rejected = [e for e in await here.recorded() if isinstance(e, events.RequestRejected)]
        assert [each.status for each in rejected] == [400, 400, 400]


@pytest.mark.parametrize("mode", MODES)
async def test_every_mode_says_why(mode: str) -> None:
    async with deployment(3, echo="x", router_mode=mode) as (here, (one, *_)):
        await announce(here, one, A)
        answer = await ask(here, A)
        (why,) = await routed(here)
        assert (why.mode, why.worker_id, why.candidate_count) == (mode, answer.worker_id, 3)
        assert len(why.candidates) == (2 if mode == "power-of-two" else 3)
        assert why.candidates[0].worker_id == answer.worker_id
        for candidate in why.candidates:
            cached = 4 if candidate.worker_id == 1 else 0
            assert candidate.overlap_blocks == cached
            assert candidate.prefill_tokens == 64 - 16 * cached
            assert candidate.cost == 4 - cached + 4
        assert answer.predicted_tokens == 16 * why.candidates[0].overlap_blocks


@pytest.mark.parametrize("mode", MODES)
async def test_every_mode_leaves_out_who_is_busy_and_keeps_to_the_rank_that_is_named(
    mode: str,
) -> None:
    async with deployment(2, router_mode=mode) as (here, (one, two)):
        await write(
            here, *(events.WorkerRegistered(n, MODEL, "aggregated", 16, 0, 2) for n in (1, 2))
        )
        await announce(here, one, A)
        await write(here, events.BusyThresholdChanged(MODEL, None, 10, None))
        async with running(here, one, B, output_tokens=0, dp_rank=1):
            for _ in range(TRIES):
                asked = await ask(here, A, annotations=["query_instance_id:"], dp_rank=1)
                assert (asked.worker_id, asked.dp_rank) == (2, 1)
        assert (two.streams, one.streams[0].request.dp_rank) == ([], 1)


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "direct"])
async def test_a_rank_that_nobody_has_is_an_error_of_the_clients(mode: str) -> None:
    async with deployment(echo="x", router_mode=mode) as (here, _):
        await write(here, events.WorkerRegistered(2, MODEL, "aggregated", 16, 0, 2))
        for named in ({"dp_rank": 1}, {"headers": {"x-dp-rank": "1"}}):
            there = await ask(here, A, backend_instance_id=2, **named)
            assert (there.worker_id, there.dp_rank) == (2, 1)
            lacks = await ask(here, A, backend_instance_id=1, **named)
            assert (lacks.status, lacks.code) == (400, "unknown_rank")
            if mode == "direct":
                continue
            alone = await ask(here, A, **named)
            assert (alone.worker_id, alone.dp_rank) == (2, 1)
        nobody = await ask(here, A, dp_rank=7)
        expected = "worker_required" if mode == "direct" else "unknown_rank"
        assert (nobody.status, nobody.code) == (400, expected)


# --- what a worker costs --------------------------------------------------------------------------


async def test_the_weight_of_what_is_cached_against_load() -> None:
    """Worker 1 caches the prompt of 4 blocks and has 6 others active, worker 2 has nothing:
    0 * weight + 10 against 4 * weight + 4."""
    for weight, expected, other in ((1.0, 2, 1), (2.0, 1, 2)):
        async with deployment(router_kv_overlap_score_weight=weight) as (here, (one, _)):
            await announce(here, one, A)
            async with running(here, one, C):
                assert await where(here, A, 3) == {expected}
                override = {"overlap_score_weight": 3.0 - weight}
                assert await where(here, A, 3, router_config_override=override) == {other}


async def test_temperature_spreads_what_would_go_to_one() -> None:
    for temperature, expected in ((0.0, {1}), (5.0, {1, 2})):
        async with deployment(router_temperature=temperature) as (here, (one, _)):
            await announce(here, one, A)
            assert await where(here, A, TRIES) == expected
            override = {"router_temperature": 5.0 - temperature}
            other = {1, 2} if expected == {1} else {1}
            assert await where(here, A, TRIES, router_config_override=override) == other


async def test_cost_in_blocks_or_in_time() -> None:
    """To delay a request by decode steps that are longer costs more time than 16 ms of prefill."""
    cached = prompt(101, 64)
    for cost, unit, expected in (("blocks", "blocks", 1), ("time", "ms", 2)):
        async with deployment(router_cost=cost) as (here, (one, two)):
            await announce(here, one, cached)
            async with running(here, one, C):
                assert await where(here, cached, 3) == {expected}
                # A weight of its own is about the formula that has one.
                override = {"overlap_score_weight": 1.0}
                assert await where(here, cached, 3, router_config_override=override) == {1}
                one.echo = two.echo = "x"
                assert (await ask(here, cached)).worker_id == expected
            why = (await routed(here))[-1]
            assert (why.cost_unit, why.predicted_ms is None) == (unit, cost == "blocks")


async def test_active_blocks_count_if_they_are_tracked() -> None:
    for tracked, expected in ((True, {2}), (False, {1, 2})):
        async with deployment(router_track_active_blocks=tracked) as (here, (one, _)):
            async with running(here, one, C):
                assert await where(here, A, TRIES) == expected
                assert any(here.process.router.load().blocks) == tracked


async def test_a_shared_block_counts_once_if_reuse_is_assumed() -> None:
    """Two requests with one prompt of 6 blocks on worker 1, one of 8 blocks on worker 2."""
    for reuse, expected, other in ((True, 1, 2), (False, 2, 1)):
        override = {"assume_kv_reuse": not reuse}
        for given, to in ((None, expected), (override, other)):
            async with deployment(router_assume_kv_reuse=reuse) as (here, (one, two)):
                async with (
                    running(here, one, C, router_config_override=given),
                    running(here, one, C, router_config_override=given),
                    running(here, two, prompt(104, 8)),
                ):
                    assert await where(here, A, 3) == {to}


async def test_output_counts_while_it_grows_and_less_towards_its_end() -> None:
    """160 tokens, 10 blocks behind a prompt of 4 on worker 1; a prompt of 8 on worker 2."""
    for tracked, osl, expected in ((False, None, 1), (True, None, 2), (True, 240, 1)):
        hints = None if osl is None else {"osl": osl}
        async with deployment(router_track_output_blocks=tracked) as (here, (one, two)):
            async with (
                running(here, one, A, output_tokens=160, agent_hints=hints),
                running(here, two, prompt(104, 8)),
            ):
                assert await where(here, B, 3) == {expected}
                grown = [e for e in await here.recorded() if isinstance(e, events.OutputGrown)]
                assert len(grown) == 2 * tracked, "one fact for a frame, not one for a token"
                async with frontend(beside=here) as other:
                    await other.until_served()
                    await other.settle()
                    replicas = [each.process.replica.state for each in (here, other)]
                    assert replicas[0].digest() == replicas[1].digest()
                    assert replicas[0].active.blocks == replicas[1].active.blocks
