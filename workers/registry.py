"""What the log is told of a worker's life: `worker.registered` once, `worker.removed` once.

Both are records of one producer, `worker.<id>`, numbered 0 and 1, whoever writes them. The worker
writes the first, and the second itself when it shuts down in order; otherwise every frontend that
sees its lease end tries to. One of them succeeds: the log takes equal message ids once, and after
that window takes a removal only right behind the registration.
"""

import asyncio

from eventstore.codec import encode
from eventstore.errors import LogUnavailable, SeqConflict
from eventstore.events import FrontendRemoved, WorkerRegistered, WorkerRemoved
from eventstore.log import Appended, EventLog
from eventstore.subjects import frontend_producer, hex_id, subject, worker_producer
from workers.card import Instance

EPOCH = 1
"""A worker_id is drawn afresh at every start, so its producer has one epoch."""
REGISTERED, REMOVED = 0, 1
"""The numbers of the two records."""
RETRY_S = 0.5

SHUTDOWN = "shutdown"
LEASE_EXPIRED = "lease_expired"


async def record_registered(log: EventLog, instance: Instance) -> int:
    """Append the `worker.registered` of `instance`; returns its seq. Raises LogUnavailable."""
    card = instance.card
    event = WorkerRegistered(
        worker_id=instance.worker_id,
        model=card.name,
        worker_type=card.worker_type,
        block_size=card.block_size,
        dp_start=instance.dp_start,
        dp_size=instance.dp_size,
        total_kv_blocks=card.total_kv_blocks,
        max_num_batched_tokens=card.max_num_batched_tokens,
        max_num_seqs=card.max_num_seqs,
        context_length=card.context_length,
    )
    producer = worker_producer(instance.worker_id)
    appended = await log.append(
        subject(instance.namespace, producer),
        encode(producer, EPOCH, REGISTERED, [event]),
        msg_id=f"{producer}.{EPOCH}.{REGISTERED}",
    )
    return appended.seq


async def record_removed(
    log: EventLog,
    namespace: str,
    worker_id: int,
    cause: str,
    registered_seq: int,
    *,
    within_s: float = 30.0,
) -> bool:
    """Make sure that the log has one `worker.removed` of this worker.

    Returns whether this call is known to have written it.

    cause: SHUTDOWN or LEASE_EXPIRED.
    registered_seq: of its `worker.registered` (`Instance.registered_seq`). 0: not known; then only
    the log's window of message ids keeps a second record out, which a fold ignores anyway.
    within_s: how long to retry while the log cannot be reached; then raises LogUnavailable.
    """
    producer = worker_producer(worker_id)
    name = subject(namespace, producer)
    data = encode(producer, EPOCH, REMOVED, [WorkerRemoved(worker_id, cause)])
    # The registration of an old worker may have been trimmed; then its subject is empty.
    expected: tuple[int | None, ...] = (registered_seq, 0) if registered_seq else (None,)
    msg_id = f"{producer}.{EPOCH}.{REMOVED}"
    for expected_seq in expected:
        try:
            async with asyncio.timeout(within_s):
                appended = await _append(log, name, data, msg_id, expected_seq)
                return not appended.duplicate
        except SeqConflict:
            continue
        except TimeoutError:
            raise LogUnavailable(f"worker.removed of {hex_id(worker_id)} is not written") from None
    return False


async def record_frontend_removed(
    log: EventLog,
    namespace: str,
    frontend_id: int,
    lease: int,
    removed_seq: int | None,
    *,
    within_s: float = 30.0,
) -> int:
    """Make sure that the log has one `frontend.removed` for this lease of a frontend.

    Returns the position of that record, 0 if somebody else wrote it and it is not known. Whoever
    sees the lease end may call it, the frontend itself included. Raises LogUnavailable.

    lease, removed_seq: as in `FrontendInstance`; removed_seq None: not known, and then only the
    log's window of message ids keeps a second record out, which a fold ignores anyway.
    """
    producer = frontend_producer(frontend_id)
    data = encode(producer, lease, 0, [FrontendRemoved(frontend_id, LEASE_EXPIRED)])
    msg_id = f"{producer}.{lease}.0"
    name = subject(namespace, producer)
    try:
        async with asyncio.timeout(within_s):
            return (await _append(log, name, data, msg_id, removed_seq)).seq
    except SeqConflict:
        return 0
    except TimeoutError:
        shown = hex_id(frontend_id)
        raise LogUnavailable(f"frontend.removed of {shown} is not written") from None


async def _append(
    log: EventLog, name: str, data: bytes, msg_id: str, expected_seq: int | None
) -> Appended:
    """Try until the log can be reached. Raises SeqConflict."""
    while True:
        try:
            return await log.append(name, data, msg_id=msg_id, expected_subject_seq=expected_seq)
        except LogUnavailable:
            await asyncio.sleep(RETRY_S)
