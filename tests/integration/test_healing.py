"""Deaths and disagreements between real processes: everything is back to the truth, with events."""

import asyncio
import os
import signal
from collections import Counter

import aiohttp

from eventstore import codec, events
from eventstore.server import EmbeddedServer
from eventstore.subjects import CONTROL_PRODUCER, subject
from tests.integration.log_audit import Answer, Ended
from tests.integration.processes import ask, deployment, stream
from tests.waiting import eventually
from workers.leases import LEASE_TTL_S


async def test_a_dead_frontends_bookings_are_released_once(nats_url: str, namespace: str) -> None:
    """SIGKILL with streams running; the other frontend records the end of its lease, one time."""
    async with deployment(nats_url, namespace) as here:
        await here.add_worker("--output-tokens-mean", "5000")
        dying = await here.add_frontend()
        watching = await here.add_frontend()
        await here.until_serving(1)
        async with aiohttp.ClientSession() as session:
            running = [
                asyncio.create_task(stream(session, dying.url, f"{i} " * 500, 4000))
                for i in range(4)
            ]
            await eventually(lambda: len(here.observer.state.requests) == 4)
            dying.signal(signal.SIGKILL)
            await asyncio.gather(*running)
        await here.until_quiet()
        removed = [e for e in await here.recorded() if isinstance(e, events.FrontendRemoved)]
        assert len(removed) == 1
        assert (await here.health(watching))["status"] == "healthy"
        assert await here.audit() == []


async def test_what_nobody_saw_die_is_found_by_the_next_frontend_that_starts(
    nats_url: str, namespace: str
) -> None:
    """All frontends are killed, and a worker whose lease ends while there is nobody to watch."""
    async with deployment(nats_url, namespace) as here:
        dying = await here.add_worker("--output-tokens-mean", "5000", "--lease-ttl-secs", "1")
        alone = await here.add_frontend()
        await here.until_serving(1)
        async with aiohttp.ClientSession() as session:
            running = asyncio.create_task(stream(session, alone.url, "word " * 500, 4000))
            await eventually(lambda: len(here.observer.state.requests) == 1)
            alone.signal(signal.SIGKILL)
            await running
        dying.signal(signal.SIGKILL)
        await here.add_worker("--speedup-ratio", "20")
        await here.add_frontend()
        await eventually(lambda: len(here.observer.state.workers) == 1, 40)
        await eventually(lambda: here.observer.applied[events.FrontendRemoved] == 1, 40)
        await here.until_quiet()
        assert here.observer.applied[events.WorkerRemoved] == 1
        assert await here.audit() == []


async def test_a_paused_frontend_comes_back_and_its_running_requests_count_again(
    nats_url: str, namespace: str
) -> None:
    async with deployment(nats_url, namespace) as here:
        await here.add_worker("--output-tokens-mean", "5000")
        paused = await here.add_frontend()
        await here.add_frontend()
        await here.until_serving(1)
        async with aiohttp.ClientSession() as session:
            running = asyncio.create_task(stream(session, paused.url, "word " * 500, 3500))
            await eventually(lambda: len(here.observer.state.requests) == 1)
            paused.signal(signal.SIGSTOP)
            await eventually(lambda: not here.observer.state.requests, 20)
            paused.signal(signal.SIGCONT)
            await eventually(lambda: len(here.observer.state.requests) == 1, 20)
            status, text = await running
            assert status == 200 and text.endswith("data: [DONE]\n\n")
        await here.until_quiet()
        removed = [e for e in await here.recorded() if isinstance(e, events.FrontendRemoved)]
        assert len(removed) == 1
        assert await here.audit() == []


async def test_a_server_that_was_paused_for_longer_than_a_lease(
    own_server: EmbeddedServer, namespace: str
) -> None:
    """Leases may end by its clock before anybody can renew them: everybody comes back, and a stream
    that runs does not notice."""
    async with deployment(own_server.url, namespace) as here:
        await here.add_worker("--output-tokens-mean", "5000")
        frontend = await here.add_frontend()
        await here.until_serving(1)
        async with aiohttp.ClientSession() as session:
            running = asyncio.create_task(stream(session, frontend.url, "word " * 500, 2000))
            await eventually(lambda: len(here.observer.state.requests) == 1)
            assert own_server.pid is not None
            os.kill(own_server.pid, signal.SIGSTOP)
            await asyncio.sleep(LEASE_TTL_S + 2)
            os.kill(own_server.pid, signal.SIGCONT)
            status, text = await running
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        await here.until_serving(1)
        await here.until_quiet()
        assert len(here.observer.state.workers) == 1
        # On a busy machine it may lose the lease of its new id too, while everybody comes back.
        assert here.observer.applied[events.WorkerRemoved] <= 4
        assert await here.audit() == []


