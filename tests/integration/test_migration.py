"""Requests that lose their worker: one seamless answer, every hop in the log, and clear ends."""

import asyncio
from typing import Any

import pytest

from eventstore import events
from frontend import caretaker
from tests.integration.harness import TOKENIZER, Harness, ScriptedWorker, Stream, frontend
from tests.integration.mock_workers import MIGRATIONS, Answer, complete, metric, moves, of_type
from tests.waiting import eventually

PROMPT = list(range(500, 536))
"""Two blocks and four tokens."""
SAID = TOKENIZER.encode("one two three four", add_special_tokens=False)
WHOLE_OR_STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


async def add_workers(here: Harness, count: int) -> None:
    for index in range(count):
        await here.add_worker(1 + index)
    await here.until_served(aggregated=count)


def ask(here: Harness, **fields: Any) -> "asyncio.Task[Answer]":
    return asyncio.create_task(complete(here, PROMPT, **fields))


async def attempt(here: Harness, number: int) -> tuple[ScriptedWorker, Stream]:
    """Where attempt `number` of the only request goes; no worker gets two of them."""
    await eventually(lambda: sum(len(worker.streams) for worker in here.workers) == number + 1)
    (found,) = (each for each in here.workers if each.streams and not each.streams[0].forgotten)
    found.streams[0].forgotten = True
    return found, found.streams[0]


async def begun(here: Harness) -> None:
    """Output of the present attempt of the only request has come."""
    (ticket,) = here.process.router.tickets.values()
    await eventually(lambda: ticket.rank is not None and not ticket.is_prefilling)


async def lose(here: Harness, number: int, ids: list[int] | None = None) -> Stream:
    """The worker of that attempt dies, after these tokens."""
    _, stream = await attempt(here, number)
    if ids:
        stream.send(ids=ids)
        await begun(here)
    stream.connection.abort()
    return stream


# --- one seamless answer --------------------------------------------------------------------------


@WHOLE_OR_STREAM
async def test_a_worker_lost_in_the_middle(stream: bool) -> None:
    async with frontend(migration_limit=1, router_track_output_blocks=True) as here:
        await add_workers(here, 2)
        asked = ask(here, max_tokens=50, min_tokens=20, stream=stream)
        first, one = await attempt(here, 0)
        one.send(ids=SAID, cached=16)
        await begun(here)
        one.connection.abort()
        second, other = await attempt(here, 1)
        osl = len(SAID)
        assert second is not first
        assert other.request.token_ids == PROMPT + SAID
        assert other.request.stop_conditions.max_tokens == 50 - osl
        assert other.request.stop_conditions.min_tokens == 20 - osl
        other.send(" five", cached=32)
        other.send(" six", finish="length")
        answer = await asked
        assert (answer.status, answer.text) == (200, "one two three four five six")
        assert answer.usage["prompt_tokens"] == len(PROMPT)
        six = TOKENIZER.encode(" five six", add_special_tokens=False)
        assert answer.usage["completion_tokens"] == osl + len(six)
        assert answer.usage["prompt_tokens_details"] == {"cached_tokens": 16}
        assert answer.workers["decode_worker_id"] == second.worker_id
        assert answer.workers["prefill_worker_id"] == second.worker_id
        await here.assert_nothing_left()
        told = await of_type(
            here,
            events.RequestRouted,
            events.PrefillCompleted,
            events.RequestMigrated,
            events.RequestCompleted,
        )
        routed, began, moved, again, began_again, completed = told
        assert type(began) is type(began_again) is events.PrefillCompleted
        assert moved == events.RequestMigrated(routed.request_id, osl, "worker_lost")
        assert (routed.attempt, routed.isl, routed.max_tokens) == (0, len(PROMPT), 50)
        assert (again.attempt, again.isl, again.max_tokens) == (1, len(PROMPT) + osl, 50 - osl)
        assert again.sequence_hashes[:2] == routed.sequence_hashes
        assert completed.osl == osl + len(six)
        assert await metric(here, MIGRATIONS % "ongoing_request") == 1
        assert await metric(here, MIGRATIONS % "new_request") == 0


@WHOLE_OR_STREAM
async def test_a_worker_lost_before_the_first_token(stream: bool) -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here, max_tokens=50, stream=stream)
        await lose(here, 0)
        second, other = await attempt(here, 1)
        assert other.request.token_ids == PROMPT
        assert other.request.stop_conditions.max_tokens == 50
        other.send("all", finish="length")
        answer = await asked
        assert (answer.status, answer.text) == (200, "all")
        assert answer.workers["decode_worker_id"] == second.worker_id
        assert await moves(here) == [("decode", "worker_lost")]
        assert await metric(here, MIGRATIONS % "new_request") == 1
        await here.assert_nothing_left()


@pytest.mark.parametrize(
    ("code", "moves_on"),
    [
        ("overloaded", True),
        ("shutting_down", True),
        ("internal", False),
        ("invalid_request", False),
    ],
)
async def test_what_a_worker_says_decides_whether_the_request_moves_on(
    code: str, moves_on: bool
) -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here)
        _, stream = await attempt(here, 0)
        stream.send(error=(code, "secret"))
        if moves_on:
            (await attempt(here, 1))[1].send("fine", finish="stop")
            assert (await asked).text == "fine"
        else:
            assert (await asked).status == (500 if code == "internal" else 400)
            assert sum(len(worker.streams) for worker in here.workers) == 1
        await here.assert_nothing_left()


