"""What docker-compose.yml starts, as plain processes: the same NATS configuration and commands.

Three NATS nodes with the deployment's own accounts; frontends, workers and a recorder, each with
the password of its kind. What the accounts allow has to be enough, and no more.
"""

import asyncio
import itertools
import json
import runpy
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from eventstore.access import Access
from eventstore.connect import Nats, NotPermitted
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.snapshots_nats import NatsSnapshots
from tests.integration.nats_nodes import NatsNode, free_ports
from tests.integration.processes import Child, child, stream
from tests.waiting import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
NODES = 3
REQUESTS = 20
"""To each frontend."""
WITHIN_S = 40.0

pytestmark = pytest.mark.timeout(120)


class Topology:
    """The running processes, and how to connect as one of the users."""

    def __init__(self, directory: Path) -> None:
        self._secrets = directory / "secrets"
        ports = free_ports(2 * NODES)
        routes = [f"127.0.0.1:{port}" for port in ports[NODES:]]
        make_secrets: Callable[..., None]
        make_secrets = runpy.run_path(str(DEPLOY / "make_secrets.py"))["make_secrets"]
        make_secrets(self._secrets, routes)
        config = directory / "config"
        shutil.copytree(DEPLOY / "nats", config)
        shutil.copytree(self._secrets / "nats", config / "secrets")
        self.nodes = [
            NatsNode(
                directory / f"node-{n}",
                ports[n],
                ("--config", str(config / "nats.conf")),
                {
                    "NATS_NAME": f"node-{n}",
                    "NATS_LISTEN": f"127.0.0.1:{ports[n]}",
                    "NATS_CLUSTER_LISTEN": routes[n],
                    "NATS_MONITOR": "127.0.0.1:-1",
                    "NATS_STORE": str(directory / f"node-{n}" / "store"),
                    "NATS_SYNC_INTERVAL": "120s",
                },
            )
            for n in range(NODES)
        ]
        self.urls = [node.url for node in self.nodes]
        self.frontends: list[Child] = []
        self.workers: list[Child] = []

    def options(self, user: str) -> tuple[str, ...]:
        return (
            *("--nats-url", ",".join(self.urls), "--nats-user", user),
            *("--nats-password-file", str(self._secrets / user / "password")),
            *("--nats-inbox-prefix", f"_INBOX_{user}"),
        )

    async def connect(self, user: str) -> Nats:
        access = Access(
            user=user,
            password_file=self._secrets / user / "password",
            inbox_prefix=f"_INBOX_{user}",
        )
        return await Nats.connect(self.urls, name="test", access=access, wait_s=WITHIN_S)

    def violations(self) -> list[str]:
        """What the nodes refused."""
        lines = itertools.chain.from_iterable(node.log.splitlines() for node in self.nodes)
        return [line for line in lines if "Violation" in line]


@pytest.fixture
async def topology(tmp_path: Path) -> AsyncIterator[Topology]:
    made = Topology(tmp_path)
    async with AsyncExitStack() as stack:
        for node in made.nodes:
            await stack.enter_async_context(node)
        wait = ("--nats-wait-secs", str(WITHIN_S))
        for _ in range(2):
            worker = child(
                *("workers mock", "--speedup-ratio", "20", "--lease-ttl-secs", "2"),
                *(*made.options("worker"), *wait),
            )
            made.workers.append(await stack.enter_async_context(worker))
            frontend = child(
                *("frontend", "--http-host", "127.0.0.1", "--http-port", "0"),
                *("--router-mode", "kv", "--router-replica-sync"),
                *("--router-snapshot-threshold", "20"),
                *(*made.options("frontend"), *wait),
            )
            made.frontends.append(await stack.enter_async_context(frontend))
        yield made


async def test_the_accounts_are_enough_and_no_more(topology: Topology) -> None:
    await requests_work(topology)
    await a_snapshot_is_taken(topology)
    await workers_end(topology)
    assert (await recorded(topology))["request.completed"] == REQUESTS * len(topology.frontends)
    assert topology.violations() == []
    await asyncio.gather(
        a_worker_writes_no_requests(topology),
        a_frontend_writes_no_caches(topology),
        a_recorder_writes_nothing(topology),
        nobody_hears_what_others_are_answered(topology),
        a_stranger_is_not_admitted(topology),
    )


async def requests_work(topology: Topology) -> None:
    async with aiohttp.ClientSession() as session:
        for frontend in topology.frontends:

            async def served(url: str = frontend.url) -> bool:
                async with session.get(url + "/v1/models") as response:
                    return bool((await response.json())["data"])

            async def caught_up(url: str = frontend.url) -> bool:
                async with session.get(url + "/health") as response:
                    return bool((await response.json())["replica"]["phase"] == "ready")

            await eventually(served, WITHIN_S)
            await eventually(caught_up, WITHIN_S)
            for number in range(REQUESTS):
                status, text = await stream(session, frontend.url, f"{number} " * 200, 4)
                assert (status, text.endswith("data: [DONE]\n\n")) == (200, True), text


async def a_snapshot_is_taken(topology: Topology) -> None:
    """By a frontend, with what its account allows: claim, object store, purge."""
    nats = await topology.connect("operator")
    snapshots = NatsSnapshots(nats, "dynamo")

    async def taken() -> bool:
        try:
            return bool(await snapshots.refs())
        except LogUnavailable:  # its store is just being made
            return False

    await eventually(taken, WITHIN_S)
    await nats.close()


async def workers_end(topology: Topology) -> None:
    """One in order, one without a word: then a frontend says so in its place."""
    for worker, how in zip(topology.workers, (signal.SIGTERM, signal.SIGKILL), strict=True):
        worker.signal(how)

    async def removed() -> bool:
        return (await recorded(topology))["worker.removed"] == 2

    await eventually(removed, WITHIN_S)


async def recorded(topology: Topology) -> Counter[str]:
    """The events that the recorder's command prints, by kind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eventstore", "tail", "--json", *topology.options("recorder")),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return Counter(json.loads(line)["event"]["type"] for line in output.splitlines())


async def denied_append(topology: Topology, user: str, subject: str) -> None:
    nats = await topology.connect(user)
    log = await JetStreamLog.open(nats, "dynamo", create=False)
    with pytest.raises(NotPermitted, match=subject.replace(".", r"\.")):
        await log.append(subject, b"forged", msg_id="forged")
    await log.close()
    await nats.close()


async def a_worker_writes_no_requests(topology: Topology) -> None:
    await denied_append(topology, "worker", "reckon.dynamo.request.0000000000000001")


async def a_frontend_writes_no_caches(topology: Topology) -> None:
    await denied_append(topology, "frontend", "reckon.dynamo.kv.0000000000000001.0")


async def a_recorder_writes_nothing(topology: Topology) -> None:
    await denied_append(topology, "recorder", "reckon.dynamo.control")


async def nobody_hears_what_others_are_answered(topology: Topology) -> None:
    async def ignore(message: object) -> None:
        return None

    nats = await topology.connect("worker")
    heard = ("_INBOX_frontend.>", "reckon.>", ">")
    for subject in heard:
        await nats.subscribe(subject, ignore)
    await eventually(lambda: nats.denials == len(heard))
    await nats.close()


async def a_stranger_is_not_admitted(topology: Topology) -> None:
    for access in (Access(), Access(user="worker", password="guessed")):
        with pytest.raises(LogUnavailable, match="does not admit"):
            await Nats.connect(topology.urls, name="stranger", access=access, wait_s=0.5)
