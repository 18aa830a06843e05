"""What must hold before anything is started: free ports, and a data directory for us alone."""

import asyncio
import errno
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from eventstore.errors import LogUnavailable
from eventstore.store_lock import StoreInUse, StoreLock

PORT_MAX = 65_535
CLAIM_WAIT_S = 2.0
CLAIM_AGAIN_S = 0.05


class CannotStart(Exception):
    """Why there is no deployment, in one line, and what to do about it.

    details: lines that tell more, such as the last ones of a child that failed.
    """

    def __init__(self, why: str, try_this: str, details: Sequence[str] = ()) -> None:
        super().__init__(why, try_this, details)
        self.why = why
        self.try_this = try_this
        self.details = details

    def __str__(self) -> str:
        return self.why


def check_ports(host: str, ports: Iterable[int]) -> None:
    """CannotStart unless each of `ports` of `host` can be listened on now."""
    for port in ports:
        if port > PORT_MAX:
            raise CannotStart(f"there is no port {port}", "a lower --http-port")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as listener:
                # As servers do: a port that old connections still linger on is free.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
        except OSError as error:
            raise _port_problem(host, port, error) from error


def _port_problem(host: str, port: int, error: OSError) -> CannotStart:
    if error.errno == errno.EADDRINUSE:
        return CannotStart(
            f"port {port} of {host} is in use",
            "another --http-port (and another --data-dir beside a running deployment)",
        )
    if error.errno == errno.EACCES:
        return CannotStart(f"port {port} may not be listened on by this user", "--http-port 8000")
    return CannotStart(
        f"{host} cannot be listened on: {error.strerror}", "--http-host 127.0.0.1 or 0.0.0.0"
    )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def claim(store: Path, *, wait_s: float = CLAIM_WAIT_S) -> StoreLock:
    """Take the log's store in the data directory for this deployment alone; make both if need be.

    wait_s: how long the server of a deployment that has just been killed may keep it.
    Raises CannotStart.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            return StoreLock(store)
        except StoreInUse as error:
            if asyncio.get_running_loop().time() >= deadline:
                raise CannotStart(
                    f"the data directory {store.parent} is in use by another deployment",
                    "another --data-dir, or end that deployment",
                ) from error
        except LogUnavailable as error:
            raise CannotStart(str(error), "another --data-dir") from error
        await asyncio.sleep(CLAIM_AGAIN_S)
