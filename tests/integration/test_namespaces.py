"""--namespace-prefix: several namespaces, each with a log of its own, behind one frontend."""

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import pytest

from eventstore import codec, events
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.log import EventLog, Extent
from eventstore.stream import find_namespaces
from frontend import spaces
from router.busy import Thresholds
from tests.integration.harness import MODEL, Harness, ScriptedWorker, card, download, frontend
from tests.integration.mem_backings import MemBackings
from tests.integration.processes import MODEL as MOCK
from tests.integration.processes import child
from tests.waiting import eventually
from workers.card import ModelCard

OTHER = card(name="other", block_size=4)


@pytest.fixture
def backings() -> MemBackings:
    made = MemBackings(download)
    for name in ("team-a", "team-b", "elsewhere"):
        made.add(name)
    return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "LOOK_S", 0.02)


async def add(
    here: Harness, namespace: str, worker_id: int, model: ModelCard | None = None
) -> ScriptedWorker:
    """A worker that answers with its namespace, once it can be chosen."""
    worker = await here.add_worker(worker_id, namespace, model, namespace=namespace)
    name = (model or card()).name

    def chosen() -> bool:
        space = here.spaces.get(namespace)
        ranks = space.router.candidates(name).ranks if space is not None else []
        return any(rank.worker_id == worker_id for rank in ranks)

    await eventually(chosen)
    return worker


async def complete(here: Harness | str, model: str = MODEL, **headers: str) -> tuple[int, Any]:
    url = here if isinstance(here, str) else here.url
    body = {"model": model, "prompt": "hello there", "max_tokens": 4}
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body, headers=shown) as response,
    ):
        return response.status, await response.json()


async def answered_by(here: Harness, model: str = MODEL, **headers: str) -> str:
    status, answer = await complete(here, model, **headers)
    assert status == 200, answer
    text: str = answer["choices"][0]["text"]
    return text


async def get(here: Harness | str, path: str) -> tuple[int, Any]:
    url = here if isinstance(here, str) else here.url
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        text = await response.text()
        return response.status, text if path == "/metrics" else json.loads(text)


async def models_in(log: EventLog) -> list[str]:
    """Of the requests that the log tells of."""
    found = []
    async for record in log.read(1):
        batch = codec.decode(record.data).batch
        assert batch is not None
        found += [each.model for each in batch.events if isinstance(each, events.RequestAccepted)]
    return found


async def test_each_namespace_has_its_own_log_models_and_workers(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace_prefix="team-", namespace="elsewhere") as here:
        first = await add(here, "team-a", 1)
        second = await add(here, "team-b", 2, OTHER)
        await here.add_worker(3, "no", card(name="hidden"), namespace="elsewhere")
        _, listed = await get(here, "/v1/models")
        assert [model["id"] for model in listed["data"]] == ["other", MODEL]
        assert await answered_by(here) == "team-a"
        assert await answered_by(here, "other") == "team-b"
        assert (await complete(here, "hidden"))[0] == 404
        assert (len(first.streams), len(second.streams)) == (1, 1)
        for name, model in (("team-a", MODEL), ("team-b", "other")):
            space = here.spaces[name]
            await eventually(lambda space=space: not space.replica.state.requests)  # type: ignore[misc]
            await space.publisher.flush(5)
            assert await models_in(backings.namespaces[name].log) == [model]
        assert await models_in(backings.namespaces["elsewhere"].log) == []


