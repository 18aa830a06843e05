"""Prefill and decode workers that fail, or are left, at every stage of a request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from eventstore import events
from tests.integration.harness import Harness, ScriptedWorker, Stream, card, frontend
from tests.integration.mock_workers import MIGRATIONS, complete, metric, moves, of_type
from tests.waiting import eventually

PROMPT = list(range(500, 580))
"""Five blocks."""
ANYWHERE = "127.0.0.1:9"
"""A bootstrap address at which scripted workers do not ask."""
HAND_OVERS = pytest.mark.parametrize("bootstrap", [False, True], ids=["awaited", "bootstrap"])


@asynccontextmanager
async def scripted(
    here: Harness, *, bootstrap: bool, prefill: int = 1, decode: int = 1
) -> AsyncIterator[tuple[list[ScriptedWorker], list[ScriptedWorker]]]:
    """Prefill workers with ids from 11 on, decode workers from 21 on."""
    at = ANYWHERE if bootstrap else None
    prefills = [
        await here.add_worker(11 + index, None, card(worker_type="prefill"), at)
        for index in range(prefill)
    ]
    decodes = [
        await here.add_worker(21 + index, None, card(worker_type="decode"))
        for index in range(decode)
    ]
    await here.until_served(prefill=prefill, decode=decode)
    yield prefills, decodes


def booked(here: Harness) -> tuple[int, int]:
    """Prefill tokens and blocks, over all ranks, as the log has them."""
    active = here.process.replica.state.active
    return sum(active.prefill_tokens), sum(active.blocks)


async def begun(
    here: Harness, prefill: ScriptedWorker, decode: ScriptedWorker, bootstrap: bool
) -> tuple[Stream, Stream]:
    """Both workers have the request, the prefill worker is done with it."""
    hop = await prefill.next()
    hop.send("x", finish="length", params={"tokens": len(PROMPT)})
    return hop, await decode.next()


@HAND_OVERS
async def test_both_bookings_are_in_the_log_while_they_hold(bootstrap: bool) -> None:
    async with frontend() as here, scripted(here, bootstrap=bootstrap) as ([one], [other]):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        hop = await one.next()
        tokens = len(PROMPT)
        assert (hop.request.stop_conditions.max_tokens, hop.request.token_ids) == (1, PROMPT)
        assert (hop.request.bootstrap is not None) == bootstrap
        await eventually(lambda: booked(here) == (tokens, 5 if bootstrap else 0))
        hop.send("x", finish="length", cached=16, params={"tokens": tokens, "secret": 1})
        stream = await other.next()
        assert stream.request.bootstrap == hop.request.bootstrap
        handed_over = None if bootstrap else {"tokens": tokens, "secret": 1}
        assert stream.request.disaggregated_params == handed_over
        assert stream.request.stop_conditions.max_tokens == 2
        await eventually(lambda: booked(here) == (0, 5))
        stream.send("ab", finish="length", cached=tokens)
        answer = await asked
        assert answer.text == "ab", "the prefill worker's token is not shown"
        # Of whoever computed the prompt.
        assert answer.usage["prompt_tokens_details"] == {"cached_tokens": 16}
        await here.assert_nothing_left()
        (ended,) = await of_type(here, events.PrefillHopEnded)
        assert ended.cached_tokens == 16 and ended.ttft_ms > 0


async def test_the_decode_worker_is_chosen_by_load_alone() -> None:
    """Not by a prompt that it is busy with already."""
    async with frontend() as here, scripted(here, bootstrap=True, decode=2) as ([one], decodes):
        asked = [asyncio.create_task(complete(here, PROMPT, max_tokens=2)) for _ in range(4)]
        await eventually(lambda: sum(len(each.streams) for each in decodes) == 4)
        assert [len(each.streams) for each in decodes] == [2, 2]
        for stream in one.streams + decodes[0].streams + decodes[1].streams:
            stream.send("x", finish="length")
        await asyncio.gather(*asked)
        await here.assert_nothing_left()


@HAND_OVERS
@pytest.mark.parametrize("stage", ["prefilling", "fetching", "decoding"])
async def test_an_abort_stops_both_and_releases_both(bootstrap: bool, stage: str) -> None:
    async with frontend() as here, scripted(here, bootstrap=bootstrap) as ([one], [other]):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=9, stream=True))
        hop = await one.next()
        if stage != "prefilling":
            hop, stream = await begun(here, one, other, bootstrap)
            if stage == "decoding":
                stream.send("some")
                await eventually(lambda: here.process.replica.state.requests != {})
        asked.cancel()
        await asyncio.wait([asked])
        open_streams = [hop] if stage == "prefilling" else []
        if stage != "prefilling" or bootstrap:
            open_streams.append(await other.next())
        for each in open_streams:
            await eventually(lambda each=each: each.cancelled)  # type: ignore[misc]
        await here.assert_nothing_left()
        assert len(await of_type(here, events.RequestCancelled)) == 1


PREFILL_FAILURES = pytest.mark.parametrize("failure", ["lost", "internal", "overloaded"])


def fail(stream: Stream, failure: str) -> None:
    if failure == "lost":
        stream.connection.abort()
    else:
        stream.send(error=(failure, "secret"))


@HAND_OVERS
@PREFILL_FAILURES
async def test_a_failed_prefill_fails_the_request(bootstrap: bool, failure: str) -> None:
    async with frontend() as here, scripted(here, bootstrap=bootstrap) as ([one], [other]):
        asked = asyncio.create_task(complete(here, PROMPT))
        fail(await one.next(), failure)
        answer = await asked
        expected = {"lost": (502, "worker_lost"), "internal": (500, "engine_error")}
        assert (answer.status, answer.error["code"]) == expected.get(failure, (503, "overloaded"))
        if bootstrap:
            stream = await other.next()
            await eventually(lambda: stream.cancelled)
        else:
            assert not other.streams
        await here.assert_nothing_left()


@HAND_OVERS
@PREFILL_FAILURES
async def test_a_failed_prefill_is_done_by_the_decode_worker(bootstrap: bool, failure: str) -> None:
    async with (
        frontend(decode_fallback=True) as here,
        scripted(here, bootstrap=bootstrap) as ([one], [other]),
    ):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        fail(await one.next(), failure)
        stream = await other.next(1 if bootstrap else 0)
        assert stream.request.bootstrap is None and stream.request.disaggregated_params is None
        assert stream.request.stop_conditions.max_tokens == 2
        await eventually(lambda: booked(here) == (len(PROMPT), 5))
        if bootstrap:
            await eventually(lambda: other.streams[0].cancelled)
        stream.send("ab", finish="length", cached=0)
        answer = await asked
        assert answer.text == "ab"
        assert answer.workers["prefill_worker_id"] == answer.workers["decode_worker_id"] == 21
        await here.assert_nothing_left()
        code = {"lost": "worker_lost", "internal": "engine_error"}.get(failure, failure)
        assert await moves(here) == [("hop", code)] + [("decode", code)] * bootstrap
        assert await metric(here, MIGRATIONS % "new_request") == 0


@HAND_OVERS
@PREFILL_FAILURES
async def test_a_failed_prefill_moves_on(bootstrap: bool, failure: str) -> None:
    async with (
        frontend(migration_limit=1) as here,
        scripted(here, bootstrap=bootstrap, prefill=2) as (prefills, [other]),
    ):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        await eventually(lambda: any(each.streams for each in prefills))
        first, second = sorted(prefills, key=lambda each: not each.streams)
        fail(first.streams[0], failure)
        (await second.next()).send("x", finish="length", params={})
        stream = await other.next(1 if bootstrap else 0)
        stream.send("ab", finish="length")
        answer = await asked
        assert answer.workers["prefill_worker_id"] == second.worker_id
        await here.assert_nothing_left()
        assert await metric(here, MIGRATIONS % "new_request") == 1


async def test_a_refused_prompt_is_refused_by_all() -> None:
    async with (
        frontend(decode_fallback=True, migration_limit=3) as here,
        scripted(here, bootstrap=False, prefill=2) as (prefills, [other]),
    ):
        asked = asyncio.create_task(complete(here, PROMPT))
        await eventually(lambda: any(each.streams for each in prefills))
        for each in prefills:
            for stream in each.streams:
                stream.send(error=("invalid_request", "secret"))
        assert (await asked).status == 400
        assert not other.streams
        await here.assert_nothing_left()


async def test_a_prompt_that_was_not_handed_over_is_the_prefill_workers_fault() -> None:
    async with (
        frontend(migration_limit=1) as here,
        scripted(here, bootstrap=True, prefill=2) as (prefills, [other]),
    ):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        (await other.next()).send(error=("prefill_failed", "the room is gone"))
        stream = await other.next(1)
        room = other.streams[0].request.bootstrap
        first, second = sorted(prefills, key=lambda each: each.streams[0].request.bootstrap != room)
        await eventually(lambda: first.streams[0].cancelled)
        second.streams[0].send("x", finish="length", params={})
        stream.send("ab", finish="length")
        assert (await asked).workers == {
            "prefill_worker_id": second.worker_id,
            "prefill_dp_rank": 0,
            "decode_worker_id": 21,
            "decode_dp_rank": 0,
        }
        assert await moves(here) == [
            ("hop", "prefill_failed"),
            ("decode", "prefill_failed"),
            ("hop", "done"),
        ]
        await here.assert_nothing_left()


@HAND_OVERS
async def test_a_decode_worker_that_dies_while_it_fetches_is_left(bootstrap: bool) -> None:
    async with (
        frontend(migration_limit=1) as here,
        scripted(here, bootstrap=bootstrap, decode=2) as ([one], decodes),
    ):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        (await one.next()).send("x", finish="length", params={"room": 1})
        await eventually(lambda: any(each.streams for each in decodes))
        first, second = sorted(decodes, key=lambda each: not each.streams)
        first.streams[0].connection.abort()
        (await one.next(1)).send("x", finish="length", params={"room": 2})
        (await second.next()).send("ab", finish="length")
        answer = await asked
        assert answer.workers["decode_worker_id"] == second.worker_id
        assert await moves(here) == [("hop", "done"), ("decode", "worker_lost"), ("hop", "done")]
        await here.assert_nothing_left()


async def test_a_prefill_worker_lost_after_the_hand_over_changes_nothing() -> None:
    """The decode worker's first token may be here before the word that the prompt is computed."""
    async with frontend() as here, scripted(here, bootstrap=True) as ([one], [other]):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2, stream=True))
        hop, stream = await one.next(), await other.next()
        stream.send("a")
        await eventually(lambda: booked(here)[0] == len(PROMPT))
        await here.settle()
        hop.connection.abort()
        await eventually(lambda: booked(here) == (0, 5))
        stream.send("b", finish="length")
        assert (await asked).text == "ab"
        await here.assert_nothing_left()


async def test_a_late_prefill_is_given_up() -> None:
    async with (
        frontend(decode_fallback=True, request_first_token_timeout_secs=0.05) as here,
        scripted(here, bootstrap=False) as ([one], [other]),
    ):
        asked = asyncio.create_task(complete(here, PROMPT, max_tokens=2))
        hop = await one.next()
        stream = await other.next()
        stream.send("ab", finish="length")
        assert (await asked).text == "ab" and hop.cancelled
        assert await moves(here) == [("hop", "first_token_timeout")]
        await here.assert_nothing_left()
