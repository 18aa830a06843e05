"""The sender against a server that answers by script, over real HTTP."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from simulations.prompts import PromptMaker, Word
from simulations.report import Report
from simulations.send import NoModel, Sender, Unreachable, find_model
from simulations.trace import TraceRequest
from tests.integration.completions_stand_in import (
    DEADLINE_S,
    DONE,
    TOKEN,
    Script,
    StandIn,
    answer,
    answer_two,
    frame,
    refuse,
    serving,
    stream,
    trace,
)

WORDS = [Word(f" w{number}", number) for number in range(300)]


def sender(
    session: aiohttp.ClientSession,
    urls: list[str],
    requests: list[TraceRequest],
    *,
    inflight_max: int = 1000,
    timeout_s: float = DEADLINE_S,
) -> Sender:
    return Sender(
        session,
        requests,
        PromptMaker(WORDS, "tokens", seed=0),
        urls=urls,
        model="m",
        speedup=10.0,
        inflight_max=inflight_max,
        timeout_s=timeout_s,
        on_outcome=lambda _: None,
    )


async def run(script: Script, count: int, **options: object) -> tuple[StandIn, Report]:
    stand_in = StandIn(script)
    async with serving(stand_in) as session:
        sending = sender(session, [stand_in.url], trace(count), **options)  # type: ignore[arg-type]
        await sending.run()
    return stand_in, sending.report()


# --- what is sent ---------------------------------------------------------------------------------


async def test_requests_ask_for_the_recorded_tokens_with_the_recorded_prefixes() -> None:
    stand_in, _ = await run(answer, 3)
    first, second, third = sorted(stand_in.bodies, key=lambda body: body["prompt"][599])  # type: ignore[index]
    for body in (first, second, third):
        assert {key: value for key, value in body.items() if key != "prompt"} == {
            "model": "m",
            "max_tokens": 2,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "nvext": {"extra_fields": ["worker_id", "predicted_cached_tokens"]},
        }
        assert isinstance(body["prompt"], list) and len(body["prompt"]) == 600
    assert first["prompt"][:512] == second["prompt"][:512] == third["prompt"][:512]  # type: ignore[index]
    assert first["prompt"][512:] != second["prompt"][512:]  # type: ignore[index]


async def test_requests_go_round_all_urls() -> None:
    one, other = StandIn(answer), StandIn(answer)
    async with serving(one, other) as session:
        sending = sender(session, [one.url, other.url], trace(7))
        await sending.run()
        assert sending.report().requests_by_url == {one.url: 4, other.url: 3}
    assert (len(one.bodies), len(other.bodies)) == (4, 3)


async def test_requests_leave_at_their_times_in_order() -> None:
    stand_in = StandIn(answer)
    async with serving(stand_in) as session:
        sending = sender(session, [stand_in.url], trace(5, gap_ms=200), inflight_max=1)
        await sending.run()
    # Recorded over 800 ms and sent ten times as fast, so the last one leaves after 80 ms.
    assert sending.report().elapsed_s >= 0.079
    blocks = [body["prompt"][599] for body in stand_in.bodies]  # type: ignore[index]
    prompts = PromptMaker(WORDS, "tokens", seed=0)
    expected = [json.loads(prompts.prompt_json(r.hash_ids, 600))[599] for r in trace(5)]
    assert blocks == expected


async def test_a_request_does_not_wait_for_earlier_answers() -> None:
    async def answer_when_all_are_there(
        stand_in: StandIn, request: web.Request, body: dict[str, object]
    ) -> web.StreamResponse:
        await stand_in.until_arrived(50)
        return await answer(stand_in, request, body)

    _, report = await run(answer_when_all_are_there, 50)
    assert (report.requests, report.errors) == (50, 0)


async def test_open_requests_are_bounded() -> None:
    stand_in, report = await run(answer, 20, inflight_max=2)
    assert stand_in.open_max <= 2
    assert (report.requests, report.errors) == (20, 0)


# --- what is reported -----------------------------------------------------------------------------


async def test_the_report_adds_up_what_workers_and_router_say() -> None:
    _, report = await run(answer, 4)
    assert (report.requests, report.errors, report.unfinished) == (4, 0, 0)
    assert (report.prompt_tokens, report.output_tokens) == (2400, 8)
    assert (report.cached_share_reported, report.cached_share_predicted) == (0.5, 0.25)
    assert report.requests_by_worker == {"000000000000000a.1": 4}
    assert report.ttft_ms.p50 is not None and report.latency_ms.p50 is not None
    assert 0 < report.ttft_ms.p50 <= report.latency_ms.p50


async def break_off(_: StandIn, request: web.Request, body: object) -> web.StreamResponse:
    response = await stream(request, TOKEN)
    assert request.transport is not None
    request.transport.abort()
    return response


async def fail(_: StandIn, request: web.Request, body: object) -> web.StreamResponse:
    return await stream(request, TOKEN, frame({"error": {"code": "worker_lost"}}), DONE)


async def stop_early(_: StandIn, request: web.Request, body: object) -> web.StreamResponse:
    return await stream(request, TOKEN)


async def ramble(_: StandIn, request: web.Request, body: object) -> web.StreamResponse:
    return await stream(request, *[b"x" * 65536] * 17)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (refuse, "http_503_overloaded"),
        (break_off, "connection_lost"),
        (fail, "stream_worker_lost"),
        (stop_early, "cut_short"),
        (ramble, "unreadable"),
    ],
)
async def test_a_failed_request_is_counted_by_kind(script: Script, kind: str) -> None:
    _, report = await run(script, 2)
    assert (report.requests, report.errors) == (2, 2)
    assert report.errors_by_kind == {kind: 2}
    assert report.ttft_ms.p50 is None


async def test_a_request_without_an_answer_times_out() -> None:
    async def keep_silent(_: StandIn, request: web.Request, body: object) -> web.StreamResponse:
        response = await stream(request, TOKEN)
        await asyncio.Event().wait()
        return response

    _, report = await run(keep_silent, 1, timeout_s=0.05)
    assert report.errors_by_kind == {"timeout": 1}


async def test_a_url_where_nobody_listens_fails_its_requests_only(unused_tcp_port: int) -> None:
    stand_in = StandIn(answer)
    async with serving(stand_in) as session:
        urls = [stand_in.url, f"http://127.0.0.1:{unused_tcp_port}"]
        sending = sender(session, urls, trace(4))
        await sending.run()
    assert sending.report().errors_by_kind == {"cannot_connect": 2}


async def test_an_interrupted_run_reports_what_there_is() -> None:
    stand_in = StandIn(answer_two)
    async with serving(stand_in) as session:
        sending = sender(session, [stand_in.url], trace(10), inflight_max=1)
        running = asyncio.create_task(sending.run())
        await stand_in.until_arrived(3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    report = sending.report()
    assert (report.requests, report.errors, report.unfinished) == (2, 0, 8)


# --- which model ----------------------------------------------------------------------------------


async def test_the_model_is_the_first_that_is_listed_unless_named() -> None:
    stand_in = StandIn(answer, models=("one", "two"))
    async with serving(stand_in) as session:
        assert await find_model(session, [stand_in.url], None) == "one"
        assert await find_model(session, [stand_in.url], "two") == "two"


async def test_every_url_must_serve_the_model() -> None:
    one, other, none = (StandIn(answer, models=names) for names in (("a", "b"), ("b",), ()))
    async with serving(one, other, none) as session:
        with pytest.raises(NoModel, match="does not serve a; it serves b"):
            await find_model(session, [one.url, other.url], None)
        with pytest.raises(NoModel, match="serves no model"):
            await find_model(session, [none.url], None)


async def test_a_url_that_cannot_be_reached_is_named(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with aiohttp.ClientSession() as session:
        with pytest.raises(Unreachable, match=url):
            await find_model(session, [url], None)
