"""Prefill and decode workers over real sockets: prompts handed over, asked for, and lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from eventstore.events import BlockStored, WorkerRegistered
from tests.integration.test_request_plane import (
    FAST,
    MODEL,
    SLOW,
    Caller,
    Plane,
    running,
)
from tests.waiting import eventually
from workers.protocol import Bootstrap, EngineRequest, StopConditions
from workers.sockets import parse_address
from workers.tcp_client import StreamHandle, WorkerClient

PROMPT = list(range(42))


def ask(
    client: WorkerClient,
    caller: Caller,
    *,
    prompt: list[int] | None = None,
    max_tokens: int = 10,
    bootstrap: Bootstrap | None = None,
    params: dict[str, Any] | None = None,
) -> StreamHandle:
    request = EngineRequest(
        request_id="r",
        model=MODEL,
        token_ids=PROMPT if prompt is None else prompt,
        stop_conditions=StopConditions(max_tokens=max_tokens),
        bootstrap=bootstrap,
        disaggregated_params=params,
    )
    return client.generate(request, caller.outputs.append, caller.losses.append)


def room(prefill: Plane, number: int = 2**64 - 1) -> Bootstrap:
    assert prefill.instance.bootstrap_address is not None
    return Bootstrap(*parse_address(prefill.instance.bootstrap_address), number)


class Pair:
    """A prefill worker and a decode worker, each with a frontend's client."""

    def __init__(self, prefill: Plane, decode: Plane) -> None:
        self.prefill, self.decode = prefill, decode

    async def connect(self) -> None:
        self.to_prefill = await self.prefill.client()
        self.to_decode = await self.decode.client()


@asynccontextmanager
async def pair(*, bootstrap_port: int | None = 0, wait_s: float = 5.0) -> AsyncIterator[Pair]:
    prefill = running(
        role="prefill", bootstrap_port=bootstrap_port, bootstrap_wait_s=wait_s, drain_s=0.1
    )
    decode = running(role="decode", bootstrap_wait_s=wait_s)
    async with prefill as one, decode as other:
        made = Pair(one, other)
        await made.connect()
        yield made


async def whole_answer() -> list[int]:
    """What one worker alone says."""
    caller = Caller()
    async with running() as plane:
        ask(await plane.client(), caller)
        await eventually(lambda: caller.done)
    return caller.tokens


async def failure(caller: Caller) -> str:
    """The message of its end, which must be a failed prefill."""
    await eventually(lambda: caller.done)
    error = caller.outputs[-1].error
    assert error is not None and error[0] == "prefill_failed", error
    assert not caller.losses and not caller.tokens
    return error[1]


async def test_the_awaited_flow() -> None:
    """Prefill, then decode with what the prefill worker said: the same answer as from one."""
    prompt, answer = Caller(), Caller()
    async with pair(bootstrap_port=None) as workers:
        assert workers.prefill.instance.bootstrap_address is None
        ask(workers.to_prefill, prompt, max_tokens=1)
        await eventually(lambda: prompt.done)
        [output] = prompt.outputs
        assert (len(output.token_ids), output.finish_reason) == (1, "length")
        params = {"worker_id": 1, "room": None, "blocks": 11, "tokens": 42}
        assert output.disaggregated_params == params
        ask(workers.to_decode, answer, params=output.disaggregated_params)
        await eventually(lambda: answer.done)
        await workers.prefill.stored(1)
        await workers.decode.stored(1)
    assert answer.tokens == await whole_answer()
    assert answer.outputs[-1].disaggregated_params is None
    told = [await plane.log.events() for plane in (workers.prefill, workers.decode)]
    kinds = [each.worker_type for one in told for each in one if isinstance(each, WorkerRegistered)]
    assert kinds == ["prefill", "decode"]
    theirs, ours = (next(each for each in one if isinstance(each, BlockStored)) for one in told)
    assert ours == theirs, "the decode worker announces the prompt, too"


@pytest.mark.parametrize("decode_first", [True, False])
async def test_the_bootstrap_flow(decode_first: bool) -> None:
    """Both at once, whoever comes first: the same answer as from one."""
    prompt, answer = Caller(), Caller()
    async with pair() as workers:
        at = room(workers.prefill)
        if decode_first:
            ask(workers.to_decode, answer, bootstrap=at)
            await eventually(lambda: waiting(workers.prefill) == 1)
            assert not answer.outputs
        ask(workers.to_prefill, prompt, max_tokens=1, bootstrap=at)
        await eventually(lambda: prompt.done)
        assert prompt.outputs[-1].disaggregated_params is not None
        assert prompt.outputs[-1].disaggregated_params["room"] == at.room
        if not decode_first:
            ask(workers.to_decode, answer, bootstrap=at)
        await eventually(lambda: answer.done)
    assert answer.tokens == await whole_answer()


async def test_many_prompts_at_once() -> None:
    prompts, answers = [Caller() for _ in range(50)], [Caller() for _ in range(50)]
    async with pair() as workers:
        for number in range(50):
            at = room(workers.prefill, number)
            prompt = [number % 7] * 30
            ask(workers.to_decode, answers[number], prompt=prompt, bootstrap=at)
            ask(workers.to_prefill, prompts[number], prompt=prompt, max_tokens=1, bootstrap=at)
        await eventually(lambda: all(one.done for one in answers + prompts))
    for number, answer in enumerate(answers):
        assert len(answer.tokens) == 10 and answer.tokens == answers[number % 7].tokens