async def test_health_and_metrics_tell_of_each(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        await answered_by(here)
        status, health = await get(here, "/health")
        assert (status, health["status"]) == (200, "healthy")
        assert [each["namespace"] for each in health["instances"]] == ["team-a"]
        assert health["namespaces"].keys() == {"team-a", "team-b"}
        one = health["namespaces"]["team-a"]
        assert (one["replica"]["phase"], one["models"], one["log"]["lag"]) == ("ready", [MODEL], 0)
        assert one["log"]["cursor"] == one["log"]["head"] == one["replica"]["cursor"] > 0
        _, metrics = await get(here, "/metrics")
        assert 'reckon_replica_ready{dynamo_namespace="team-a"} 1.0' in metrics
        assert 'reckon_replica_ready{dynamo_namespace="team-b"} 1.0' in metrics
        asked = 'dynamo_frontend_requests_total{dynamo_namespace="team-a",endpoint="completions"'
        assert asked in metrics
        assert metrics.count("# TYPE reckon_replica_cursor gauge") == 1
        assert (await complete(here, "nobody's"))[0] == 404
        _, metrics = await get(here, "/metrics")
        (line,) = [each for each in metrics.splitlines() if 'model="unknown_model"' in each][:1]
        assert "dynamo_namespace" not in line


async def test_without_a_prefix_nothing_is_labelled(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace="team-a") as here:
        _, health = await get(here, "/health")
        assert health["replica"]["phase"] == "ready" and "namespaces" not in health
        assert "dynamo_namespace" not in (await get(here, "/metrics"))[1]
        assert list(here.spaces) == ["team-a"]


async def test_a_namespace_that_appears_is_served_without_a_restart(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        assert (await complete(here))[0] == 404
        backings.add("team-c")
        await eventually(lambda: "team-c" in here.spaces)
        await add(here, "team-c", 7)
        assert await answered_by(here) == "team-c"
        assert (await get(here, "/health"))[1]["namespaces"]["team-c"]["replica"][
            "phase"
        ] == "ready"


async def test_none_at_all_is_no_reason_not_to_be_ready() -> None:
    backings = MemBackings(download)
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        status, health = await get(here, "/health")
        assert (status, health["status"], health["namespaces"]) == (200, "healthy", {})
        backings.add("team-a")
        await eventually(lambda: "team-a" in here.spaces)
        await add(here, "team-a", 1)
        assert await answered_by(here) == "team-a"


async def test_one_that_cannot_be_opened_is_named_and_tried_again(backings: MemBackings) -> None:
    backings.broken.add("team-b")
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        assert await answered_by(here) == "team-a"
        status, health = await get(here, "/health")
        assert (status, health["status"]) == (200, "degraded")
        assert health["why"] == "team-b: team-b is broken"
        unusable = {"phase": "unusable", "why": "team-b is broken"}
        assert health["namespaces"]["team-b"] == {"replica": unusable}
        backings.broken.clear()
        await eventually(lambda: "team-b" in here.spaces)
        await add(here, "team-b", 2, OTHER)
        assert await answered_by(here, "other") == "team-b"
        assert (await get(here, "/health"))[1]["status"] == "healthy"


async def test_there_is_a_bound(backings: MemBackings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "NAMESPACES_MAX", 1)
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        _, health = await get(here, "/health")
        assert list(here.spaces) == ["team-a"]
        assert health["namespaces"]["team-b"]["replica"]["why"] == "there are 1 already"


async def test_a_start_that_cannot_tell_which_there_are_fails(backings: MemBackings) -> None:
    backings.unreachable = True
    with pytest.raises(ExceptionGroup) as caught:
        async with frontend(backings=backings, namespace_prefix="t", nats_wait_secs=0.1):
            pass
    assert caught.value.subgroup(LogUnavailable) is not None


def hold(backings: MemBackings, namespace: str) -> None:
    """Nobody can follow its log, until `release`."""

    async def extent() -> Extent:
        raise LogUnavailable("out of reach")

    backings.namespaces[namespace].log.extent = extent  # type: ignore[method-assign]


def release(backings: MemBackings, namespace: str) -> None:
    del backings.namespaces[namespace].log.extent


async def test_a_start_waits_for_the_state_of_each_namespace(
    backings: MemBackings, free_port: int
) -> None:
    hold(backings, "team-b")
    url = f"http://127.0.0.1:{free_port}"

    async def is_starting() -> bool:
        try:
            status, health = await get(url, "/health")
        except aiohttp.ClientError:
            return False
        return bool((status, health["why"]) == (503, "team-b: out of reach"))

    async def let_go() -> None:
        await eventually(is_starting)
        release(backings, "team-b")

    letting_go = asyncio.create_task(let_go())
    async with frontend(backings=backings, namespace_prefix="team-", http_port=free_port) as here:
        await letting_go
        assert (await get(here, "/health"))[0] == 200


async def test_what_appears_later_does_not_take_readiness_away(backings: MemBackings) -> None:
    """All frontends would be out of their balancer at once."""
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        backings.add("team-c")
        hold(backings, "team-c")
        await eventually(lambda: "team-c" in here.spaces)
        await here.add_worker(2, "team-c", namespace="team-c")
        third = here.spaces["team-c"].service
        await eventually(lambda: bool(third.models.instances() and third.replica.status().why))
        await eventually(lambda: third.replica.status().why == "out of reach")
        status, health = await get(here, "/health")
        assert (status, health["status"]) == (200, "degraded")
        assert health["why"] == "team-c: out of reach"
        assert health["namespaces"]["team-c"]["replica"]["phase"] == "starting"
        assert {await answered_by(here) for _ in range(10)} == {"team-a"}
        release(backings, "team-c")
        await eventually(lambda: third.replica.is_ready)
        assert (await get(here, "/health"))[1]["status"] == "healthy"


# --- a model that several have --------------------------------------------------------------------


async def test_requests_for_a_model_of_two_are_shared_by_the_number_of_ranks(
    backings: MemBackings,
) -> None:
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        # Block sizes may differ: each request stays in one namespace.
        for worker_id in (2, 3, 4):
            await add(here, "team-b", worker_id, card(block_size=32))
        assert len((await get(here, "/v1/models"))[1]["data"]) == 1
        got = Counter([await answered_by(here) for _ in range(60)])
        assert 3 <= got["team-a"] <= 30 <= got["team-b"]
        assert {await answered_by(here, x_worker_instance_id="1") for _ in range(5)} == {"team-a"}
        assert {await answered_by(here, x_worker_instance_id="3") for _ in range(5)} == {"team-b"}
        for session in ("s1", "s2", "s3", "s4"):
            assert len({await answered_by(here, x_session_id=session) for _ in range(5)}) == 1
        assert (await complete(here, MODEL, x_worker_instance_id="9"))[0] == 400


async def test_when_the_workers_of_one_leave_the_other_has_it_all(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        await add(here, "team-b", 2)
        backings.namespaces["team-a"].discovery.expire(1)
        await eventually(lambda: not here.spaces["team-a"].router.has_workers(MODEL))
        assert {await answered_by(here) for _ in range(10)} == {"team-b"}


async def test_thresholds_are_set_in_every_namespace_that_has_the_model(
    backings: MemBackings,
) -> None:
    async with frontend(backings=backings, namespace_prefix="team-") as here:
        await add(here, "team-a", 1)
        await add(here, "team-b", 2)
        await add(here, "team-b", 3, OTHER)
        body = {"model": MODEL, "active_decode_blocks_threshold": 0.5}
        async with (
            aiohttp.ClientSession() as session,
            session.post(here.url + "/busy_threshold", json=body) as response,
        ):
            assert response.status == 200, await response.text()
        for space in here.spaces.values():
            setting = space.service.thresholds.get(MODEL)
            assert setting is not None and setting.thresholds == Thresholds(0.5, None, None)
        listed = (await get(here, "/busy_threshold"))[1]["thresholds"]
        assert [each["model"] for each in listed] == ["other", MODEL]
        assert listed[1]["active_decode_blocks_threshold"] == 0.5


async def test_one_name_is_for_one_model_in_all_namespaces(backings: MemBackings) -> None:
    async with frontend(backings=backings, namespace_prefix="team-", model_name="alias") as here:
        await here.add_worker(1, "team-a", namespace="team-a")
        await eventually(lambda: here.spaces["team-a"].router.has_workers("alias"))
        other = await here.add_worker(2, "team-b", OTHER, namespace="team-b")
        await eventually(lambda: other.refusals != [])
        assert "--model-name is for one model, which is tiny" in other.refusals[0].why
        assert {await answered_by(here, "alias") for _ in range(10)} == {"team-a"}
        backings.namespaces["team-a"].discovery.expire(1)
        await eventually(lambda: here.spaces["team-b"].router.has_workers("alias"))
        assert await answered_by(here, "alias") == "team-b"


# --- on NATS --------------------------------------------------------------------------------------


async def test_namespaces_are_found_on_the_server(nats: Nats, namespace: str) -> None:
    assert await find_namespaces(nats, namespace) == []
    logs = [await JetStreamLog.open(nats, f"{namespace}-{name}") for name in ("b", "a")]
    assert await find_namespaces(nats, namespace) == [f"{namespace}-a", f"{namespace}-b"]
    assert await find_namespaces(nats, f"{namespace}-b") == [f"{namespace}-b"]
    assert set(await find_namespaces(nats)) >= {f"{namespace}-a", f"{namespace}-b"}
    for log in logs:
        await log.close()


async def test_processes_with_a_prefix(nats_url: str, namespace: str) -> None:
    """Two namespaces at the start, a third later; a frontend of one beside them is as ever."""
    common = ("--nats-url", nats_url)

    def worker(name: str) -> Any:
        model = ("--model-name", f"{MOCK}-{name}", "--speedup-ratio", "100")
        return child("workers mock", *common, "--namespace", f"{namespace}-{name}", *model)

    http = ("--http-host", "127.0.0.1", "--http-port", "0")
    prefix = ("--namespace-prefix", f"{namespace}-")

    async def serves(url: str, names: str) -> bool:
        _, health = await get(url, "/health")
        return bool(health["models"] == [f"{MOCK}-{name}" for name in names])

    async with worker("a"), worker("b"), child("frontend", *common, *http, *prefix) as both:
        await eventually(lambda: serves(both.url, "ab"), 20)
        async with (
            worker("c"),
            child("frontend", *common, *http, "--namespace", f"{namespace}-c") as one,
        ):
            await eventually(lambda: serves(both.url, "abc"), 20)
            await eventually(lambda: serves(one.url, "c"), 20)
            async with asyncio.timeout(20):
                for name in "abc":
                    status, answer = await complete(both.url, f"{MOCK}-{name}")
                    assert (status, answer["model"]) == (200, f"{MOCK}-{name}")
            _, health = await get(both.url, "/health")
            assert health["namespaces"].keys() == {f"{namespace}-{name}" for name in "abc"}
            assert health["status"] == "healthy"
