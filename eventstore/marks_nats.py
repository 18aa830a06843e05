"""Reading marks as keys `reading.<reader>` of the claims' bucket, whose values expire.

A reader writes its own key alone, so nothing is compared: the last write is the newest.
"""

import time

from nats.js.errors import NotFoundError
from nats.js.kv import KeyValue

from eventstore.claims_nats import UNREACHABLE, claims_bucket, open_claims
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.marks import MARK_TTL_S, MARKS_MAX, ReadingMarks, too_many

_KEY = "reading."


class NatsMarks(ReadingMarks):
    """The marks of one namespace. Does not own the connection."""

    def __init__(
        self,
        connection: Nats,
        namespace: str,
        *,
        ttl_s: float = MARK_TTL_S,
        replicas: int | None = None,
    ) -> None:
        """ttl_s: of the whole bucket, so the same for all, claims too. replicas: see
        `eventstore.replicas`."""
        self._nats = connection
        self._js = connection.jetstream
        self._namespace = namespace
        self._name = claims_bucket(namespace)
        self._ttl_s = ttl_s
        self._replicas = replicas
        self._bucket: KeyValue | None = None
        """Once it is known to be there."""

    async def put(self, reader: str, seq: int) -> None:
        began_at = time.monotonic()
        try:
            if self._bucket is None:
                self._bucket = await open_claims(
                    self._nats, self._namespace, self._ttl_s, self._replicas
                )
            await self._bucket.put(_KEY + reader, b"%d" % seq)
        except UNREACHABLE as error:
            self._bucket = None
            what = "cannot write a reading mark"
            raise (
                self._nats.denied(what, began_at) or LogUnavailable(f"{what}: {error!r}")
            ) from error

    async def remove(self, reader: str) -> None:
        if self._bucket is None:
            return
        try:
            await self._bucket.delete(_KEY + reader)
        except UNREACHABLE as error:
            raise LogUnavailable(f"cannot remove a reading mark: {error!r}") from error

    async def lowest(self) -> int | None:
        """See `ReadingMarks`. One request, and one more for each mark."""
        prefix = f"$KV.{self._name}."
        try:
            info = await self._js.stream_info(f"KV_{self._name}", f"{prefix}{_KEY}>")
            keys = [subject.removeprefix(prefix) for subject in info.state.subjects or {}]
            if len(keys) > MARKS_MAX:
                raise too_many(len(keys))
            bucket = await self._js.key_value(self._name)
            found = [await _seq(bucket, key) for key in keys]
        except NotFoundError:
            return None  # no bucket: nobody has claimed or marked anything yet
        except LogUnavailable:
            raise
        except UNREACHABLE as error:
            raise LogUnavailable(f"no answer: {error!r}") from error
        return min((seq for seq in found if seq is not None), default=None)


async def _seq(bucket: KeyValue, key: str) -> int | None:
    """None if it was removed, or has expired meanwhile."""
    try:
        value = (await bucket.get(key)).value or b""
    except NotFoundError:
        return None
    if not value.isdigit():
        raise LogUnavailable(f"the mark {key} is not a number")
    return int(value)