async def test_either_serves_a_whole_request() -> None:
    callers = Caller(), Caller()
    async with pair() as workers:
        ask(workers.to_prefill, callers[0])
        ask(workers.to_decode, callers[1])
        await eventually(lambda: all(caller.done for caller in callers))
    assert callers[0].tokens == callers[1].tokens == await whole_answer()


async def test_a_prompt_that_is_refused_fails_its_decode() -> None:
    early, late, prompt, again = Caller(), Caller(), Caller(), Caller()
    async with pair() as workers:
        ask(workers.to_decode, early, bootstrap=room(workers.prefill, 1))
        await eventually(lambda: waiting(workers.prefill) == 1)
        ask(workers.to_prefill, prompt, prompt=[], bootstrap=room(workers.prefill, 1))
        assert "empty" in await failure(early)
        ask(workers.to_prefill, again, prompt=[], bootstrap=room(workers.prefill, 2))
        await eventually(lambda: again.done)
        ask(workers.to_decode, late, bootstrap=room(workers.prefill, 2))
        assert "empty" in await failure(late)


async def test_a_prompt_that_is_cancelled_fails_its_decode() -> None:
    prompt, answer = Caller(), Caller()
    async with (
        running(SLOW, role="prefill", bootstrap_port=0) as prefill,
        running(role="decode") as decode,
    ):
        ask(await decode.client(), answer, bootstrap=room(prefill))
        to_prefill = await prefill.client()
        handle = ask(to_prefill, prompt, prompt=[1] * 9000, max_tokens=1, bootstrap=room(prefill))
        await eventually(lambda: waiting(prefill) == prefill.engines[0].num_running == 1)
        handle.cancel()
        assert "cancelled" in await failure(answer)


async def test_a_prefill_worker_that_goes_away_fails_the_decode() -> None:
    answer = Caller()
    async with running(role="decode") as decode:
        async with running(role="prefill", bootstrap_port=0) as prefill:
            ask(await decode.client(), answer, bootstrap=room(prefill))
            await eventually(lambda: waiting(prefill) == 1)
        assert await failure(answer)
        nobody = Caller()
        ask(await decode.client(), nobody, bootstrap=room(prefill))
        assert "127.0.0.1" in await failure(nobody)


async def test_nobody_waits_for_ever() -> None:
    """Neither a decode worker for a prompt, nor a prompt for a decode worker."""
    answer, prompt, late = Caller(), Caller(), Caller()
    async with pair(wait_s=0.05) as workers:
        ask(workers.to_decode, answer, bootstrap=room(workers.prefill, 1))
        assert "within 0.05 s" in await failure(answer)
        ask(workers.to_prefill, prompt, max_tokens=1, bootstrap=room(workers.prefill, 2))
        await eventually(lambda: prompt.done)
        done_s = asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > done_s + 0.05)
        ask(workers.to_decode, late, bootstrap=room(workers.prefill, 2))
        assert "within 0.05 s" in await failure(late)


async def test_a_decode_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    answer, prompt, other = Caller(), Caller(), Caller()
    async with pair() as workers:
        at = room(workers.prefill)
        handle = ask(workers.to_decode, answer, bootstrap=at)
        await eventually(lambda: waiting(workers.prefill) == 1)
        workers.to_decode.audit()  # it is known there, so it is not lost
        ask(workers.to_decode, other)
        await eventually(lambda: other.done)
        assert not answer.losses
        handle.cancel()
        await eventually(lambda: waiting(workers.prefill) == 0)
        ask(workers.to_prefill, prompt, max_tokens=1, bootstrap=at)
        await eventually(lambda: prompt.done)
        assert workers.decode.engines[0].request_ids() == []
    assert not answer.outputs


async def test_the_end_of_a_decode_worker_ends_what_waits() -> None:
    answer = Caller()
    async with running(role="prefill", bootstrap_port=0) as prefill:
        async with running(role="decode", drain_s=0.05) as decode:
            client = await decode.client()
            ask(client, answer, bootstrap=room(prefill))
            await eventually(lambda: waiting(prefill) == 1)
            decode.worker.stop()
            await eventually(lambda: answer.done)
        error = answer.outputs[-1].error
        assert error is not None and error[0] == "shutting_down"
        await eventually(lambda: waiting(prefill) == 0)


async def test_no_more_wait_than_may() -> None:
    config = replace(FAST, max_num_waiting=2)
    callers = [Caller() for _ in range(3)]
    async with (
        running(role="prefill", bootstrap_port=0) as prefill,
        running(config, role="decode", drain_s=0.05) as decode,
    ):
        client = await decode.client()
        for number, caller in enumerate(callers):
            ask(client, caller, bootstrap=room(prefill, number))
        await eventually(lambda: callers[2].done)
        error = callers[2].outputs[-1].error
        assert error is not None and error[0] == "overloaded"
        assert not callers[0].outputs and not callers[1].outputs


def waiting(prefill: Plane) -> int:
    """Decode workers that wait for a prompt there."""
    server = prefill.worker.bootstrap
    assert server is not None
    return server.num_waiting
