"""A request for a model whose files are on their way."""

import asyncio
from collections.abc import Mapping

import aiohttp

from tests.integration.harness import MODEL, NAMESPACE, download, frontend
from tests.integration.mem_backings import MemBackings


async def test_it_waits_for_them() -> None:
    asked, loaded = asyncio.Event(), asyncio.Event()

    async def slowly(files: Mapping[str, str]) -> Mapping[str, bytes]:
        asked.set()
        await loaded.wait()
        return await download(files)

    backings = MemBackings(slowly)
    backings.add(NAMESPACE)
    async with frontend(backings=backings) as here, aiohttp.ClientSession() as session:
        await here.add_worker(1, echo="here")
        await asked.wait()
        body = {"model": MODEL, "prompt": "where", "max_tokens": 4}

        async def answer() -> int:
            async with session.post(here.url + "/v1/completions", json=body) as response:
                return response.status

        waiting = asyncio.create_task(answer())
        await asyncio.sleep(0.2)  # time enough to be refused
        loaded.set()
        assert await waiting == 200
