"""A frontend whose facts the log does not take: it serves until their place is full."""

import aiohttp
import pytest

from eventstore.errors import LogUnavailable
from tests.integration.harness import MODEL, frontend
from tests.waiting import eventually

EVENTS_MAX = 40


async def test_requests_are_refused_at_the_bound_and_taken_when_the_log_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with frontend() as here, aiohttp.ClientSession() as session:
        await here.add_worker(1, echo="here")
        await here.until_served()
        await here.settle()
        publisher = here.process.publisher
        publisher.events_max = EVENTS_MAX

        async def ask() -> tuple[int, str | None, str]:
            body = {"model": MODEL, "prompt": "where", "max_tokens": 4}
            async with session.post(here.url + "/v1/completions", json=body) as answer:
                return answer.status, answer.headers.get("Retry-After"), await answer.text()

        async def refuse(*args: object, **options: object) -> object:
            raise LogUnavailable("away")

        with monkeypatch.context() as away:
            away.setattr(here.log, "append", refuse)
            statuses = [await ask() for _ in range(EVENTS_MAX)]
            taken = [status for status, _, _ in statuses if status == 200]
            assert 0 < len(taken) < EVENTS_MAX
            status, retry_after, text = statuses[-1]
            assert (status, retry_after) == (503, "2") and "log_unavailable" in text
            assert publisher.buffered <= EVENTS_MAX
        await eventually(lambda: publisher.buffered == 0)
        assert (await ask())[0] == 200
        await here.settle()
        assert here.process.replica.state.anomalies.duplicates == 0
        assert not here.process.replica.state.requests
