"""Parked requests over the in-memory log, with a clock that the test moves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from eventstore import codec, events
from eventstore.memory import MemoryLog
from eventstore.publisher import Publisher
from eventstore.subjects import request_producer, subject, worker_producer
from router.decision import RoutedRequest, RouterOptions
from router.errors import AllWorkersBusy, NoWorkers, QueueFull, QueueTimeout, RouterError
from router.queue import QueuePolicy
from router.replica import Replica
from router.router import Router
from router.selection import RouterMode
from router.ticket import Ticket, Timings, Waiting
from tests.waiting import eventually

BLOCK_SIZE = 4
WAIT_MAX_S = 60.0
PATIENCE_S = 15.0


class Waiter:
    """A request and what became of its wait."""

    def __init__(self, router: Router, request: RoutedRequest) -> None:
        self.request = request
        self.ticket: Ticket = router.accept(request)
        self.waited_s: float | None = None
        self.error: RouterError | None = None
        self.is_parked = self.ticket.route(Waiting(self._released, self._refused)) is None

    def _released(self, timings: Timings) -> None:
        assert self.waited_s is None and self.error is None, "told once"
        self.waited_s = timings.queued_s

    def _refused(self, error: RouterError) -> None:
        assert self.waited_s is None and self.error is None, "told once"
        self.error = error
        self.ticket.rejected("refused", 503)

    @property
    def is_waiting(self) -> bool:
        return self.is_parked and self.waited_s is None and self.error is None


class Lot:
    """A router with a queue, and its log. Times are seconds of `now_s`."""

    def __init__(self, **options: Any) -> None:
        self.now_s = 0.0
        self.log = MemoryLog(lambda: 0)
        self.publisher = Publisher(self.log, "test", request_producer(1), 1, linger_s=0)
        self.replica = Replica(
            self.log,
            lambda: 0,
            observe=lambda applied: self.router.observe(applied),
            restarted=lambda: self.router.state_restarted(),
        )
        chosen = {"mode": RouterMode.KV, "replica_sync": True, "queue_threshold": 0.0, **options}
        self.router = Router(
            replica=self.replica,
            publisher=self.publisher,
            options=RouterOptions(**chosen),
            frontend_id=1,
            rng=Random(5),
            clock=lambda: self.now_s,
            now_ns=lambda: 0,
        )
        self._asked = 0

    async def write(self, producer: str, event: events.AnyEvent) -> None:
        data = codec.encode(producer, 1, 0, [event])
        await self.log.append(subject("test", producer), data, msg_id=producer)

    async def add_worker(self, worker_id: int) -> None:
        registered = events.WorkerRegistered(worker_id, "m", "aggregated", BLOCK_SIZE)
        await self.write(worker_producer(worker_id), registered)
        await self.settle()
        self.router.serve(worker_id, "m")

    async def settle(self) -> None:
        await self.publisher.flush(5)
        end = (await self.log.extent()).last_seq
        await eventually(lambda: self.replica.state.cursor >= end)

    def ask(self, tokens: int = 40, **more: Any) -> Waiter:
        self._asked += 1
        request = RoutedRequest(
            request_id=f"r{self._asked}",
            model="m",
            endpoint="completions",
            isl=tokens,
            block_size=BLOCK_SIZE,
            sequence_hashes=[1000 * self._asked + block for block in range(tokens // BLOCK_SIZE)],
        )
        return Waiter(self.router, replace(request, **more))


@asynccontextmanager
async def lot(*worker_ids: int, **options: Any) -> AsyncIterator[Lot]:
    made = Lot(**options)
    async with made.publisher:
        running = asyncio.create_task(made.replica.run())
        await made.replica.wait_ready()
        for worker_id in worker_ids:
            await made.add_worker(worker_id)
        try:
            yield made
        finally:
            running.cancel()
            await asyncio.wait([running])
            await made.log.close()


async def test_room_that_nobody_has_noticed_yet_belongs_to_who_waits() -> None:
    """A worker came back a moment ago: a newcomer of equal key parks behind the others."""
    async with lot(1) as here:
        running, parked = here.ask(), here.ask()
        assert (running.is_parked, parked.is_parked) == (False, True)
        here.router.local.prefill_completed(running.request.request_id)  # and no release
        late, urgent = here.ask(), here.ask(priority=5.0)
        assert late.is_waiting and not urgent.is_parked, "a better key goes before"
        here.router.local.prefill_completed(urgent.request.request_id)
        here.router.release()
        assert (parked.is_waiting, late.is_waiting) == (False, True)


@pytest.mark.parametrize("sync", [True, False])
async def test_a_prefill_that_is_over_makes_room_before_the_log_tells(sync: bool) -> None:
    async with lot(1, replica_sync=sync) as here:
        running, parked, last = here.ask(), here.ask(), here.ask()
        await here.settle()
        here.now_s = 3.0
        running.ticket.prefill_completed(0)
        assert (parked.waited_s, last.is_waiting) == (3.0, True)
        await here.settle()
        parked.ticket.cancelled(0, "gone")
        assert not last.is_waiting
        last.ticket.completed(1, "stop", 0)
        running.ticket.completed(1, "stop", 0)
        await here.settle()
        assert list(here.router.load().prefill_tokens) == [0]
        assert not here.replica.state.requests and len(here.router.parking) == 0


async def test_a_reset_does_not_let_everybody_on() -> None:
    """Every replica forgets the load; who runs here is known here."""
    async with lot(1, 2) as here:
        running = [here.ask(), here.ask()]
        parked = here.ask()
        await here.settle()
        await here.write("control", events.StateReset("a test wants it"))
        await here.settle()
        assert not here.replica.state.requests
        assert parked.is_waiting
        for _ in range(2):
            here.router.reconcile()
        await here.settle()
        assert len(here.replica.state.requests) == 3
        assert here.router.overlay_bookings == 0, "the log counts them again"
        running[0].ticket.prefill_completed(0)
        assert not parked.is_waiting


async def test_busy_thresholds_do_not_turn_away_who_waits_already() -> None:
    async with lot(1) as here:
        running, parked = here.ask(), here.ask()
        changed = events.BusyThresholdChanged("m", None, 0, None)
        await here.write("threshold.m", changed)
        await here.settle()
        with pytest.raises(AllWorkersBusy):
            here.ask()
        assert parked.is_waiting
        running.ticket.prefill_completed(0)
        assert parked.waited_s == 0.0


async def test_waits_end_when_they_are_too_long_or_nobody_is_left() -> None:
    async with lot(1, queue_len_max=2) as here:
        here.ask()
        first = here.ask()
        here.now_s = WAIT_MAX_S / 2
        second = here.ask()
        with pytest.raises(QueueFull):
            here.ask()
        here.now_s = WAIT_MAX_S
        here.router.release()
        assert isinstance(first.error, QueueTimeout) and second.is_waiting
        here.router.withdraw(1)
        assert isinstance(second.error, NoWorkers)
        limits = {("m", "aggregated", "request_limit"): 1, ("m", "aggregated", "wait_limit"): 1}
        assert here.router.parking.refused == limits


async def test_impatience_is_paid_back_at_the_release() -> None:
    """Under wspt the long prompt that lost its patience goes; then short ones again, although
    another long one has lost its own."""
    async with lot(1, queue_policy=QueuePolicy.WSPT) as here:
        running = here.ask()
        longs = [here.ask(400), here.ask(400)]
        here.now_s = PATIENCE_S
        shorts = [here.ask(40) for _ in range(3)]
        order = []
        for _ in range(5):
            running.ticket.prefill_completed(0)
            (running,) = (
                each for each in (*longs, *shorts) if not each.is_waiting and each not in order
            )
            order.append(running)
        assert order == [longs[0], *shorts, longs[1]]


@pytest.mark.parametrize(
    "restriction", [{"worker_id": 1}, {"dp_rank": 0}, {"avoid": frozenset([2])}], ids=str
)
async def test_who_has_less_choice_than_others_does_not_wait(restriction: dict[str, Any]) -> None:
    """Else it would stand in the way of those who can go elsewhere."""
    async with lot(1, 2) as here:
        here.ask(), here.ask()
        assert here.ask().is_waiting
        assert not here.ask(**restriction).is_parked


async def test_who_ends_while_it_waits_is_forgotten() -> None:
    async with lot(1) as here:
        running = here.ask()
        leaving, staying = here.ask(), here.ask()
        leaving.ticket.cancelled(0, "client disconnected")
        assert len(here.router.parking) == 1
        running.ticket.failed(0, "worker_lost")
        assert staying.waited_s == 0.0
        await here.settle()
        assert leaving.is_waiting, "nobody told it anything"
        kinds = [codec.tag_of(event) for event in staying.ticket.facts()]
        assert kinds == ["request.routed"]
