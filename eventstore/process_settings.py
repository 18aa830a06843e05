"""Options that every process of a deployment has: where the log is, and how it logs its lines."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from eventstore.access import INBOX_PREFIX, Access
from eventstore.logs import parse_filter
from eventstore.options import Option, Settings

NAMESPACE_DEFAULT = "dynamo"
REPLICAS_MAX = 5
"""The most that JetStream keeps."""
_INBOX_PREFIX = re.compile(r"[\w-]+(\.[\w-]+)*\Z", re.ASCII)
SECRETS = frozenset({"nats_url", "nats_password", "nats_token", "nats_nkey"})
"""Options that are shown nowhere; of the address, only what is not a user and a password may be."""


def nats_servers(text: str) -> tuple[str, ...]:
    """The addresses in a comma-separated list. Raises ValueError where one is no address."""
    servers = tuple(part.strip() for part in text.split(","))
    for server in servers:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
            shown = server.rpartition("@")[2]  # without a password
            raise ValueError(f"{shown!r} is not an address such as nats://127.0.0.1:4222")
        _ = parts.port  # raises ValueError for a port that cannot be one
    return servers


def check_inbox_prefix(prefix: str) -> None:
    """Raises ValueError if it is no beginning of subjects."""
    if not _INBOX_PREFIX.match(prefix):
        raise ValueError(f"{prefix!r} is not tokens of letters, digits, '-' and '_' with dots")


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


class AccessSettings(Settings, frozen=True, kw_only=True):
    """What NATS may ask for before it lets somebody in."""

    nats_user: Annotated[
        str | None,
        Option("NATS_AUTH_USERNAME", "User to connect as.", group="Access to NATS"),
    ] = None
    nats_password: Annotated[
        str | None, Option("NATS_AUTH_PASSWORD", "The user's password.", flag=False)
    ] = None
    nats_password_file: Annotated[
        Path | None,
        Option(
            "NATS_AUTH_PASSWORD_FILE",
            "File that holds the user's password, read at every connect.",
        ),
    ] = None
    nats_token: Annotated[
        str | None, Option("NATS_AUTH_TOKEN", "Token to connect with, instead.", flag=False)
    ] = None
    nats_nkey: Annotated[
        str | None,
        Option("NATS_AUTH_NKEY", "Seed of the NKEY to connect with, instead.", flag=False),
    ] = None
    nats_credentials_file: Annotated[
        Path | None,
        Option(
            "NATS_AUTH_CREDENTIALS_FILE",
            "Credentials file (JWT and seed) to connect with, instead; read at every connect.",
        ),
    ] = None
    nats_tls_ca: Annotated[
        Path | None,
        Option(
            "RECKON_NATS_TLS_CA",
            "CA certificates (PEM) that the server's must be signed by. With this or a client "
            "certificate, TLS is insisted on.",
            unset="those that this machine trusts",
        ),
    ] = None
    nats_tls_cert: Annotated[
        Path | None,
        Option(
            "RECKON_NATS_TLS_CERT",
            "Client certificate (PEM). Goes together with --nats-tls-key.",
        ),
    ] = None
    nats_tls_key: Annotated[
        Path | None,
        Option("RECKON_NATS_TLS_KEY", "Private key (PEM) of the client certificate."),
    ] = None
    nats_inbox_prefix: Annotated[
        str,
        Option(
            "RECKON_NATS_INBOX_PREFIX",
            "What the subjects begin with on which this process gets its answers.",
            check=check_inbox_prefix,
        ),
    ] = INBOX_PREFIX

    def __repr__(self) -> str:
        fields = (name for name in self.__struct_fields__ if name not in SECRETS)
        shown = (f"{name}={getattr(self, name)!r}" for name in fields)
        return f"{type(self).__name__}({', '.join(shown)})"

    def access(self) -> Access:
        """Raises LogUnavailable for options that do not go together."""
        return Access(
            user=self.nats_user,
            password=self.nats_password,
            password_file=self.nats_password_file,
            token=self.nats_token,
            nkey=self.nats_nkey,
            credentials_file=self.nats_credentials_file,
            tls_ca=self.nats_tls_ca,
            tls_cert=self.nats_tls_cert,
            tls_key=self.nats_tls_key,
            inbox_prefix=self.nats_inbox_prefix,
        )


class ProcessSettings(AccessSettings, frozen=True, kw_only=True):
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
    log_replicas: Annotated[
        int | None,
        Option(
            "RECKON_LOG_REPLICAS",
            "Servers that keep a copy of the log, of the list of workers and of the models' files. "
            "Fewer existing copies are raised to this; more are not lowered.",
            unit="copies",
            unset="3 where the server is one of a cluster, else 1; existing ones stay as they are",
            ge=1,
            le=REPLICAS_MAX,
        ),
    ] = None
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
