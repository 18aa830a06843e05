"""/openapi.json says what is served, answers are as it says, nothing that it allows is a 5xx."""

import asyncio
import importlib.util
import json
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from frontend import answers, docs_page
from frontend.openai_types import ChatRequest
from frontend.openapi import specification
from frontend.paths import Paths
from tests.integration.harness import MODEL, Harness, frontend

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi"}
FUZZ_S = 100.0
SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")


def references(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if "$ref" in content:
            yield content["$ref"]
        for value in content.values():
            yield from references(value)
    elif isinstance(content, list):
        for value in content:
            yield from references(value)


def spec(paths: Paths | None = None) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(specification(paths or Paths(), 529))
    return content


def test_it_is_whole() -> None:
    content = spec()
    assert content["openapi"] == "3.1.0"
    schemas = content["components"]["schemas"]
    used = {each.removeprefix("#/components/schemas/") for each in references(content)}
    assert used == set(schemas)
    chat = content["paths"]["/v1/chat/completions"]["post"]
    assert chat["operationId"] == "post_v1_chat_completions"
    assert {"200", "400", "404", "503", "529"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_requests_are_described_by_the_types_that_decode_them() -> None:
    described = spec()["components"]["schemas"]["ChatRequest"]
    assert set(described["properties"]) == {
        field.name for field in msgspec.structs.fields(ChatRequest)
    }
    assert described["required"] == ["model", "messages"]
    assert described["additionalProperties"] is False


def test_a_moved_endpoint_is_there_where_it_is() -> None:
    moved = spec(Paths(chat="/api/chat", models="/m"))["paths"]
    assert moved["/api/chat"]["post"]["operationId"] == "post_api_chat"
    assert "/m/{model}" in moved and "/v1/chat/completions" not in moved


def assert_described(content: Any, shape: Any) -> None:
    """All of it, down to every key, is of this shape."""
    known = msgspec.to_builtins(msgspec.convert(content, shape))

    def compare(given: Any, told: Any) -> None:
        if isinstance(given, dict):
            assert set(given) <= set(told), set(given) - set(told)
            for key, value in given.items():
                compare(value, told[key])
        elif isinstance(given, list):
            for one, other in zip(given, told, strict=True):
                compare(one, other)

    compare(content, known)


async def test_answers_are_as_described() -> None:
    async with frontend() as here, aiohttp.ClientSession(here.url) as session:
        await here.add_worker(1, echo="ok")
        await here.until_served()
        for path, shape in [
            ("/v1/models", answers.ModelList),
            (f"/v1/models/{MODEL}", answers.Model),
            ("/health", answers.Health),
            ("/live", answers.Live),
            ("/busy_threshold", answers.ThresholdList),
            ("/v1/models/nope", answers.Error),
            ("/nope", answers.Error),
        ]:
            async with session.get(path) as response:
                assert_described(await response.json(), shape)
        for path, body, shape in [
            ("/v1/chat/completions", CHAT, answers.ChatCompletion),
            ("/v1/completions", TEXT, answers.TextCompletion),
            ("/v1/completions", {}, answers.Error),
            ("/busy_threshold", {"model": MODEL}, answers.Thresholds),
            ("/busy_threshold", {"modell": MODEL}, answers.PlainError),
        ]:
            async with session.post(path, json=body) as response:
                assert_described(await response.json(), shape)
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        for path, body, shape in [
            ("/v1/chat/completions", CHAT, answers.ChatCompletionChunk),
            ("/v1/completions", TEXT, answers.TextCompletion),
        ]:
            async with session.post(path, json={**body, **more}) as response:
                frames = (await response.text()).strip().split("\n\n")
            assert frames.pop() == "data: [DONE]" and len(frames) > 1
            for frame in frames:
                assert_described(json.loads(frame.removeprefix("data: ")), shape)


async def test_it_is_served(here: Harness) -> None:
    async with aiohttp.ClientSession(here.url) as session, session.get("/openapi.json") as response:
        described = await response.json()
    assert described == json.loads(specification(Paths(), 503))


@pytest.fixture
async def here() -> Any:
    async with frontend() as harness:
        await harness.add_worker(1, echo="ok")
        await harness.until_served()
        yield harness


async def test_the_docs_come_from_this_server_alone(
    here: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = tmp_path / "swagger_ui" / "static"
    static.mkdir(parents=True)
    (static.parent / "__init__.py").write_text("raise AssertionError('imported')")
    for name in (*SWAGGER_FILES, "secret"):
        (static / name).write_text(f"/* {name} */")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swagger_ui", raising=False)
    docs_page._static_folder.cache_clear()
    try:
        async with aiohttp.ClientSession(here.url) as session:
            async with session.get("/docs", allow_redirects=False) as response:
                assert response.status == 303
            async with session.get("/docs") as response:
                assert (response.status, response.url.path) == (200, "/docs/")
                page = await response.text()
                assert "http" not in page.partition("<head>")[2]
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            for name in (*SWAGGER_FILES, "start.js"):
                assert name in page
                async with session.get(f"/docs/{name}") as response:
                    assert response.status == 200
            for name in ("secret", "..%2f__init__.py", "..%2fstatic%2fsecret"):
                async with session.get(f"/docs/{name}") as response:
                    assert response.status == 404
    finally:
        docs_page._static_folder.cache_clear()


async def test_docs_without_their_files_say_what_to_install(
    here: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs_page, "_static_folder", lambda: None)
    async with aiohttp.ClientSession(here.url) as session, session.get("/docs/") as response:
        assert response.status == 404
        assert "reckon[docs]" in (await response.json())["error"]["message"]


@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)
async def test_nothing_that_the_specification_allows_makes_a_5xx(
    here: Harness, tmp_path: Path
) -> None:
    """Each operation, with what its schema allows and with what it does not, for a model that is
    there."""
    content = json.loads(specification(Paths(), 503))
    for name in ("ChatRequest", "CompletionRequest", "ThresholdChange"):
        content["components"]["schemas"][name]["properties"]["model"] = {"const": MODEL}
    for path in content["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"const": MODEL}
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(content))
    checks = "not_a_server_error", "status_code_conformance", "content_type_conformance"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", here.url),
        *("--checks", ",".join((*checks, "response_schema_conformance"))),
        *("--max-examples", "40", "--phases", "coverage,fuzzing", "--seed", "1"),
        *("--generation-database", "none", "--no-color"),
        stdout=PIPE,
        stderr=STDOUT,
    )
    async with asyncio.timeout(FUZZ_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-8000:]
    await here.assert_nothing_left()
