"""A frontend that is killed and started again decides from the whole state, or not at all."""

import asyncio
import signal

import aiohttp

from eventstore import codec
from eventstore.events import RequestRouted
from eventstore.log import Record
from indexer.radix import WorkerRank
from router.fold import apply
from router.state import RouterState
from tests.integration.processes import Deployment, deployment, stream
from tests.waiting import eventually

DECISIONS = 25
"""Of the frontend that came back."""


def routed(record: Record) -> list[RequestRouted]:
    batch = codec.decode(record.data).batch
    return [event for event in batch.events if isinstance(event, RequestRouted)] if batch else []


async def test_no_decision_without_the_state_and_no_ghost_placement(
    nats_url: str, namespace: str
) -> None:
    """Its first decision is made from no earlier record than the head at its start; and at the
    record that a decision names, the rank is registered and has just the blocks that were counted.
    """
    async with deployment(nats_url, namespace) as here:
        for _ in range(2):
            await here.add_worker("--speedup-ratio", "20")
        killed = await here.add_frontend()
        stays = await here.add_frontend()
        await here.until_serving(2)
        stop = asyncio.Event()
        urls = [stays.url]
        traffic = [asyncio.create_task(keep_asking(urls, stop, number)) for number in range(4)]
        await eventually(lambda: here.observer.applied[RequestRouted] >= DECISIONS, 60)
        killed.signal(signal.SIGKILL)
        await killed.process.wait()
        head = (await here.log.extent()).last_seq
        again = await here.add_frontend()
        urls.append(again.url)  # asked from its first moment, ready or not
        own = f".request.{await frontend_id(here, again.url)}"
        await eventually(lambda: again_decided(here, own), 60)
        stop.set()
        await asyncio.gather(*traffic)
        await here.until_quiet()
        records = await here.records()
    decisions = [(record, event) for record in records for event in routed(record)]
    first = next(event for record, event in decisions if record.subject.endswith(own))
    assert first.cursor >= head
    assert sum(event.overlap_blocks > 0 for _, event in decisions) >= DECISIONS
    state, left = RouterState(), iter(records)
    for event in sorted((event for _, event in decisions), key=lambda event: event.cursor):
        while state.cursor < event.cursor:
            apply(state, next(left))
        rank = WorkerRank(event.worker_id, event.dp_rank)
        assert state.is_registered(*rank), "sent to a worker that is not there"
        held = state.tree.find_matches(event.sequence_hashes).get(rank, 0)
        assert held == event.overlap_blocks


async def keep_asking(urls: list[str], stop: asyncio.Event, number: int) -> None:
    """Prompts that share their beginnings. A refusal is an answer, too."""
    async with aiohttp.ClientSession() as session:
        count = 0
        while not stop.is_set():
            for url in list(urls):
                count += 1
                await stream(session, url, f"{number} " * 300 + f"{count} ", 4)


async def frontend_id(here: Deployment, url: str) -> str:
    """As it stands in the subjects of the frontend's facts."""
    found: list[str] = []

    async def shown() -> bool:
        async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as page:
            for line in (await page.text()).splitlines():
                if line.startswith("dynamo_router_requests_total{"):
                    found.append(line.partition('router_id="')[2].partition('"')[0])
        return bool(found)

    await eventually(shown)
    return found[0]


async def again_decided(here: Deployment, own: str) -> bool:
    own_records = [record for record in await here.records() if record.subject.endswith(own)]
    return sum(len(routed(record)) for record in own_records) >= DECISIONS
