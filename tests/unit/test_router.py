"""The router over the in-memory log: who is chosen, what is recorded, and what is counted when."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from eventstore import codec, events
from eventstore.memory import MemoryLog
from eventstore.publisher import Publisher
from eventstore.subjects import kv_producer, request_producer, subject, worker_producer
from router.decision import RoutedRequest, RouterOptions
from router.errors import (
    LogBacklogFull,
    NoWorkers,
    ReplicaNotReady,
    UnknownWorker,
    WorkerRequired,
)
from router.replica import Replica
from router.router import Router
from router.selection import RouterMode
from tests.waiting import eventually

NAMESPACE = "test"
BLOCK_SIZE = 4
CHAIN = [101, 102, 103, 104]


class Deployment:
    """One router, its replica and publisher, and a log that tests write to as workers would."""

    def __init__(self, log: MemoryLog, options: RouterOptions, frontend_id: int = 1) -> None:
        self.log = log
        self.publisher = Publisher(
            log, NAMESPACE, request_producer(frontend_id), 1, linger_s=0, events_max=100
        )
        self.replica = Replica(
            log,
            lambda: 0,
            observe=lambda applied: self.router.observe(applied),
            restarted=lambda: self.router.state_restarted(),
        )
        self.router = Router(
            replica=self.replica,
            publisher=self.publisher,
            options=options,
            frontend_id=frontend_id,
            rng=Random(5),
        )

    async def write(self, producer: str, *written: events.AnyEvent, first: int = 0) -> None:
        data = codec.encode(producer, 1, first, list(written))
        await self.log.append(subject(NAMESPACE, producer), data, msg_id=f"{producer}.{first}")

    async def add_worker(self, worker_id: int, blocks: list[int], dp_size: int = 1) -> None:
        registered = events.WorkerRegistered(worker_id, "m", "aggregated", BLOCK_SIZE, 0, dp_size)
        await self.write(worker_producer(worker_id), registered)
        if blocks:
            stored = events.BlockStored(worker_id, 0, None, blocks)
            await self.write(kv_producer(worker_id, 0), stored)
        self.router.serve(worker_id, "m")

    async def settle(self) -> None:
        """Until all that was published has come back."""
        await self.publisher.flush(5)
        end = (await self.log.extent()).last_seq
        await eventually(lambda: self.replica.state.cursor >= end)

    def request(
        self, request_id: str, hashes: list[int] = CHAIN, worker_id: int | None = None
    ) -> RoutedRequest:
        return RoutedRequest(
            request_id=request_id,
            model="m",
            endpoint="chat_completions",
            isl=len(hashes) * BLOCK_SIZE + 2,
            block_size=BLOCK_SIZE,
            sequence_hashes=hashes,
            worker_id=worker_id,
        )

    async def recorded(self) -> list[events.AnyEvent]:
        return [
            event
            async for record in self.log.read(1)
            for event in (codec.decode(record.data).batch or pytest.fail("unreadable")).events
        ]


@asynccontextmanager
async def deployment(
    mode: RouterMode = RouterMode.KV,
    *,
    sync: bool = True,
    log: MemoryLog | None = None,
    frontend_id: int = 1,
) -> AsyncIterator[Deployment]:
    options = RouterOptions(mode=mode, replica_sync=sync)
    made = Deployment(log or MemoryLog(lambda: 0), options, frontend_id)
    async with made.publisher:
        running = asyncio.create_task(made.replica.run())
        await made.replica.wait_ready()
        try:
            yield made
        finally:
            running.cancel()
            await asyncio.wait([running])
            await made.log.close()


async def test_kv_mode_goes_where_the_prefix_is_and_says_why() -> None:
    async with deployment() as here:
        await here.add_worker(7, CHAIN[:2])
        await here.add_worker(8, [])
        await here.settle()
        ticket = here.router.accept(here.request("a"))
        ticket.route()
        assert ticket.rank == (7, 0)
        routed = ticket.routed
        assert routed is not None
        assert (routed.overlap_blocks, routed.isl, routed.candidate_count) == (2, 18, 2)
        by_worker = {c.worker_id: c for c in routed.candidates}
        assert routed.candidates[0].worker_id == 7
        assert (by_worker[7].cost, by_worker[8].cost) == (6.5, 8.5)
        assert (by_worker[7].prefill_tokens, by_worker[8].prefill_tokens) == (10, 18)
        ticket.prefill_completed(8)
        ticket.completed(3, "stop", 8)
        await here.settle()
        kinds = [codec.tag_of(event) for event in await here.recorded()]
        assert kinds[-4:] == [
            "request.accepted",
            "request.routed",
            "request.prefill_completed",
            "request.completed",
        ]


@pytest.mark.parametrize("sync", [True, False])
async def test_own_decisions_count_before_their_echo_and_are_freed_once(sync: bool) -> None:
    """A burst spreads although the log has not told anything yet; afterwards nothing is left."""
    async with deployment(sync=sync) as here:
        for worker_id in (1, 2, 3, 4):
            await here.add_worker(worker_id, [])
        await here.settle()
        tickets = [
            here.router.accept(here.request(f"r{i}", [1000 * i + j for j in range(4)]))
            for i in range(4)
        ]
        for ticket in tickets:
            ticket.route()
        assert {t.rank for t in tickets} == {(w, 0) for w in (1, 2, 3, 4)}
        assert sum(here.router.load().prefill_tokens) == 4 * 18
        await here.settle()
        assert sum(here.router.load().prefill_tokens) == 4 * 18
        assert here.router.overlay_bookings == (0 if sync else 4)
        for ticket in tickets:
            ticket.prefill_completed(None)
        await here.settle()
        assert sum(here.router.load().prefill_tokens) == 0
        assert sum(here.router.load().blocks) == 16
        for ticket in tickets:
            ticket.cancelled(1, "client")
            ticket.failed(1, "late")
        await here.settle()
        here.replica.state.check()
        assert sum(here.router.load().blocks) == 0
        assert (here.router.overlay_bookings, here.router.live_requests) == (0, 0)
        assert not here.replica.state.requests
        recorded = await here.recorded()
        assert sum(isinstance(e, events.RequestCancelled) for e in recorded) == 4
        assert not any(isinstance(e, events.RequestFailed) for e in recorded)


async def test_sync_decides_whether_other_replicas_requests_count() -> None:
    log = MemoryLog(lambda: 0)
    async with (
        deployment(sync=True, log=log) as on,
        deployment(sync=False, log=log, frontend_id=2) as off,
    ):
        await on.add_worker(1, [])
        off.router.serve(1, "m")
        await on.settle()
        on.router.accept(on.request("a")).route()
        await on.settle()
        await off.settle()
        assert sum(on.router.load().prefill_tokens) == 18
        assert sum(off.router.load().prefill_tokens) == 0
        off.router.accept(off.request("b")).route()
        await off.settle()
        await on.settle()
        assert sum(on.router.load().prefill_tokens) == 36
        assert sum(off.router.load().prefill_tokens) == 18
        assert on.replica.state.digest() == off.replica.state.digest()


async def test_round_robin_takes_turns_over_all_ranks() -> None:
    async with deployment(RouterMode.ROUND_ROBIN) as here:
        await here.add_worker(1, [], dp_size=2)
        await here.add_worker(2, [])
        await here.settle()
        ranks = []
        for i in range(6):
            ticket = here.router.accept(here.request(f"r{i}"))
            ticket.route()
            ranks.append(ticket.rank)
        assert ranks[:3] == ranks[3:]
        assert set(ranks) == {(1, 0), (1, 1), (2, 0)}


async def test_random_mode_uses_every_worker() -> None:
    async with deployment(RouterMode.RANDOM) as here:
        await here.add_worker(1, CHAIN)
        await here.add_worker(2, [])
        await here.settle()
        seen = set()
        for i in range(20):
            ticket = here.router.accept(here.request(f"r{i}"))
            ticket.route()
            seen.add(ticket.rank)
            ticket.completed(1, "stop", None)
        assert seen == {(1, 0), (2, 0)}


async def test_direct_mode_needs_a_worker_and_kv_mode_obeys_one() -> None:
    async with deployment(RouterMode.DIRECT) as here:
        await here.add_worker(1, [])
        await here.settle()
        with pytest.raises(WorkerRequired):
            here.router.accept(here.request("a")).route()
        ticket = here.router.accept(here.request("b", worker_id=1))
        ticket.route()
        assert ticket.rank == (1, 0)
        with pytest.raises(UnknownWorker):
            here.router.accept(here.request("c", worker_id=9)).route()
    async with deployment() as here:
        await here.add_worker(1, CHAIN)
        await here.add_worker(2, [])
        await here.settle()
        ticket = here.router.accept(here.request("d", worker_id=2))
        ticket.route()
        assert ticket.rank == (2, 0)
        assert ticket.routed is not None and ticket.routed.mode == "direct"


async def test_a_worker_that_left_is_not_chosen_and_its_bookings_are_gone() -> None:
    async with deployment(sync=False) as here:
        await here.add_worker(1, CHAIN)
        await here.add_worker(2, [])
        await here.settle()
        ticket = here.router.accept(here.request("a"))
        ticket.route()
        assert ticket.rank == (1, 0)
        other = here.router.accept(here.request("b", worker_id=2))
        other.route()
        gone = events.WorkerRemoved(1, "lease_expired")
        await here.write(worker_producer(1), gone, first=1)
        await here.settle()
        assert here.router.overlay_bookings == 1
        assert sum(here.router.load().prefill_tokens) == 18
        again = here.router.accept(here.request("c"))
        again.route()
        assert again.rank == (2, 0)
        here.router.withdraw(2)
        with pytest.raises(NoWorkers):
            here.router.accept(here.request("d")).route()
        for each in (ticket, other, again):
            each.failed(0, "worker_lost")
        await here.settle()
        assert sum(here.router.load().blocks) == 0


async def test_nothing_is_accepted_before_the_log_is_read() -> None:
    here = Deployment(MemoryLog(lambda: 0), RouterOptions(mode=RouterMode.KV))
    with pytest.raises(ReplicaNotReady):
        here.router.accept(here.request("a"))
    assert here.publisher.buffered == 0


async def test_a_full_backlog_refuses_new_requests_and_still_takes_every_ending() -> None:
    """events_max 100 is room for 14 requests of 7 events each, with nothing acknowledged."""
    async with deployment() as here:
        await here.add_worker(1, [])
        await here.settle()
        tickets = []
        with pytest.raises(LogBacklogFull):
            for i in range(100):
                tickets.append(here.router.accept(here.request(f"r{i}")))
        assert len(tickets) >= 10
        for ticket in tickets:
            ticket.route()
            ticket.prefill_completed(None)
            ticket.completed(1, "stop", None)
        await here.settle()
        assert not here.replica.state.requests


async def test_after_a_reset_live_requests_are_announced_again() -> None:
    async with deployment() as here:
        await here.add_worker(1, CHAIN)
        await here.settle()
        prefilling, decoding = (here.router.accept(here.request(name)) for name in "ab")
        for ticket in (prefilling, decoding):
            ticket.route()
        decoding.prefill_completed(4)
        await here.settle()
        before = here.router.load()
        blocks = [list(before.prefill_tokens), list(before.blocks)]
        await here.write("control", events.StateReset("test"))
        await here.settle()
        assert not here.replica.state.requests
        here.router.reconcile()
        assert here.router.corrections == {}
        here.router.reconcile()
        assert here.router.corrections == {"announced": 2}
        after = here.router.load()
        assert [list(after.prefill_tokens), list(after.blocks)] == blocks
        await here.settle()
        assert here.router.overlay_bookings == 0
        after = here.router.load()
        assert [list(after.prefill_tokens), list(after.blocks)] == blocks
        for ticket in (prefilling, decoding):
            ticket.completed(3, "stop", None)
        await here.settle()
        assert not any(here.router.load().blocks)
        assert here.replica.state.anomalies.out_of_order == 0


async def test_a_request_that_ended_here_and_not_in_the_log_is_released_with_an_event() -> None:
    async with deployment() as here:
        await here.add_worker(1, [])
        lost = here.router.accepted(here.request("lost"))
        await here.write("request.other", lost)
        await here.settle()
        assert "lost" in here.replica.state.requests
        here.router.reconcile()
        here.router.reconcile()
        await here.settle()
        assert not here.replica.state.requests
        assert events.RequestFailed("lost", 0, "lost") in await here.recorded()
        here.router.reconcile()
        here.router.reconcile()
        assert here.router.corrections == {"released": 1}


async def test_nothing_is_corrected_while_all_is_well() -> None:
    async with deployment() as here:
        await here.add_worker(1, [])
        await here.settle()
        for index in range(20):
            ticket = here.router.accept(here.request(f"r{index}"))
            here.router.reconcile()
            ticket.route()
            if index % 3 == 0:
                await here.settle()
            here.router.reconcile()
            ticket.completed(1, "stop", None)
        await here.settle()
        assert here.router.corrections == {}
