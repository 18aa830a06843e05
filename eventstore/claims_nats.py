"""A claim as one key of the KV bucket `reckon_<namespace>_claims`, whose values expire.

Taking it is creating the key, renewing it is writing it again on the condition that nobody else
has; both are decided by the bucket's leader. A holder that could not renew in time counts the claim
as lost, whether or not another has taken it.
"""

import asyncio
import contextlib
import logging
import time
from typing import Final

import nats.errors
import nats.js.errors
from nats.js import api
from nats.js.kv import KeyValue

from eventstore.claims import CLAIM_TTL_S, Claim, ClaimLost, Claims, ClaimTaken
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.replicas import hold_replicas, replicas_of_new
from eventstore.subjects import check_namespace
from eventstore.tasks import end

RENEWALS_PER_TTL = 5
RETRY_S = 0.25

_CONFIG_DIFFERS = 10058
UNREACHABLE: Final = (nats.errors.Error, LogUnavailable, OSError, TimeoutError)
_TAKEN = nats.js.errors.KeyWrongLastSequenceError

_log = logging.getLogger(__name__)


class NatsClaims(Claims):
    """The claim to `what` in one namespace. Does not own the connection."""

    def __init__(
        self,
        connection: Nats,
        namespace: str,
        what: str,
        *,
        ttl_s: float = CLAIM_TTL_S,
        replicas: int | None = None,
    ) -> None:
        """what: the key. ttl_s: of the whole bucket, so the same for all. replicas: see
        `eventstore.replicas`."""
        self._nats = connection
        self._js = connection.jetstream
        self._namespace = namespace
        self._bucket = claims_bucket(namespace)
        self._what = what
        self._ttl_s = ttl_s
        self._replicas = replicas

    async def holder(self) -> str | None:
        try:
            return await _holder(await self._js.key_value(self._bucket), self._what)
        except nats.js.errors.BucketNotFoundError:
            return None
        except UNREACHABLE as error:
            raise LogUnavailable(f"cannot read the claim {self._what}: {error!r}") from error

    async def take(self, holder: str) -> Claim:
        """See `Claims`. The claim is renewed by a task of its own until it is released or lost."""
        began_at = time.monotonic()
        try:
            bucket = await open_claims(self._nats, self._namespace, self._ttl_s, self._replicas)
            asked_at = asyncio.get_running_loop().time()
            try:
                revision = await bucket.create(self._what, holder.encode())
            except _TAKEN:
                other = await _holder(bucket, self._what)
                raise ClaimTaken(self._what, other or "somebody who just ended") from None
        except UNREACHABLE as error:
            what = f"cannot take the claim {self._what}"
            raise (
                self._nats.denied(what, began_at) or LogUnavailable(f"{what}: {error!r}")
            ) from error
        return _NatsClaim(bucket, self._what, holder, revision, asked_at, self._ttl_s)


def claims_bucket(namespace: str) -> str:
    """The name of the bucket. Raises BadSubject."""
    return f"reckon_{check_namespace(namespace)}_claims"


async def open_claims(
    connection: Nats, namespace: str, ttl_s: float, replicas: int | None
) -> KeyValue:
    """The bucket, made if there is none. Raises UNREACHABLE."""
    name = claims_bucket(namespace)
    config = api.KeyValueConfig(
        bucket=name,
        history=1,
        ttl=ttl_s,
        replicas=replicas_of_new(connection, replicas),
    )
    try:
        bucket = await connection.jetstream.create_key_value(config)
    except nats.js.errors.APIError as error:
        if error.err_code != _CONFIG_DIFFERS:
            raise
        bucket = await connection.jetstream.key_value(name)
    await hold_replicas(connection, f"KV_{name}", replicas)
    return bucket


async def _holder(bucket: KeyValue, key: str) -> str | None:
    try:
        return ((await bucket.get(key)).value or b"").decode()
    except nats.js.errors.NotFoundError:
        return None


class _NatsClaim(Claim):
    def __init__(
        self,
        bucket: KeyValue,
        key: str,
        holder: str,
        revision: int,
        taken_at: float,
        ttl_s: float,
    ) -> None:
        """taken_at: when it was asked for, by the event loop's clock: it holds at least since."""
        self._bucket = bucket
        self._key = key
        self._holder = holder
        self._revision = revision
        self._renewed_at = taken_at
        self._ttl_s = ttl_s
        self._held = True
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._renew(), name=f"renew claim {key}")

    def check(self) -> None:
        if not self._held or self._loop.time() >= self._renewed_at + self._ttl_s:
            raise ClaimLost(self._key)

    async def release(self) -> None:
        await end(self._task)
        held, self._held = self._held, False
        if held:
            with contextlib.suppress(*UNREACHABLE):
                await self._bucket.delete(self._key, last=self._revision)

    async def _renew(self) -> None:
        pause_s = self._ttl_s / RENEWALS_PER_TTL
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._ttl_s / RENEWALS_PER_TTL
            asked_at = self._loop.time()
            try:
                async with asyncio.timeout(self._ttl_s / 2):
                    await self._write()
            except _TAKEN:
                self._held = False
                _log.warning("claim %s lost to somebody else", self._key)
                return
            except UNREACHABLE as error:
                pause_s = RETRY_S
                _log.debug("claim %s not renewed yet: %r", self._key, error)
            else:
                self._renewed_at = asked_at

    async def _write(self) -> None:
        """Raises KeyWrongLastSequenceError if somebody else has written, or it has expired."""
        value = self._holder.encode()
        try:
            self._revision = await self._bucket.update(self._key, value, last=self._revision)
        except _TAKEN:
            # An earlier renewal may have arrived although its answer did not.
            entry = await self._bucket.get(self._key)
            if entry.value != value or entry.revision is None:
                raise
            self._revision = await self._bucket.update(self._key, value, last=entry.revision)
