"""Options that every process of a deployment has: where the log is, and how it logs its lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from eventstore.logs import parse_filter
from eventstore.options import Option, Settings

NAMESPACE_DEFAULT = "dynamo"


def nats_servers(text: str) -> tuple[str, ...]:
    """The addresses in a comma-separated list. Raises ValueError where one is no address."""
    servers = tuple(part.strip() for part in text.split(","))
    for server in servers:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
            raise ValueError(f"{server!r} is not an address such as nats://127.0.0.1:4222")
        _ = parts.port  # raises ValueError for a port that cannot be one
    return servers


def default_data_dir(env: Mapping[str, str]) -> Path:
    """Where a deployment keeps its files unless told: `reckon` in the user's state directory.

    That is XDG_STATE_HOME if it is an absolute path, else `~/.local/state`, as the XDG base
    directory specification says. RuntimeError if there is no home directory either.
    """
    state = Path(env.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        home = env.get("HOME")
        state = (Path(home) if home else Path.home()) / ".local" / "state"
    return state / "reckon"


class ProcessSettings(Settings, frozen=True, kw_only=True):
    """Base of the tables of the processes that use the log."""

    nats_url: Annotated[
        str | None,
        Option(
            "NATS_SERVER",
            "Address of the NATS server, or several of one cluster separated by commas.",
            group="NATS",
            unset="127.0.0.1:4222 if a server listens there, else an embedded one",
            check=nats_servers,
        ),
    ] = None
    nats_wait_secs: Annotated[
        float,
        Option(
            "RECKON_NATS_WAIT_SECS",
            "How long a start waits for the NATS server before it gives up.",
            unit="seconds",
            ge=0,
        ),
    ] = 10.0
    nats_server_binary: Annotated[
        Path | None,
        Option(
            "RECKON_NATS_SERVER_BINARY",
            "The nats-server to embed.",
            unset="the one on PATH if it is 2.12 or newer, else the one installed with us",
        ),
    ] = None
    data_dir: Annotated[
        Path | None,
        Option(
            "RECKON_DATA_DIR",
            "Where an embedded NATS server keeps the log.",
            unset="reckon in XDG_STATE_HOME, which is ~/.local/state if not set",
        ),
    ] = None
    log_levels: Annotated[
        str,
        Option(
            "DYN_LOG",
            "Level of the log lines: error, warn, info, debug or off, also for one module: "
            "info,router=debug. trace is the same as debug.",
            group="Logging",
            flag=False,
            check=parse_filter,
        ),
    ] = "info"
    logging_jsonl: Annotated[
        bool, Option("DYN_LOGGING_JSONL", "Log lines are JSON objects.", flag=False)
    ] = False
    log_use_local_tz: Annotated[
        bool,
        Option("DYN_LOG_USE_LOCAL_TZ", "Log lines tell local time instead of UTC.", flag=False),
    ] = False

    def nats_addresses(self) -> tuple[str, ...]:
        """The addresses of `nats_url`; empty if it is unset."""
        return nats_servers(self.nats_url) if self.nats_url is not None else ()
