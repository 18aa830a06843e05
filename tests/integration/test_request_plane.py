"""A worker and its clients in one process: real sockets and engine; log and list in memory."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from eventstore.codec import decode
from eventstore.errors import LogUnavailable
from eventstore.events import BlockStored, KvRebased, WorkerRegistered, WorkerRemoved
from eventstore.log import Appended
from eventstore.memory import MemoryLog
from tests.waiting import eventually
from workers.card import Instance, ModelCard
from workers.clients import WorkerClients
from workers.discovery import Ending, MemDiscovery
from workers.engine import EngineConfig, MockEngine
from workers.errors import WorkerLost
from workers.protocol import EngineRequest, Output, StopConditions
from workers.service import MockWorker
from workers.tcp_client import StreamHandle, WorkerClient

MODEL = "m"
TEMPLATE = Instance(
    worker_id=0,
    namespace="n",
    component="backend",
    endpoint="generate",
    address="",
    card=ModelCard(name=MODEL, block_size=4, context_length=10_000, files={}),
)
FAST = EngineConfig(block_size=4, num_gpu_blocks=4_000, context_length=10_000, speedup=1000)
SLOW = EngineConfig(block_size=4, num_gpu_blocks=4_000, context_length=10_000, speedup=1)


class Log(MemoryLog):
    """A log that can be made unreachable."""

    def __init__(self) -> None:
        super().__init__(time.time_ns)
        self.reachable = True
        self.rewound = False
        """If set, the next KV batch is acknowledged as if all before it was lost."""

    async def append(
        self, subject: str, data: bytes, *, msg_id: str, expected_subject_seq: int | None = None
    ) -> Appended:
        if not self.reachable:
            raise LogUnavailable("unreachable")
        appended = await super().append(
            subject, data, msg_id=msg_id, expected_subject_seq=expected_subject_seq
        )
        if self.rewound and ".kv." in subject:
            self.rewound = False
            return Appended(1, False)
        return appended

    async def events(self) -> list[object]:
        found: list[object] = []
        async for record in self.read(1):
            batch = decode(record.data).batch
            assert batch is not None
            found += batch.events
        return found


class Plane:
    """One worker, and a frontend's clients that follow discovery."""

    def __init__(
        self,
        config: EngineConfig,
        ranks: int,
        drain_s: float,
        role: str,
        bootstrap_port: int | None,
        bootstrap_wait_s: float,
    ) -> None:
        self.log = Log()
        self.discovery = MemDiscovery()
        self.engines = [MockEngine(config, worker_id=0, dp_rank=rank) for rank in range(ranks)]
        ids = itertools.count(1)
        self.worker = MockWorker(
            replace(TEMPLATE, dp_size=ranks, card=replace(TEMPLATE.card, worker_type=role)),
            self.engines,
            self.log,
            self.discovery,
            new_id=lambda: next(ids),
            drain_s=drain_s,
            bootstrap_port=bootstrap_port,
            bootstrap_wait_s=bootstrap_wait_s,
        )
        self.instance = TEMPLATE
        """As it is registered first."""
        self.clients = WorkerClients(random.Random(0))
        self.endings: list[tuple[int, Ending]] = []

    async def client(self, worker_id: int = 1) -> WorkerClient:
        client = self.clients.get(worker_id)
        assert client is not None
        await client.ready()
        return client

    async def stored(self, worker_id: int) -> None:
        """Wait until the log has a block of this worker."""

        async def told() -> bool:
            return any(
                isinstance(event, BlockStored) and event.worker_id == worker_id
                for event in await self.log.events()
            )

        await eventually(told)

    def ended(self, instance: Instance, ending: Ending) -> None:
        self.endings.append((instance.worker_id, ending))
        self.clients.remove(instance, ending)


@asynccontextmanager
async def running(
    config: EngineConfig = FAST,
    *,
    ranks: int = 1,
    drain_s: float = 5.0,
    role: str = "aggregated",
    bootstrap_port: int | None = None,
    bootstrap_wait_s: float = 5.0,
) -> AsyncIterator[Plane]:
    plane = Plane(config, ranks, drain_s, role, bootstrap_port, bootstrap_wait_s)
    ready = asyncio.Event()

    def registered(instance: Instance) -> None:
        plane.instance = instance
        ready.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(plane.worker.run("127.0.0.1", 0, "127.0.0.1", registered))
        await ready.wait()
        await plane.discovery.watch(plane.clients.put, plane.ended)
        try:
            yield plane
        finally:
            plane.worker.stop()
    await plane.clients.close()
    for engine in plane.engines:
        engine.check()
        assert engine.active_blocks == 0, "a request left blocks behind"


