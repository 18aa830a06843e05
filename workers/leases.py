"""A lease: one key of a KV bucket that its owner keeps alive.

A worker is the key `v1.instances.<component>.<id>`, a frontend `v1.frontends.http.<id>`; the value
is its record as JSON, and its lease is the message's TTL. Renewing writes the same value again,
with a new TTL, on the condition that the last revision is still this lease's own. The server puts a
marker where a TTL has ended, so watchers hear of it; a clean end is a delete of our own. A lease
that ended while nobody could renew it is written again (`workers.grace`).
"""

import asyncio
import logging
import re
from collections.abc import Mapping

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext, api

from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.replicas import answered, hold_replicas, replicas_of_new
from eventstore.subjects import hex_id
from eventstore.tasks import end
from workers.card import Listed
from workers.discovery import Ending, OnLost
from workers.grace import GracePeriod

LEASE_TTL_S = 5
CLUSTER_LEASE_TTL_S = 15
"""Where the server is one of a cluster: after the loss of a node it may take 7 s until another one
leads the bucket, which then ends what is due. A lease that waited for its renewal has 10 s left."""
MARKER_TTL_S = 60
"""How long the server remembers that a lease ended; an absent key says the same."""
RETRY_S = 0.25
RENEWAL_S_MIN = 1.0
"""How long one attempt to renew may take at least; a third of the TTL if that is more. A server
that has lost its leader swallows what it is sent: it has to be sent again."""
ANSWER_S = 5.0
"""How long a caller waits for the bucket before it gives up."""
UNREACHABLE = (nats.errors.Error, LogUnavailable, OSError, TimeoutError)
"""Whatever a request to the server can end in; its refusals are among them."""

_WRONG_LAST_SEQUENCE = (10071, 10164)
_CONFIG_DIFFERS = 10058
_TOKEN = re.compile(r"[A-Za-z0-9_=-]{1,64}\Z")
_OPERATION = "KV-Operation"
_MARKER = "Nats-Marker-Reason"
_TTL = "Nats-TTL"

_logger = logging.getLogger(__name__)


class LeaseTaken(Exception):
    """The key does not hold this lease's value any more."""


class LeaseExpired(LeaseTaken):
    """It ended without a word. revision: of the marker in its place; 0: there is none."""

    def __init__(self, why: str, revision: int) -> None:
        super().__init__(why)
        self.revision = revision


def check_component(component: str) -> str:
    """Return `component`; ValueError if it cannot be part of a key."""
    if not _TOKEN.match(component):
        raise ValueError(f"{component!r} is not 1 to 64 letters, digits, '-', '_' and '='")
    return component


def key_of(instance: Listed) -> str:
    """Raises ValueError if the component cannot be part of a key."""
    group = check_component(instance.listed_group)
    return f"{instance.LISTED_UNDER}.{group}.{hex_id(instance.listed_id)}"


def ending_of(headers: Mapping[str, str] | None) -> Ending | None:
    """What a message of the bucket says has ended, if it is not a value."""
    if not headers:
        return None
    if headers.get(_OPERATION) == "DEL":
        return Ending.DEREGISTERED
    if _OPERATION in headers or _MARKER in headers:
        return Ending.EXPIRED
    return None


async def open_bucket(connection: Nats, bucket: str, replicas: int | None) -> None:
    """Make the bucket if it is not there; one with another configuration is taken as it is, but for
    `replicas` (see `eventstore.replicas`).
    """
    config = api.KeyValueConfig(
        bucket=bucket,
        history=1,  # with more, a TTL below the marker's would be raised to it
        limit_marker_ttl=MARKER_TTL_S,
        storage=api.StorageType.FILE,
        replicas=replicas_of_new(connection, replicas),
    )
    try:
        await answered(lambda: connection.jetstream.create_key_value(config))
    except nats.js.errors.APIError as error:
        if error.err_code != _CONFIG_DIFFERS:
            raise
    await hold_replicas(connection, f"KV_{bucket}", replicas)


