"""Endpoints that were moved, and one model asked for by its id."""

import aiohttp
import pytest
from openai import AsyncOpenAI, NotFoundError

from tests.integration.harness import MODEL, card, frontend

MOVED = {
    "chat_path": "/api/chat",
    "completions_path": "/api/text",
    "models_path": "/api/list",
    "health_path": "/",
    "live_path": "/livez",
    "metrics_path": "/prometheus",
}


async def test_a_moved_endpoint_is_at_its_new_path_alone() -> None:
    async with frontend(**MOVED) as here:  # type: ignore[arg-type]
        await here.add_worker(1, echo="ok")
        await here.until_served()
        asked = {"model": MODEL}
        bodies = {
            "/api/chat": {**asked, "messages": [{"role": "user", "content": "hi"}]},
            "/api/text": {**asked, "prompt": "hi"},
        }
        async with aiohttp.ClientSession() as session:
            for path, body in bodies.items():
                async with session.post(here.url + path, json=body) as response:
                    assert response.status == 200, path
            for path in ("/api/list", f"/api/list/{MODEL}", "/", "/livez", "/prometheus"):
                async with session.get(here.url + path) as response:
                    assert response.status == 200, path
            for path in ("/v1/models", f"/v1/models/{MODEL}", "/health", "/live", "/metrics"):
                async with session.get(here.url + path) as response:
                    assert response.status == 404, path
            for path in ("/v1/chat/completions", "/v1/completions"):
                async with session.post(here.url + path, json={}) as response:
                    assert response.status == 404, path


async def test_a_model_is_found_by_its_id_slashes_and_all() -> None:
    async with frontend() as here:
        name = "org/Some Model:v1.5"
        await here.add_worker(1, model=card(name=name))
        await here.until_served(name)
        async with AsyncOpenAI(base_url=here.url + "/v1", api_key="none") as client:
            listed = [model async for model in await client.models.list()]
            assert await client.models.retrieve(name) == listed[0]
            with pytest.raises(NotFoundError) as caught:
                await client.models.retrieve("org")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
        async with aiohttp.ClientSession() as session:
            for path in ("/v1/models/org%2FSome%20Model:v1.5", "/v1/models/org/Some%20Model:v1.5"):
                async with session.get(here.url + path) as response:
                    assert (await response.json())["id"] == name
            async with session.get(here.url + "/v1/models/") as response:
                assert (response.status, response.content_type) == (404, "application/json")