async def test_a_worker_that_forgets_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends without a finish, and without a word: comparing finds it."""
    monkeypatch.setattr(caretaker, "LOOK_S", 0.01)
    monkeypatch.setattr(caretaker, "AUDIT_LOOKS", 1)
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        for worker in here.workers:
            worker.running = lambda connection: [0]  # type: ignore[method-assign]
        asked = ask(here)
        first, stream = await attempt(here, 0)
        stream.send("begun")
        await begun(here)
        first.running = lambda connection: []  # type: ignore[method-assign]
        second, other = await attempt(here, 1)
        other.send(" and ended", finish="stop")
        answer = await asked
        assert answer.text == "begun and ended"
        assert answer.workers["decode_worker_id"] == second.worker_id != first.worker_id
        await here.assert_nothing_left()


@pytest.mark.parametrize("kind", ["first", "inter"])
async def test_a_late_worker_is_left(kind: str) -> None:
    limit: dict[str, Any] = {f"request_{kind}_token_timeout_secs": 0.1}
    async with frontend(migration_limit=1, **limit) as here:
        await add_workers(here, 2)
        asked = ask(here)
        _, stream = await attempt(here, 0)
        if kind == "inter":
            stream.send("begun")
        _, other = await attempt(here, 1)
        assert stream.cancelled
        other.send(" ended", finish="stop")
        assert (await asked).text == ("begun ended" if kind == "inter" else " ended")
        assert await moves(here) == [("decode", f"{kind}_token_timeout")]
        await here.assert_nothing_left()


async def test_a_lost_finish_needs_no_further_hop() -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here, max_tokens=len(SAID))
        await lose(here, 0, SAID)
        answer = await asked
        assert (answer.status, answer.text) == (200, "one two three four")
        assert answer.body["choices"][0]["finish_reason"] == "length"
        assert answer.usage["completion_tokens"] == len(SAID)
        assert sum(len(worker.streams) for worker in here.workers) == 1
        assert await moves(here) == []
        await here.assert_nothing_left()


async def test_a_stop_string_across_the_cut() -> None:
    """What is held back, because it may begin a stop string, is not lost with the worker."""
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here, stop=["two five"])
        await lose(here, 0, TOKENIZER.encode("one two", add_special_tokens=False))
        _, other = await attempt(here, 1)
        other.send(" five six")
        answer = await asked
        assert answer.text == "one "
        assert answer.body["choices"][0]["finish_reason"] == "stop"
        await eventually(lambda: other.cancelled)
        await here.assert_nothing_left()


async def test_a_client_that_leaves_between_two_attempts() -> None:
    async with frontend(migration_limit=3) as here:
        await add_workers(here, 3)
        asked = ask(here, stream=True)
        await lose(here, 0, SAID)
        _, other = await attempt(here, 1)
        asked.cancel()
        await asyncio.wait([asked])
        await eventually(lambda: other.cancelled)
        await here.assert_nothing_left()


# --- how it ends where it can't go on -------------------------------------------------------------


async def test_no_limit_means_no_migration() -> None:
    async with frontend() as here:
        await add_workers(here, 2)
        asked = ask(here)
        await lose(here, 0, SAID)
        assert (await asked).error["code"] == "worker_lost"
        assert await moves(here) == []
        assert await metric(here, MIGRATIONS % "ongoing_request") == 0
        await here.assert_nothing_left()


@pytest.mark.parametrize("workers", [2, 4], ids=["no worker left", "no attempt left"])
@WHOLE_OR_STREAM
async def test_the_original_error_before_the_first_byte(workers: int, stream: bool) -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, workers)
        asked = ask(here, stream=stream)
        await lose(here, 0)
        await lose(here, 1)
        answer = await asked
        assert (answer.status, answer.error["code"]) == (502, "worker_lost")
        await here.assert_nothing_left()
        (failed,) = await of_type(here, events.RequestFailed)
        assert (failed.code, failed.osl) == ("worker_lost", 0)


async def test_the_original_error_inside_the_stream() -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 3)
        asked = ask(here, stream=True)
        await lose(here, 0, SAID[:1])
        _, stream = await attempt(here, 1)
        stream.send(ids=SAID[1:])
        await begun(here)
        stream.send(error=("overloaded", "secret"))
        answer = await asked
        assert (answer.status, answer.text) == (200, "one two three four")
        assert answer.error["code"] == "overloaded"
        await here.assert_nothing_left()
        (failed,) = await of_type(here, events.RequestFailed)
        assert (failed.code, failed.osl) == ("overloaded", len(SAID))


async def test_where_nobody_takes_over_the_loss_is_the_error() -> None:
    """The other worker is there, but takes no more requests: that is not what ended this one."""
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here)
        first, stream = await attempt(here, 0)
        (other,) = (each for each in here.workers if each is not first)
        here.process.router.withdraw(other.worker_id)
        stream.connection.abort()
        assert (await asked).error["code"] == "worker_lost"
        assert await metric(here, MIGRATIONS % "new_request") == 0, "nobody to move on to"
        await here.assert_nothing_left()


async def test_a_named_worker_is_not_left() -> None:
    async with frontend(migration_limit=1) as here:
        await add_workers(here, 2)
        asked = ask(here, nvext={"backend_instance_id": 2})
        await lose(here, 0)
        assert (await asked).status == 502
        assert await moves(here) == []
        await here.assert_nothing_left()
