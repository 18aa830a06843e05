"""Prompts computed by one worker and answered by another: what clients get and the log says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from eventstore import events
from tests.integration.harness import MODEL, Harness, ScriptedWorker, card, frontend
from tests.integration.mock_workers import (
    ENGINE,
    RunningWorker,
    complete,
    health,
    mock_worker,
    of_type,
)
from tests.waiting import eventually
from workers.card import Instance
from workers.registry import record_registered

PROMPT = list(range(500, 580))
"""Five blocks."""


async def routed(here: Harness) -> list[events.RequestRouted]:
    return await of_type(here, events.RequestRouted)


# --- with mock workers ----------------------------------------------------------------------------


@asynccontextmanager
async def workers(
    here: Harness, *, prefill: int = 1, decode: int = 1, bootstrap: bool = False
) -> AsyncIterator[tuple[list[RunningWorker], list[RunningWorker]]]:
    async with AsyncExitStack() as stack:
        prefills = [
            await stack.enter_async_context(mock_worker(here, "prefill", bootstrap=bootstrap))
            for _ in range(prefill)
        ]
        decodes = [
            await stack.enter_async_context(mock_worker(here, "decode")) for _ in range(decode)
        ]
        await here.until_served(prefill=prefill, decode=decode)
        yield prefills, decodes


async def of_one_worker(*prompts: list[int], **fields: Any) -> list[str]:
    """What an aggregated worker answers."""
    async with frontend() as here, mock_worker(here):
        await here.until_served()
        return [(await complete(here, prompt, **fields)).text for prompt in prompts]


@pytest.mark.parametrize("bootstrap", [False, True], ids=["awaited", "bootstrap"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_two_workers_answer_as_one_does(bootstrap: bool, stream: bool) -> None:
    prompts = [PROMPT, PROMPT[:7], [*PROMPT, 7], list(range(3000, 3400))]
    expected = await of_one_worker(*prompts, max_tokens=20)
    async with frontend() as here, workers(here, bootstrap=bootstrap) as ([one], [other]):
        for prompt, text in zip(prompts, expected, strict=True):
            answer = await complete(here, prompt, max_tokens=20, stream=stream)
            assert (answer.status, answer.text) == (200, text)
            assert answer.usage["prompt_tokens"] == len(prompt)
            assert answer.workers == {
                "prefill_worker_id": one.worker_id,
                "prefill_dp_rank": 0,
                "decode_worker_id": other.worker_id,
                "decode_dp_rank": 0,
            }
        await here.assert_nothing_left()
        legs = (await routed(here))[:2]
        assert [(leg.role, leg.worker_id) for leg in legs] == [
            ("prefill", one.worker_id),
            ("decode", other.worker_id),
        ]
        # The prompt is prefill load there, and blocks of its own here.
        assert [leg.books_prefill for leg in legs] == [True, False]
        assert [leg.books_blocks for leg in legs] == [False, True]
        assert not legs[1].shares_blocks and legs[1].overlap_weight == 0
        ended = await of_type(here, events.PrefillHopEnded, events.RequestCompleted)
        assert [type(each) for each in ended] == [
            events.PrefillHopEnded,
            events.RequestCompleted,
        ] * len(prompts)
        assert {each.cause for each in ended[::2]} == {"done"}


async def test_many_at_once_leave_nothing() -> None:
    prompts = [[100 + number] * 40 for number in range(24)]
    expected = await of_one_worker(*prompts, max_tokens=12)
    async with frontend() as here, workers(here, prefill=2, decode=2, bootstrap=True) as (ps, ds):
        answers = await asyncio.gather(
            *(complete(here, prompt, max_tokens=12, stream=True) for prompt in prompts)
        )
        assert [answer.text for answer in answers] == expected
        used = {(a.workers["prefill_worker_id"], a.workers["decode_worker_id"]) for a in answers}
        assert {one for one, _ in used} == {each.worker_id for each in ps}
        assert {other for _, other in used} == {each.worker_id for each in ds}
        await here.assert_nothing_left()


async def test_the_prefill_worker_is_chosen_by_prefix() -> None:
    async with frontend() as here, workers(here, prefill=2) as (prefills, _):
        first = (await complete(here, PROMPT, max_tokens=2)).workers["prefill_worker_id"]
        tree = here.process.replica.state.tree
        await eventually(lambda: any(tree.blocks_of(rank) for rank in tree.ranks()))
        for tail in range(4):
            answer = await complete(here, [*PROMPT, tail], max_tokens=2)
            assert answer.workers["prefill_worker_id"] == first
            assert answer.usage["prompt_tokens_details"]["cached_tokens"] == len(PROMPT)
        assert first in {each.worker_id for each in prefills}


async def test_a_short_rest_of_a_prompt_stays_with_its_decode_worker() -> None:
    async with (
        frontend(conditional_disagg_isl=40, conditional_disagg_ratio=0.5) as here,
        workers(here) as ([one], [other]),
    ):

        async def prefilled_by(prompt: list[int]) -> int:
            answer = await complete(here, prompt, max_tokens=2)
            assert answer.workers["decode_worker_id"] == other.worker_id
            return answer.workers["prefill_worker_id"]

        assert await prefilled_by(PROMPT) == one.worker_id
        tree = here.process.replica.state.tree
        await eventually(lambda: all(tree.blocks_of(rank) == 5 for rank in tree.ranks()))
        assert await prefilled_by([*PROMPT, *range(30)]) == other.worker_id
        assert await prefilled_by([*PROMPT, *range(200, 245)]) == one.worker_id, "too many tokens"
        assert await prefilled_by([*PROMPT[:16], *[9] * 20]) == one.worker_id, "too large a share"
        short = [each for each in await routed(here) if each.role == "decode"][1]
        assert short.books_prefill and short.overlap_blocks == 5
        await here.assert_nothing_left()


async def test_a_busy_decode_worker_computes_no_prompts() -> None:
    slow = replace(ENGINE, speedup=0.1)
    async with (
        frontend(conditional_disagg_isl=40, router_queue_threshold=0.01) as here,
        mock_worker(here, "prefill") as one,
        mock_worker(here, "decode", engine=slow) as other,
    ):
        await here.until_served(prefill=1, decode=1)
        await complete(here, PROMPT, max_tokens=1)
        tree = here.process.replica.state.tree
        await eventually(lambda: all(tree.blocks_of(rank) == 5 for rank in tree.ranks()))
        headers = {"x-bypass-remote-prefill": "true"}
        busy = asyncio.create_task(
            complete(here, list(range(900, 2900)), max_tokens=1, headers=headers)
        )
        load = here.process.replica.state.active
        await eventually(lambda: max(load.prefill_tokens) == 2000)
        answer = await complete(here, PROMPT, max_tokens=1)
        assert answer.workers["prefill_worker_id"] == one.worker_id
        assert (await busy).workers["prefill_worker_id"] == other.worker_id
        answer = await complete(here, PROMPT, max_tokens=1)
        assert answer.workers["prefill_worker_id"] == other.worker_id


async def test_a_client_may_ask_for_one_worker() -> None:
    async with frontend() as here, workers(here) as ([one], [other]):
        headers = {"x-bypass-remote-prefill": "true"}
        answer = await complete(here, PROMPT, max_tokens=3, headers=headers)
        assert answer.workers["prefill_worker_id"] == other.worker_id
        answer = await complete(here, PROMPT, max_tokens=3)
        assert answer.workers["prefill_worker_id"] == one.worker_id


async def test_each_role_is_named_on_its_own() -> None:
    async with frontend() as here, workers(here, prefill=2, decode=2) as (prefills, decodes):
        for one in prefills:
            answer = await complete(
                here, PROMPT, max_tokens=2, nvext={"prefill_worker_id": one.worker_id}
            )
            assert answer.workers["prefill_worker_id"] == one.worker_id
        for other in decodes:
            headers = {"x-worker-instance-id": str(other.worker_id)}
            answer = await complete(here, PROMPT, max_tokens=2, headers=headers)
            assert answer.workers["decode_worker_id"] == other.worker_id
        swapped = (
            {"prefill_worker_id": decodes[0].worker_id},
            {"decode_worker_id": prefills[0].worker_id},
            {"prefill_worker_id": 77},
            {"decode_worker_id": 77},
        )
        before = len(await routed(here))
        for nvext in swapped:
            answer = await complete(here, PROMPT, nvext=nvext)
            assert (answer.status, answer.error["code"]) == (400, "unknown_worker")
            ((role, worker_id),) = nvext.items()
            assert f"worker {worker_id} " in answer.error["message"]
            assert f"as a {role.split('_')[0]} worker" in answer.error["message"]
        # An unknown decode worker is told before a prompt is computed for it.
        assert len(await routed(here)) == before
        await here.assert_nothing_left()


async def test_where_a_request_would_go() -> None:
    async with frontend() as here, workers(here) as ([one], [other]):
        answer = await complete(here, PROMPT, nvext={"annotations": ["query_instance_id"]})
        assert answer.workers["prefill_worker_id"] == one.worker_id
        assert answer.workers["decode_worker_id"] == other.worker_id
        assert not await routed(here)


# --- which roles are there ------------------------------------------------------------------------


async def refused(here: Harness, role: str) -> None:
    """The next request gets a 503 that names the missing role, and so does /health."""
    answer = await complete(here, PROMPT)
    assert (answer.status, answer.error["code"]) == (503, "no_workers")
    assert f"no {role} worker serves {MODEL}" in answer.error["message"]
    assert (await health(here))["not_ready"] == [{"model": MODEL, "missing_roles": [role]}]


async def test_a_model_is_ready_when_every_role_is_there() -> None:
    async with frontend() as here:
        async with mock_worker(here, "decode"):
            await here.until_served(decode=1)
            await refused(here, "prefill")
            async with mock_worker(here, "prefill"):
                await here.until_served(prefill=1)
                assert (await complete(here, PROMPT, max_tokens=2)).status == 200
                assert (await health(here))["not_ready"] == []
                await here.assert_nothing_left()
            await here.until_served(prefill=0)
            await refused(here, "prefill")
        async with mock_worker(here, "prefill"):
            await here.until_served(prefill=1, decode=0)
            await refused(here, "decode")
            async with mock_worker(here):
                await here.until_served(aggregated=1)
                assert (await complete(here, PROMPT, max_tokens=2)).status == 200
                assert (await health(here))["not_ready"] == []
                await here.assert_nothing_left()
        rejected = await of_type(here, events.RequestRejected)
        assert [each.status for each in rejected] == [503] * 3
        assert "no prefill worker" in rejected[0].reason


async def test_a_decode_worker_does_it_all_while_there_is_no_prefill_worker() -> None:
    [expected] = await of_one_worker(PROMPT, max_tokens=9)
    async with frontend(decode_fallback=True) as here, workers(here, prefill=0) as (_, [other]):
        answer = await complete(here, PROMPT, max_tokens=9)
        assert answer.text == expected
        assert answer.workers["prefill_worker_id"] == other.worker_id
        assert (await health(here))["not_ready"] == []
        async with mock_worker(here, "prefill") as one:
            await here.until_served(prefill=1)
            answer = await complete(here, PROMPT, max_tokens=9)
            assert answer.text == expected
            assert answer.workers["prefill_worker_id"] == one.worker_id
            await here.assert_nothing_left()


async def test_a_request_waits_for_a_role_that_is_listed_but_not_in_the_state_yet() -> None:
    async with frontend() as here, workers(here, prefill=0):
        worker = ScriptedWorker(21)
        here.workers.append(worker)
        port = await worker.server.start("127.0.0.1", 0)
        instance = Instance(
            worker_id=21,
            namespace="test",
            component="backend",
            endpoint="generate",
            address=f"127.0.0.1:{port}",
            card=card(worker_type="prefill"),
        )
        await here.discovery.register(instance, lambda cause: None)
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        await asyncio.wait([asked], timeout=0.1)  # it is refused at once, or it waits
        assert not asked.done()
        await record_registered(here.log, instance)
        (await worker.next()).send("x", finish="length", params={"tokens": len(PROMPT)})
        assert (await asked).workers["prefill_worker_id"] == 21
