"""Which processes a deployment consists of: names, command lines, order. Pure."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from eventstore.options import declarations
from eventstore.process_settings import NAMESPACE_DEFAULT, AccessSettings
from reckon.child import Asked, ChildSpec
from reckon.probe import METRICS_PREFIX
from reckon.settings import UpSettings

NATS = "nats-server"
NATS_HOST = "127.0.0.1"
ROOMS = Path(__file__).resolve().parent.parent
"""The folder that holds our packages, installed or not."""
FRONTENDS_TURN, WORKERS_TURN, NATS_TURN = range(3)
"""The order in which they end: whoever takes requests first, the log last."""
FRONTEND_GRACE_S, WORKER_GRACE_S, NATS_GRACE_S = 2.3, 1.0, 1.0
"""Together under the 5 s that Ctrl-C may take."""
SHUTDOWN_TIMEOUT = "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
SHUTDOWN_TIMEOUT_S = "1"
"""Unless told otherwise: it leaves a frontend time to write its last facts within its grace."""
WORKER_READY = re.compile(r"^ready ")


class Plan(Struct, frozen=True, kw_only=True):
    """A deployment before it runs. Paths are absolute."""

    settings: UpSettings
    env: Mapping[str, str]
    """The caller's environment: what all children get, and more is added to."""
    data_dir: Path
    nats_binary: Path
    nats_port: int

    @property
    def nats_url(self) -> str:
        return f"nats://{NATS_HOST}:{self.nats_port}"

    @property
    def log_options(self) -> tuple[str, ...]:
        """With which the tools find the log."""
        url, namespace = ("--nats-url", self.nats_url), self.settings.namespace
        return url if namespace == NAMESPACE_DEFAULT else (*url, "--namespace", namespace)

    @property
    def nats_store(self) -> Path:
        """Where a frontend that embeds its own server would keep the same log."""
        return self.data_dir / "nats"

    @property
    def worker_names(self) -> list[str]:
        return [f"worker-{n}" for n in range(1, self.settings.workers + 1)]

    @property
    def frontend_urls(self) -> dict[str, str]:
        """By name. URLs that this machine can open."""
        host = reachable(self.settings.http_host)
        ports = enumerate(self.settings.ports(), 1)
        return {f"frontend-{n}": f"http://{host}:{port}" for n, port in ports}

    @property
    def metrics_prefix(self) -> str:
        """Of the frontends' metrics."""
        return self.env.get("DYN_METRICS_PREFIX") or METRICS_PREFIX

    def log_path(self, name: str) -> Path:
        return self.data_dir / "logs" / f"{name}.log"

    def nats(self, ready: Asked, lock_fd: int) -> ChildSpec:
        """lock_fd: of the store's lock, which the server holds too."""
        return ChildSpec(
            name=NATS,
            argv=nats_argv(self.nats_binary, self.nats_store, self.nats_port),
            env=dict(self.env),
            log_path=self.log_path(NATS),
            ready=ready,
            address=self.nats_url,
            stop_turn=NATS_TURN,
            stop_grace_s=NATS_GRACE_S,
            pass_fds=(lock_fd,),
        )

    def workers(self) -> list[ChildSpec]:
        return [
            ChildSpec(
                name=name,
                argv=worker_argv(self.settings, self.nats_url),
                env=environment(self.env),
                log_path=self.log_path(name),
                ready=WORKER_READY,
                needs=NATS,
                stop_turn=WORKERS_TURN,
                stop_grace_s=WORKER_GRACE_S,
            )
            for name in self.worker_names
        ]

    def frontends(self, ready: Mapping[str, Asked]) -> list[ChildSpec]:
        """ready: by name."""
        env = environment(self.env)
        env.setdefault(SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT_S)
        return [
            ChildSpec(
                name=name,
                argv=frontend_argv(self.settings, self.nats_url, port),
                env=env,
                log_path=self.log_path(name),
                ready=ready[name],
                address=url,
                needs=NATS,
                stop_turn=FRONTENDS_TURN,
                stop_grace_s=FRONTEND_GRACE_S,
            )
            for (name, url), port in zip(
                self.frontend_urls.items(), self.settings.ports(), strict=True
            )
        ]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """What our own processes get: `env`, and a path on which our packages are.

    The variables of up's own options have done their work: what they said is in the command lines.
    Those with passwords and certificates are for another NATS than the one that up starts.
    """
    tables = (UpSettings, AccessSettings)
    done = {name for table in tables for each in declarations(table) for name in each.variables}
    rest = {name: value for name, value in env.items() if name not in done}
    path = os.pathsep.join(filter(None, (str(ROOMS), env.get("PYTHONPATH"))))
    return {**rest, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def python(package: str) -> tuple[str, ...]:
    """`python -m package`, without the working directory on its path.

    Our packages have everyday names: a folder `frontend` where the user happens to be is not ours.
    """
    return (sys.executable, "-P", "-m", package)


def nats_argv(binary: Path, store: Path, port: int) -> tuple[str, ...]:
    """A nats-server with JetStream for this machine alone, which logs to its output."""
    return (
        *(str(binary), "--addr", NATS_HOST, "--port", str(port)),
        *("--jetstream", "--store_dir", str(store)),
    )


def worker_argv(settings: UpSettings, nats_url: str) -> tuple[str, ...]:
    """A mock worker with the options that were given; the others stay as the worker has them."""
    argv = [*python("workers"), "mock", "--namespace", settings.namespace, "--nats-url", nats_url]
    options = {
        "--model-path": settings.model_path and settings.model_path.absolute(),
        "--model-name": settings.model_name,
        "--speedup-ratio": settings.speedup_ratio,
        "--block-size": settings.block_size,
        "--num-gpu-blocks": settings.num_gpu_blocks,
    }
    for flag, value in options.items():
        if value is not None:
            argv += [flag, str(value)]
    return tuple(argv)


def frontend_argv(settings: UpSettings, nats_url: str, port: int) -> tuple[str, ...]:
    """A frontend that differs from one started alone in what up decides, and in that only."""
    sync = "--router-replica-sync" if settings.router_replica_sync else "--no-router-replica-sync"
    return (
        *python("frontend"),
        *("--http-host", settings.http_host, "--http-port", str(port)),
        *("--router-mode", settings.router_mode, sync),
        *("--namespace", settings.namespace, "--nats-url", nats_url),
    )


def reachable(host: str) -> str:
    """`host` as it stands in a URL that this machine can open."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
