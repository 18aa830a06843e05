"""/busy_threshold over HTTP, against thresholds that are kept in memory."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request

from eventstore.errors import LogUnavailable
from frontend import busy_threshold
from frontend.busy_threshold import PATH, BusyThresholdApi, Setting
from frontend.service import Limits
from router.busy import Thresholds
from tests.waiting import eventually

NO_ONE = {"since_seq": None, "since_time": None, "source": None}
T0_NS = 1_795_449_869_123_456_789


class MemoryBoard:
    """`go`: cleared, changes wait for it to be set, as they do for a log that does not answer."""

    def __init__(self) -> None:
        self.settings: dict[str, Setting] = {}
        self.seq = 40
        self.waiting = 0
        self.failure: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()

    def models(self) -> list[str]:
        return ["large", "tiny"]

    def get(self, model: str) -> Setting | None:
        return self.settings.get(model)

    async def change(self, model: str, new: Thresholds, source: str) -> int:
        self.waiting += 1
        await self.go.wait()
        self.waiting -= 1
        if self.failure is not None:
            raise self.failure
        self.seq += 1
        self.settings[model] = Setting(new, self.seq, T0_NS, source)
        return self.seq


Client = TestClient[Request, Application]


@pytest_asyncio.fixture
async def board() -> MemoryBoard:
    return MemoryBoard()


@pytest_asyncio.fixture
async def client(board: MemoryBoard) -> AsyncIterator[Client]:
    app = Application()
    app.add_routes(BusyThresholdApi(board, Limits(body_bytes_max=1024)).routes())
    async with TestClient(TestServer(app, host="127.0.0.1")) as made:
        yield made


def fields(
    model: str, decode: float | None = None, tokens: int | None = None, frac: float | None = None
) -> dict[str, Any]:
    return {
        "model": model,
        "active_decode_blocks_threshold": decode,
        "active_prefill_tokens_threshold": tokens,
        "active_prefill_tokens_threshold_frac": frac,
    }


async def post(client: Client, **body: object) -> tuple[int, Any]:
    async with client.post(PATH, json=body) as response:
        return response.status, await response.json()


async def delete(client: Client, **asked: Any) -> tuple[int, Any]:
    async with client.delete(PATH, **asked) as response:
        return response.status, await response.json()


async def listed(client: Client) -> list[dict[str, Any]]:
    async with client.get(PATH) as response:
        assert response.status == 200
        thresholds: list[dict[str, Any]] = (await response.json())["thresholds"]
        return thresholds


async def test_every_model_is_listed_with_what_is_set_and_since_when(
    client: Client, board: MemoryBoard
) -> None:
    assert await listed(client) == [fields("large") | NO_ONE, fields("tiny") | NO_ONE]
    assert await post(client, model="tiny", active_decode_blocks_threshold=0.5) == (
        200,
        fields("tiny", 0.5),
    )
    since = {
        "since_seq": 41,
        "since_time": "2026-11-23T16:04:29.123Z",
        "source": "POST /busy_threshold from 127.0.0.1",
    }
    assert await listed(client) == [fields("large") | NO_ONE, fields("tiny", 0.5) | since]


async def test_a_change_leaves_alone_what_it_does_not_name(client: Client) -> None:
    await post(client, model="tiny", active_decode_blocks_threshold=1)
    await post(client, model="tiny", active_prefill_tokens_threshold=0)
    answer = await post(client, model="tiny", active_prefill_tokens_threshold_frac=1.5)
    assert answer == (200, fields("tiny", 1.0, 0, 1.5))
    assert (await listed(client))[0] == fields("large") | NO_ONE


async def test_null_clears_one_and_delete_clears_all(client: Client) -> None:
    every = {
        "active_decode_blocks_threshold": 0.5,
        "active_prefill_tokens_threshold": 10000,
        "active_prefill_tokens_threshold_frac": 0,
    }
    await post(client, model="tiny", **every)
    answer = await post(client, model="tiny", active_prefill_tokens_threshold=None)
    assert answer == (200, fields("tiny", 0.5, None, 0.0))
    assert await delete(client, json={"model": "tiny"}) == (200, fields("tiny"))
    await post(client, model="tiny", **every)
    assert await delete(client, params={"model": "tiny"}) == (200, fields("tiny"))
    assert (await listed(client))[1]["source"] == "DELETE /busy_threshold from 127.0.0.1"


async def test_naming_no_threshold_reads_and_changes_nothing(
    client: Client, board: MemoryBoard
) -> None:
    await post(client, model="tiny", active_decode_blocks_threshold=0.5)
    assert await post(client, model="tiny") == (200, fields("tiny", 0.5))
    assert await post(client, model="unheard of") == (200, fields("unheard of"))
    assert board.seq == 41


async def test_a_model_that_is_not_there(client: Client) -> None:
    for answer in (
        await post(client, model="nope", active_decode_blocks_threshold=0.5),
        await post(client, model="nope", active_decode_blocks_threshold=None),
        await delete(client, params={"model": "nope"}),
        await delete(client, json={"model": "nope"}),
    ):
        status, body = answer
        assert status == 404
        assert set(body) == {"error"}
        assert body["error"].startswith("Model 'nope' not found.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("active_decode_blocks_threshold", 1.5),
        ("active_decode_blocks_threshold", -0.1),
        ("active_prefill_tokens_threshold", -1),
        ("active_prefill_tokens_threshold", 2**63),
        ("active_prefill_tokens_threshold", 10**500),
        ("active_prefill_tokens_threshold_frac", -1e-9),
    ],
)
async def test_a_value_out_of_range_is_named(
    client: Client, board: MemoryBoard, name: str, value: float
) -> None:
    status, body = await post(
        client, model="tiny", **{"active_prefill_tokens_threshold_frac": 1, name: value}
    )
    assert status == 400
    assert set(body) == {"error"}
    assert body["error"].startswith(f"{name} must be ")
    assert str(value)[:20] in body["error"] and len(body["error"]) < 300
    assert board.settings == {}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b'{"model": "tiny", "active_decode_blocks_threshold": "0.5"}', 422, "decode_blocks"),
        (b'{"model": "tiny", "active_prefill_tokens_threshold": 1.5}', 422, "prefill_tokens"),
        (b'{"model": "tiny", "active_prefill_tokens_threshold": true}', 422, "prefill_tokens"),
        (b'{"model": "tiny", "active_decode_blocks_threshold": 1e999}', 422, "decode_blocks"),
        (b'{"model": "tiny", "active_decode_block_threshold": 1}', 422, "decode_block_threshold"),
        (b'{"active_decode_blocks_threshold": 0.5}', 422, "model"),
        (b'{"model": 5}', 422, "model"),
        (b"[]", 422, "object"),
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b'{"model": "\xff"}', 400, "JSON"),
        (b'{"model": "tiny", "' + b"x" * 900 + b'": 1}', 422, "unknown field"),
        (b'{"model": "' + b"x" * 2000 + b'"}', 413, "1024"),
    ],
)
async def test_bodies_that_are_refused(
    client: Client, board: MemoryBoard, body: bytes, status: int, word: str
) -> None:
    headers = {"Content-Type": "application/json"}
    async with client.post(PATH, data=body, headers=headers) as response:
        assert response.status == status
        answer = await response.json()
    assert set(answer) == {"error"}
    assert word in answer["error"] and len(answer["error"]) < 500
    assert board.settings == {}


async def test_the_content_type_must_be_json(client: Client) -> None:
    body = b'{"model": "tiny"}'
    for method in ("POST", "DELETE"):
        for headers in ({}, {"Content-Type": "text/plain"}):
            async with client.request(
                method, PATH, data=body, headers=headers, skip_auto_headers=["Content-Type"]
            ) as response:
                assert response.status == 415
                assert set(await response.json()) == {"error"}


async def test_two_changes_at_once_both_last(client: Client, board: MemoryBoard) -> None:
    board.go.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(post(client, model="tiny", active_decode_blocks_threshold=0.5))
        tasks.create_task(post(client, model="tiny", active_prefill_tokens_threshold=9))
        await eventually(lambda: board.waiting > 0)
        for _ in range(3):  # by the time these are answered, the second change has come in too
            await post(client, model="tiny")
        board.go.set()
    assert await post(client, model="tiny") == (200, fields("tiny", 0.5, 9))


async def test_a_log_that_refuses_or_is_silent_is_told(
    client: Client, board: MemoryBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.failure = LogUnavailable("10.0.0.7:4222 refused")
    asked = {"model": "tiny", "active_decode_blocks_threshold": 0.5}
    async with client.post(PATH, json=asked) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        answer = await response.json()
    assert set(answer) == {"error"}
    assert "10.0.0.7" not in answer["error"]
    monkeypatch.setattr(busy_threshold, "CHANGE_S", 0.01)
    board.go.clear()
    status, answer = await post(client, **asked)
    assert status == 503
    assert set(answer) == {"error"}
    board.go.set()
    board.failure = None
    assert await post(client, **asked) == (200, fields("tiny", 0.5))
