"""What operators and replicas say to everybody: resets, snapshots and busy thresholds.

Many write to these subjects, so each fact has a producer of its own below its subject's, and the
fold's numbering of producers keeps a repeat of it out, however late it comes.
"""

import asyncio

from eventstore.codec import encode
from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent, BusyThresholdChanged, SnapshotTaken, StateReset
from eventstore.log import EventLog
from eventstore.snapshots import SnapshotRef
from eventstore.subjects import CONTROL_PRODUCER, hex_id, subject, threshold_producer

WITHIN_S = 30.0
RETRY_S = 0.5


async def record_reset(log: EventLog, namespace: str, reason: str, reset_id: int) -> int:
    """Append `state.reset`; returns its seq. reset_id: a u64 that no other reset has.

    Raises LogUnavailable if the log cannot be reached for WITHIN_S; it may have it all the same.
    """
    name, event = hex_id(reset_id), StateReset(reason)
    return await _append(log, namespace, CONTROL_PRODUCER, name, 1, event, f"reset.{name}")


async def record_thresholds(
    log: EventLog, namespace: str, changed: BusyThresholdChanged, change_id: int
) -> int:
    """Append `threshold.changed`; returns its seq. change_id: a u64 that no other change has.

    Raises as `record_reset`.
    """
    name, producer = hex_id(change_id), threshold_producer(changed.model)
    return await _append(log, namespace, producer, name, 1, changed, f"threshold.{name}")


async def record_snapshot(log: EventLog, namespace: str, ref: SnapshotRef, digest: str) -> int:
    """Append `snapshot.taken`; returns its seq. Raises as `record_reset`.

    Its epoch is the snapshot's seq, so that a fold takes each announcement once, and none of an
    older snapshot behind that of a newer one.
    """
    event = SnapshotTaken(ref.name, ref.seq, digest)
    msg_id = f"snapshot.{ref.life}.{ref.seq}"
    return await _append(log, namespace, CONTROL_PRODUCER, "snapshot", ref.seq, event, msg_id)


async def _append(
    log: EventLog,
    namespace: str,
    owner: str,
    name: str,
    epoch: int,
    event: AnyEvent,
    msg_id: str,
) -> int:
    """owner: whose subject it is; `name` is that of the fact's own producer below it."""
    data = encode(f"{owner}.{name}", epoch, 0, [event])
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    to = subject(namespace, owner)
                    return (await log.append(to, data, msg_id=msg_id)).seq
                except LogUnavailable:
                    await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise LogUnavailable(f"{msg_id} is not written to the log") from None