async def test_a_reset_empties_every_replica_and_harms_nobody(
    nats_url: str, namespace: str
) -> None:
    """Requests run through it, caches are announced again, bookings come back and end."""
    async with deployment(nats_url, namespace) as here:
        await here.add_worker()
        await here.add_worker()
        frontends = [await here.add_frontend(), await here.add_frontend()]
        await here.until_serving(2)
        async with aiohttp.ClientSession() as session:
            url = frontends[0].url
            assert (await stream(session, url, "shared prefix " * 200, 4))[0] == 200
            await eventually(lambda: here.observer.state.tree.pair_count > 0)
            pairs = here.observer.state.tree.pair_count
            running = [
                asyncio.create_task(stream(session, f.url, f"{i} " * 300, 1200))
                for i, f in enumerate(frontends)
            ]
            await eventually(lambda: len(here.observer.state.requests) == 2)
            data = codec.encode(CONTROL_PRODUCER, 1, 0, [events.StateReset("test")])
            reset = await here.log.append(
                subject(namespace, CONTROL_PRODUCER), data, msg_id="reset.1"
            )
            await eventually(lambda: here.observer.state.cursor >= reset.seq)
            assert len(here.observer.state.workers) == 2
            await eventually(lambda: not here.observer.state.unbased, 20)
            assert here.observer.state.tree.pair_count >= pairs
            await eventually(lambda: len(here.observer.state.requests) == 2, 20)
            for status, text in await asyncio.gather(*running):
                assert (
                    status == 200 and text.endswith("data: [DONE]\n\n") and '"error":' not in text
                )
        await here.until_quiet()
        assert await here.audit() == []


async def test_a_frontend_that_resets_at_its_start_does_so_for_all(
    nats_url: str, namespace: str
) -> None:
    """--router-reset-states: one event, and everybody is back to the truth behind it."""
    async with deployment(nats_url, namespace) as here:
        await here.add_worker()
        first = await here.add_frontend()
        await here.until_serving(1)
        async with aiohttp.ClientSession() as session:
            await stream(session, first.url, "word " * 300, 4)
            await eventually(lambda: here.observer.state.tree.pair_count > 0)
            second = await here.add_frontend("--router-reset-states")
            await eventually(lambda: here.observer.applied[events.StateReset] == 1)
            await here.until_quiet()
            assert here.observer.state.tree.pair_count > 0
            for frontend in (first, second):
                assert (await stream(session, frontend.url, "word " * 300, 4))[0] == 200
        await here.until_quiet()
        assert await here.audit() == []


async def test_bookings_are_back_to_zero_after_aborts_and_kills(
    nats_url: str, namespace: str
) -> None:
    """Thousands of requests, a third given up, a frontend and a worker killed in between."""
    async with deployment(nats_url, namespace) as here:
        for _ in range(3):
            await here.add_worker("--speedup-ratio", "10", "--output-tokens-mean", "40")
        for _ in range(2):
            await here.add_frontend()
        await here.until_serving(3)
        answers: list[Answer] = []

        async with aiohttp.ClientSession() as session:
            gate = asyncio.Semaphore(40)

            async def one(index: int) -> None:
                async with gate:
                    frontend = here.frontends[index % len(here.frontends)]
                    prompt = f"prefix {index % 7} " * 60 + str(index)
                    patience_s = 0.1 if index % 3 == 0 else None
                    answers.append(
                        await ask(
                            session,
                            frontend,
                            prompt,
                            1000 + index,
                            streaming=True,
                            patience_s=patience_s,
                        )
                    )

            async with asyncio.TaskGroup() as tasks:
                for index in range(2400):
                    tasks.create_task(one(index))
                    if index == 800:
                        await asyncio.sleep(0.5)
                        here.workers[0].signal(signal.SIGKILL)
                    if index == 1600:
                        await asyncio.sleep(0.5)
                        here.frontends[1].signal(signal.SIGKILL)
        ended = Counter(answer.ended for answer in answers)
        assert ended[Ended.WHOLE] > 400 and ended[Ended.ABORTED] > 150, ended
        applied = here.observer.applied
        await eventually(lambda: applied[events.FrontendRemoved] > 0, 20)
        await eventually(lambda: applied[events.WorkerRemoved] > 0, 20)
        await here.until_quiet()
        assert await here.audit(answers) == []
        assert applied[events.FrontendRemoved] == applied[events.WorkerRemoved] == 1
