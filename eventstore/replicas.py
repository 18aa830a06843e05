"""How many servers of a cluster keep a copy of a stream: of the log, a bucket, an object store.

Unless somebody says a number, a stream is made with three copies in a cluster and one on a server
alone, and one that exists stays as it is. A number that is said is held to: fewer copies are raised
to it, and more are not lowered behind anybody's back.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import Struct

from eventstore.connect import JetStreamRefused, Nats
from eventstore.errors import LogUnavailable

IN_CLUSTER = 3
"""The fewest that survive the loss of one."""
ASK_TIMEOUT_S = 1.0
"""What a cluster is asked while it elects a leader it does not answer later: it has to be asked
again."""
ASK_ATTEMPTS = 5
_TOO_FEW_SERVERS = (10005, 10023, 10074)


T = TypeVar("T")


class _Info(Struct, frozen=True):
    config: dict[str, object]


class TooFewServers(JetStreamRefused):
    """There are not as many servers as copies are wanted, or not yet."""

    final = False

    def __init__(self, refused: JetStreamRefused) -> None:
        super().__init__("JetStream has too few servers", refused.error)
        self.try_this = "start all servers of the cluster, or --log-replicas with fewer copies"


class MoreReplicas(LogUnavailable):
    def __init__(self, stream: str, found: int, wanted: int) -> None:
        super().__init__(
            f"stream {stream} is kept by {found} servers, not {wanted}",
            f"--log-replicas {found}, or lower it: nats stream edit {stream} --replicas {wanted}",
        )


def replicas_of_new(nats: Nats, replicas: int | None) -> int:
    """The copies of a stream that is made. replicas: as said, if it was."""
    return replicas or (IN_CLUSTER if nats.clustered else 1)


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` gets from the server, asked again if there is no answer.

    Raises what `ask` raises, and TimeoutError.
    """
    for _ in range(ASK_ATTEMPTS - 1):
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await ask()
        except TimeoutError:
            continue
    async with asyncio.timeout(ASK_TIMEOUT_S):
        return await ask()


async def hold_replicas(nats: Nats, stream: str, replicas: int | None) -> None:
    """See that an existing `stream` has as many copies as said; None: any number will do.

    Raises MoreReplicas, TooFewServers, LogUnavailable.
    """
    if replicas is None:
        return
    config = (await nats.api(f"STREAM.INFO.{stream}", None, _Info)).config
    found = config.get("num_replicas")
    if isinstance(found, int) and found > replicas:
        raise MoreReplicas(stream, found, replicas)
    if found != replicas:
        try:
            await nats.api(f"STREAM.UPDATE.{stream}", config | {"num_replicas": replicas}, _Info)
        except JetStreamRefused as refused:
            raise too_few_servers(refused) from refused


def too_few_servers(refused: JetStreamRefused) -> JetStreamRefused:
    """`refused` as TooFewServers, if that is what it says."""
    if refused.error.err_code in _TOO_FEW_SERVERS:
        return TooFewServers(refused)
    return refused
