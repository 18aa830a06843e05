"""Sessions stay with their worker: over turns, frontends and restarts, and when it is gone."""

import time
from typing import Any

import pytest

from eventstore import events
from tests.integration.harness import MODEL, Harness, card, frontend
from tests.integration.routing import Answer, ask, prompt, routed, running, where, write
from tests.waiting import eventually

A = prompt(101, 4)
HEADER = {"x-dynamo-session-id": "s"}
TRIES = 40


async def serve(here: Harness, workers: int = 3) -> None:
    for number in range(1, workers + 1):
        await here.add_worker(number, "x")
    await reached(here, workers)
    await here.settle()


async def reached(here: Harness, workers: int) -> None:
    await eventually(lambda: len(here.process.router.candidates(MODEL).ranks) == workers)


async def turn(here: Harness, **more: Any) -> Answer:
    """One request of the session, and all that follows from it."""
    answer = await ask(here, A, headers=HEADER, **more)
    await here.settle()
    return answer


def sessions(mode: str = "soft", ttl_secs: float = 600.0, **more: object) -> dict[str, Any]:
    return {
        "router_mode": "random",
        "router_session_affinity_ttl_secs": ttl_secs,
        "router_session_affinity_mode": mode,
        **more,
    }


@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_a_session_stays_with_its_worker(mode: str) -> None:
    """However it is named, whatever the mode would do; other requests go anywhere."""
    async with frontend(**sessions(mode)) as here:
        await serve(here)
        home = (await turn(here)).worker_id
        assert await where(here, A, TRIES, headers=HEADER) == {home}
        assert await where(here, A, 5, headers={"x-session-id": "s"}) == {home}
        assert await where(here, A, 5, session_id="s") == {home}
        assert await where(here, A, TRIES) == {1, 2, 3}
        assert (await turn(here)).worker_id == home
        first, second = await routed(here)
        assert (first.mode, second.mode, second.candidate_count) == ("random", "session", 1)
        assert first.session == second.session == events.SessionBinding("s", 600_000)


async def test_without_the_option_a_session_is_a_word() -> None:
    async with frontend(router_mode="random") as here:
        await serve(here)
        await turn(here)
        assert await where(here, A, TRIES, headers=HEADER) == {1, 2, 3}


async def test_a_session_is_over_when_it_has_been_idle_for_its_time() -> None:
    """Also while nothing else is written into the log, whose time then stands still."""
    async with frontend(**sessions("hard", 0.001)) as here:
        await serve(here)
        await turn(here)
        last_ns = here.process.replica.state.time_ns
        await eventually(lambda: time.time_ns() > last_ns + 5_000_000)
        assert await where(here, A, TRIES, headers=HEADER) == {1, 2, 3}


async def test_a_session_is_one_over_frontends_and_restarts() -> None:
    async with frontend(**sessions()) as here:
        await serve(here)
        async with frontend(beside=here, **sessions()) as other:
            await reached(other, 3)
            home = (await turn(here)).worker_id
            await other.settle()
            assert await where(other, A, TRIES, headers=HEADER) == {home}
            digests = [each.process.replica.state.digest() for each in (here, other)]
            assert digests[0] == digests[1]
        async with frontend(beside=here, **sessions()) as restarted:
            await reached(restarted, 3)
            assert await where(restarted, A, TRIES, headers=HEADER) == {home}


@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_a_session_moves_when_its_worker_has_left(mode: str) -> None:
    async with frontend(**sessions(mode)) as here:
        await serve(here)
        home = (await turn(here)).worker_id
        assert home is not None
        here.discovery.expire(home)
        await eventually(lambda: home not in here.process.replica.state.workers)
        moved = await turn(here)
        assert moved.status == 200 and moved.worker_id not in (None, home)
        assert await where(here, A, TRIES, headers=HEADER) == {moved.worker_id}


@pytest.mark.parametrize("why", ["unreachable", "busy"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_while_its_worker_can_take_nothing(mode: str, why: str) -> None:
    """It lives: a hard session waits for it, by being told to come back; a soft one moves."""
    async with frontend(**sessions(mode)) as here:
        await serve(here)
        home = (await turn(here)).worker_id
        assert home is not None
        worker = here.workers[home - 1]
        if why == "unreachable":
            await worker.server.close()
            await reached(here, 2)
            answer = await turn(here)
        else:
            worker.echo = None
            async with running(here, worker, A, output_tokens=0):
                changed = events.BusyThresholdChanged(MODEL, None, 10, None)
                await write(here, changed)
                answer = await turn(here)
        assert home in here.process.replica.state.workers
        if mode == "hard":
            assert (answer.status, answer.code) == (503, "session_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
            rejected = [e for e in await here.recorded() if isinstance(e, events.RequestRejected)]
            assert [each.code for each in rejected] == ["session_unavailable"]
        else:
            assert answer.status == 200 and answer.worker_id != home
            assert await where(here, A, TRIES, headers=HEADER) == {answer.worker_id}


async def test_what_the_request_names_goes_before_its_session() -> None:
    async with frontend(**sessions("hard")) as here:
        await serve(here)
        for worker_id in (1, 2):
            assert (await turn(here, backend_instance_id=worker_id)).worker_id == worker_id
            assert await where(here, A, 5, headers=HEADER) == {worker_id}
        await write(here, events.WorkerRegistered(3, MODEL, "aggregated", 16, 0, 2))
        there = await turn(here, dp_rank=1)
        assert (there.status, there.worker_id, there.dp_rank) == (200, 3, 1)


@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_a_disaggregated_session_has_a_worker_for_each_role(mode: str) -> None:
    async with frontend(**sessions(mode)) as here:
        for number in range(1, 7):
            role = "prefill" if number <= 3 else "decode"
            await here.add_worker(number, "x", card(worker_type=role))
        router = here.process.router
        for role in ("prefill", "decode"):
            await eventually(lambda: len(router.candidates(MODEL, role).ranks) == 3)  # noqa: B023
        await here.settle()
        for _ in range(5):
            assert (await turn(here)).status == 200
        decisions = await routed(here)
        for role in ("prefill", "decode"):
            own = [each for each in decisions if each.role == role]
            assert len(own) == 5 and len({each.worker_id for each in own}) == 1
            assert {each.mode for each in own[1:]} == {"session"}


async def test_a_worker_removed_by_its_own_word_frees_its_sessions() -> None:
    async with frontend(**sessions("hard")) as here:
        await serve(here)
        home = (await turn(here)).worker_id
        assert home is not None
        await write(here, events.WorkerRemoved(home, "shutdown"))
        moved = await turn(here)
        assert moved.status == 200 and moved.worker_id != home
