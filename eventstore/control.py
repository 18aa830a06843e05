"""What operators and replicas say to everybody, on the subject `control`: resets and snapshots.

Many write to this one subject, so each fact has a producer of its own below `control`, and the
fold's numbering of producers keeps a repeat of it out, however late it comes.
"""

import asyncio

from eventstore.codec import encode
from eventstore.errors import LogUnavailable
from eventstore.events import AnyEvent, SnapshotTaken, StateReset
from eventstore.log import EventLog
from eventstore.snapshots import SnapshotRef
from eventstore.subjects import CONTROL_PRODUCER, hex_id, subject

WITHIN_S = 30.0
RETRY_S = 0.5
SNAPSHOT_PRODUCER = f"{CONTROL_PRODUCER}.snapshot"


async def record_reset(log: EventLog, namespace: str, reason: str, reset_id: int) -> int:
    """Append `state.reset`; returns its seq. reset_id: a u64 that no other reset has.

    Raises LogUnavailable if the log cannot be reached for WITHIN_S; it may have it all the same.
    """
    producer = f"{CONTROL_PRODUCER}.{hex_id(reset_id)}"
    return await _append(log, namespace, producer, 1, StateReset(reason), f"{producer}.1.0")


async def record_snapshot(log: EventLog, namespace: str, ref: SnapshotRef, digest: str) -> int:
    """Append `snapshot.taken`; returns its seq. Raises as `record_reset`.

    Its epoch is the snapshot's seq, so that a fold takes each announcement once, and none of an
    older snapshot behind that of a newer one.
    """
    event = SnapshotTaken(ref.name, ref.seq, digest)
    msg_id = f"snapshot.{ref.life}.{ref.seq}"
    return await _append(log, namespace, SNAPSHOT_PRODUCER, ref.seq, event, msg_id)


async def _append(
    log: EventLog, namespace: str, producer: str, epoch: int, event: AnyEvent, msg_id: str
) -> int:
    data = encode(producer, epoch, 0, [event])
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    name = subject(namespace, CONTROL_PRODUCER)
                    return (await log.append(name, data, msg_id=msg_id)).seq
                except LogUnavailable:
                    await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise LogUnavailable(f"{msg_id} is not written to the log") from None
