"""Pins and priorities as a frontend sends them and the log tells them, over real sockets."""

from msgspec.structs import replace

from eventstore.events import BlockStored, KvRebased, PrefixPinned
from tests.integration.test_request_plane import FAST, MODEL, Caller, Plane, ask, running
from tests.waiting import eventually
from workers.protocol import EngineRequest, StopConditions


async def pins(plane: Plane) -> list[PrefixPinned]:
    return [event for event in await plane.log.events() if isinstance(event, PrefixPinned)]


async def test_a_pin_is_recorded_after_its_blocks_and_again_with_every_announcement() -> None:
    async with running() as plane:
        client, caller = await plane.client(), Caller()
        ask(client, caller, list(range(42)), max_tokens=1)
        await eventually(lambda: caller.done)
        client.pin(0, list(range(42)), 600)

        async def told() -> bool:
            return bool(await pins(plane))

        await eventually(told)
        client.ask_to_announce(0, 1)

        async def told_again() -> bool:
            return len(await pins(plane)) == 2

        await eventually(told_again)
        plane.discovery.expire(1)

        async def told_by_another() -> bool:
            return len(await pins(plane)) == 3

        await eventually(told_by_another)
    events = await plane.log.events()
    (stored,) = (each for each in events if isinstance(each, BlockStored) and each.worker_id == 2)
    first, second, third = await pins(plane)
    assert first == PrefixPinned(1, 0, stored.sequence_hashes, 600)
    assert (second.worker_id, third.worker_id) == (1, 2)
    for again in (second, third):
        assert again.sequence_hashes == stored.sequence_hashes and 590 <= again.ttl_s <= 600
    order = [each for each in events if isinstance(each, KvRebased | BlockStored | PrefixPinned)]
    assert [type(each) for each in order] == [
        *(KvRebased, BlockStored, PrefixPinned),
        *(KvRebased, BlockStored, PrefixPinned) * 2,
    ]


async def test_a_pin_that_makes_no_sense_does_no_harm() -> None:
    async with running() as plane:
        client, caller = await plane.client(), Caller()
        ask(client, caller, list(range(40)), max_tokens=1)
        await eventually(lambda: caller.done)
        client.pin(1, list(range(40)), 600)  # there is no such rank
        client.pin(0, list(range(40)), 0)
        client.pin(0, [-1], 600)
        client.pin(0, [9, 9, 9, 9], 600)  # nothing of it is cached
        other = Caller()
        ask(client, other, list(range(40)), max_tokens=1)
        await eventually(lambda: other.done)
        assert plane.engines[0].pinned(0) == [] == await pins(plane)


async def test_the_more_urgent_goes_first() -> None:
    order: list[int] = []
    async with running(replace(FAST, max_num_seqs=1)) as plane:
        client = await plane.client()
        for priority in (0, 0, 1, 5):
            request = EngineRequest(
                request_id="r",
                model=MODEL,
                token_ids=[priority],
                priority=priority,
                stop_conditions=StopConditions(max_tokens=1),
            )
            sink = lambda output, priority=priority: order.append(priority)  # noqa: E731
            client.generate(request, sink, lambda lost: None)
        await eventually(lambda: len(order) == 4)
    # They come in one read, before the engine's first step.
    assert order == [5, 1, 0, 0]