class Caller:
    """One request as its frontend sees it."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.losses: list[WorkerLost] = []

    @property
    def done(self) -> bool:
        last = self.outputs[-1] if self.outputs else None
        return last is not None and (last.finish_reason is not None or last.error is not None)

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]


def ask(
    client: WorkerClient,
    caller: Caller,
    prompt: list[int],
    *,
    max_tokens: int = 10,
    model: str = MODEL,
    dp_rank: int = 0,
    request_id: str = "same for all",
) -> StreamHandle:
    request = EngineRequest(
        request_id=request_id,
        model=model,
        token_ids=prompt,
        dp_rank=dp_rank,
        stop_conditions=StopConditions(max_tokens=max_tokens),
    )
    return client.generate(request, caller.outputs.append, caller.losses.append)


async def test_many_requests_at_once() -> None:
    """Each gets its own tokens, whatever ids the frontend gave; equal prompts share the cache."""
    callers = [Caller() for _ in range(200)]
    async with running() as plane:
        client = await plane.client()
        for number, caller in enumerate(callers):
            ask(client, caller, [number % 10] * 40, max_tokens=1 + number % 20)
            if number == 9:  # all prompts: from here on they are cached
                await eventually(lambda: all(caller.done for caller in callers[:10]))
        await eventually(lambda: all(caller.done for caller in callers))
    for number, caller in enumerate(callers):
        assert len(caller.tokens) == 1 + number % 20
        assert caller.outputs[-1].finish_reason == "length"
    for prompt in range(10):
        alike = sorted((caller.tokens for caller in callers[prompt::10]), key=len)
        assert all(alike[-1][: len(tokens)] == tokens for tokens in alike)
    cached = [caller.outputs[0].cached_tokens for caller in callers]
    assert cached[10:] == [39] * 190


async def test_cached_tokens_are_told_once() -> None:
    first, second = Caller(), Caller()
    async with running() as plane:
        client = await plane.client()
        ask(client, first, list(range(40)))
        await eventually(lambda: first.done)
        ask(client, second, list(range(40)))
        await eventually(lambda: second.done)
    assert [output.cached_tokens for output in first.outputs] == [0] + [None] * 9
    assert [output.cached_tokens for output in second.outputs] == [39] + [None] * 9


async def test_a_cancel_frees_what_the_request_holds() -> None:
    caller = Caller()
    async with running(SLOW) as plane:
        client = await plane.client()
        handle = ask(client, caller, list(range(40)), max_tokens=5000)
        await eventually(lambda: len(caller.outputs) > 1)
        assert plane.engines[0].active_blocks > 0
        handle.cancel()
        await eventually(lambda: plane.engines[0].active_blocks == 0)
        count = len(caller.outputs)
        other = Caller()
        ask(client, other, [1, 2, 3], max_tokens=2)
        await eventually(lambda: other.done)
        assert len(caller.outputs) == count and not caller.losses


async def test_a_frontend_that_vanishes_frees_what_it_held() -> None:
    callers = [Caller() for _ in range(20)]
    async with running(SLOW) as plane:
        client = await plane.client()
        for number, caller in enumerate(callers):
            ask(client, caller, [number] * 40, max_tokens=5000)
        await eventually(lambda: plane.engines[0].num_running == 20)
        client.close()
        await eventually(lambda: plane.engines[0].active_blocks == 0)
    assert all(len(caller.losses) == 1 for caller in callers)


async def test_what_the_engine_refuses_is_an_error_of_that_stream_only() -> None:
    config = EngineConfig(
        block_size=4, num_gpu_blocks=4_000, context_length=100, max_num_seqs=1, max_num_waiting=1
    )
    async with running(config) as plane:
        client = await plane.client()
        refused = [Caller() for _ in range(5)]
        ask(client, refused[0], [])
        ask(client, refused[1], [1] * 200)
        ask(client, refused[2], [-1])
        ask(client, refused[3], [1], model="other")
        ask(client, refused[4], [1], dp_rank=1)
        await eventually(lambda: all(caller.done for caller in refused))
        for caller in refused:
            error = caller.outputs[-1].error
            assert error is not None and error[0] == "invalid_request"
        first = Caller()
        ask(client, first, [1], max_tokens=90)
        await eventually(lambda: bool(first.outputs))
        waiting, overloaded = Caller(), Caller()
        ask(client, waiting, [2], max_tokens=1)
        ask(client, overloaded, [3], max_tokens=1)
        await eventually(lambda: overloaded.done)
        error = overloaded.outputs[-1].error
        assert error is not None and error[0] == "overloaded"
        await eventually(lambda: first.done and waiting.done)
        assert waiting.outputs[-1].error is None


async def test_each_rank_has_its_own_cache() -> None:
    async with running(ranks=2) as plane:
        client = await plane.client()
        callers = [Caller() for _ in range(3)]
        for rank, caller in zip((0, 1, 1), callers, strict=True):
            ask(client, caller, list(range(40)), dp_rank=rank)
            await eventually(lambda caller=caller: caller.done)  # type: ignore[misc]
        assert [caller.outputs[0].cached_tokens for caller in callers] == [0, 0, 39]
        assert callers[0].tokens == callers[1].tokens == callers[2].tokens
    events = await plane.log.events()
    assert {event.dp_rank for event in events if isinstance(event, BlockStored)} == {0, 1}


async def test_the_log_has_the_workers_life_in_order() -> None:
    async with running() as plane:
        client, caller = await plane.client(), Caller()
        ask(client, caller, list(range(40)))
        await eventually(lambda: caller.done)
        await plane.stored(1)
    events = await plane.log.events()
    assert isinstance(events[0], WorkerRegistered) and events[0].worker_id == 1
    assert events[1] == KvRebased(1, 0, "started")
    assert isinstance(events[2], BlockStored) and events[2].worker_id == 1
    assert events.count(WorkerRemoved(1, "shutdown")) == 1
    assert plane.endings == [(1, Ending.DEREGISTERED)]


async def test_the_end_waits_for_what_runs_and_takes_nothing_new() -> None:
    caller = Caller()
    async with running(SLOW) as plane:
        client = await plane.client()
        ask(client, caller, [1, 2, 3], max_tokens=20)
        await eventually(lambda: bool(caller.outputs))
        plane.worker.stop()
        await eventually(lambda: plane.endings == [(1, Ending.DEREGISTERED)])
        assert not client.is_connected
        await eventually(lambda: caller.done)
        assert len(caller.tokens) == 20 and not caller.losses


async def test_what_runs_too_long_after_the_end_is_told() -> None:
    caller = Caller()
    async with running(SLOW, drain_s=0.1) as plane:
        client = await plane.client()
        ask(client, caller, [1, 2, 3], max_tokens=5000)
        await eventually(lambda: bool(caller.outputs))
        plane.worker.stop()
        await eventually(lambda: caller.done)
        error = caller.outputs[-1].error
        assert error is not None and error[0] == "shutting_down"
    assert not caller.losses


async def test_a_lost_lease_is_a_new_worker_with_the_same_cache_and_streams() -> None:
    """Nothing that runs is lost where the process lives on; the log tells both lives."""
    caller = Caller()
    async with running(SLOW) as plane:
        client = await plane.client()
        ask(client, caller, list(range(40)), max_tokens=300)
        await eventually(lambda: len(caller.outputs) > 5)
        # As after an outage: the new record is seen before the end of the old one.
        watch_end, plane.clients.remove = plane.clients.remove, lambda *_: None  # type: ignore[method-assign]
        plane.discovery.expire(1)
        await eventually(lambda: plane.clients.is_connected(2))
        plane.clients.remove = watch_end  # type: ignore[method-assign]
        plane.clients.remove(_named(1), Ending.EXPIRED)
        count = len(caller.outputs)
        await eventually(lambda: len(caller.outputs) > count)
        other = Caller()
        ask(await plane.client(2), other, list(range(40)))
        await eventually(lambda: other.done)
        assert other.outputs[0].cached_tokens == 39
        await eventually(lambda: caller.done)
    assert len(caller.tokens) == 300 and not caller.losses
    events = await plane.log.events()
    assert [event.worker_id for event in events if isinstance(event, WorkerRegistered)] == [1, 2]
    assert [event for event in events if isinstance(event, WorkerRemoved)] == [
        WorkerRemoved(1, "lease_expired"),
        WorkerRemoved(2, "shutdown"),
    ]
    rebased = events.index(KvRebased(2, 0, "started"))
    base = events[rebased + 1]
    assert isinstance(base, BlockStored) and base.parent_hash is None
    assert len(base.sequence_hashes) >= 10


async def test_a_lease_lost_while_the_log_is_away_is_taken_anew_later() -> None:
    async with running() as plane:
        plane.log.reachable = False
        plane.discovery.expire(1)
        await eventually(lambda: plane.endings == [(1, Ending.EXPIRED)])
        plane.log.reachable = True
        await eventually(lambda: plane.clients.is_connected(2))
    events = await plane.log.events()
    assert WorkerRemoved(2, "shutdown") in events


async def test_a_log_that_went_backwards_is_told_everything_again() -> None:
    async with running() as plane:
        client, first, second = await plane.client(), Caller(), Caller()
        ask(client, first, list(range(40)))
        await eventually(lambda: first.done)
        await plane.stored(1)
        plane.log.rewound = True
        ask(client, second, list(range(100, 140)))
        await eventually(lambda: second.done)
        await plane.stored(2)
        assert plane.endings == [(1, Ending.DEREGISTERED)]
    told = [
        event.sequence_hashes
        for event in await plane.log.events()
        if isinstance(event, BlockStored) and event.worker_id == 2
    ]
    assert sum(map(len, told)) >= 20


def _named(worker_id: int) -> Instance:
    return replace(TEMPLATE, worker_id=worker_id)