class Cell:
    """One key and the one value that its owner writes there."""

    def __init__(self, js: JetStreamContext, bucket: str, key: str, value: bytes) -> None:
        self._js = js
        self._stream = f"KV_{bucket}"
        self._subject = f"$KV.{bucket}.{key}"
        self.key = key
        self._value = value

    async def write(self, revision: int, ttl_s: int) -> int:
        """Write the value if the last revision is `revision` (0: none); returns the new one.

        Raises LeaseTaken if it is another and not from this cell, else what a request can end in:
        then it is unknown whether the value was written, and the next write finds out.
        """
        return await self._replace(revision, self._value, {_TTL: str(ttl_s)})

    async def claim(self, ttl_s: int) -> int:
        """Write the value where there is none, or none any more; returns the revision.

        Raises as `write` does.
        """
        try:
            return await self.write(0, ttl_s)
        except LeaseExpired as expired:  # an earlier lease under this key
            return await self.write(expired.revision, ttl_s)

    async def delete(self, revision: int) -> None:
        """Put a delete marker, which itself goes away in time. Raises as `write` does."""
        await self._replace(revision, b"", {_OPERATION: "DEL", _TTL: str(MARKER_TTL_S)})

    async def _replace(self, revision: int, data: bytes, headers: dict[str, str]) -> int:
        try:
            return await self._publish(revision, data, headers)
        except nats.js.errors.APIError as error:
            if error.err_code not in _WRONG_LAST_SEQUENCE:
                raise
        # An earlier write of ours may have arrived although its answer did not.
        return await self._publish(await self._own_revision(), data, headers)

    async def _publish(self, revision: int, data: bytes, headers: dict[str, str]) -> int:
        expected = {api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
        ack = await self._js.publish(
            self._subject, data, stream=self._stream, headers=headers | expected
        )
        return int(ack.seq)

    async def _own_revision(self) -> int:
        try:
            # Not a direct get: only the stream's leader is certain to know the last message.
            message = await self._js.get_msg(self._stream, subject=self._subject)
        except nats.js.errors.NotFoundError:
            raise LeaseExpired("its record is gone", 0) from None
        ending = ending_of(message.headers)
        if ending is Ending.EXPIRED:
            raise LeaseExpired("it expired", message.seq or 0)
        if ending is not None:
            raise LeaseTaken("somebody else ended it")
        if message.data != self._value or message.seq is None:
            raise LeaseTaken("somebody else wrote its record")
        return int(message.seq)


class RenewedLease:
    """Renews one cell until it is released, lost or stopped."""

    def __init__(
        self, cell: Cell, revision: int, ttl_s: int, grace: GracePeriod, on_lost: OnLost
    ) -> None:
        """grace: while it lasts, the lease survives its own expiry."""
        self._cell = cell
        self._revision = revision
        self._ttl_s = ttl_s
        self._grace = grace
        self._on_lost = on_lost
        self._held = True
        self.task = asyncio.create_task(self._renew(), name=f"renew {cell.key}")

    async def release(self) -> None:
        await self.stop()
        if not self._held:
            return
        self._held = False
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._cell.delete(self._revision)
        except LeaseTaken:
            pass  # it is off the list already
        except UNREACHABLE as error:
            _logger.warning("lease left to expire key=%s why=%r", self._cell.key, error)

    async def stop(self) -> None:
        """End the renewing only."""
        await end(self.task)

    async def _renew(self) -> None:
        """Renew every third of the TTL. An unreachable server is asked again until it answers.

        While it is away nobody's lease ends; whether this one did is found out afterwards.
        """
        third_s = self._ttl_s / 3
        pause_s = third_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(max(RENEWAL_S_MIN, third_s)):
                    self._revision = await self._write()
                pause_s = third_s
            except UNREACHABLE as error:
                # Also what a bucket without a leader answers; one that is gone for good is made
                # again by the watches, and then the record is missing.
                pause_s = RETRY_S
                _logger.debug("lease not renewed yet key=%s why=%r", self._cell.key, error)
            except LeaseTaken as error:
                self._held = False
                self._on_lost(str(error))
                return

    async def _write(self) -> int:
        """Renew the lease, or reclaim it; returns the new revision.

        Whoever reclaims at the last moment may have been taken for dead already. Then it is listed
        and the log says that it is gone, which frontends find and put right.
        """
        try:
            return await self._cell.write(self._revision, self._ttl_s)
        except LeaseExpired as expired:
            if await self._grace.left_s() <= 0:
                raise
            revision = await self._cell.write(expired.revision, self._ttl_s)
            _logger.warning("lease reclaimed key=%s why=nobody could renew it", self._cell.key)
            return revision
