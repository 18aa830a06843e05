"""The subject grammar, in one place.

    reckon.<namespace>.kv.<worker>.<dp_rank>      reckon.<namespace>.threshold.<model>
    reckon.<namespace>.worker.<worker>            reckon.<namespace>.control
    reckon.<namespace>.request.<frontend>         reckon.<namespace>.frontend.<frontend>

Workers and frontends are u64 ids, written as 16 hex digits. A model name may hold anything, so it
is base64url-encoded. A namespace is one token of letters, digits, `-` and `_`. The part behind the
namespace is also the producer's name in a batch: one producer writes to one subject.
"""

import base64
import re

from eventstore.errors import BadSubject

_KV_PRODUCER = re.compile(r"kv\.([0-9a-f]{16})\.([0-9]{1,10})\Z")
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def check_namespace(namespace: str) -> str:
    """Return `namespace`; BadSubject if it cannot name a stream."""
    if not _NAMESPACE.match(namespace):
        raise BadSubject(namespace, "is not a namespace: 1 to 64 letters, digits, '-' and '_' are")
    return namespace


def stream_name(namespace: str) -> str:
    return f"RECKON_{check_namespace(namespace)}"


def stream_subjects(namespace: str) -> str:
    """The wildcard that the namespace's stream is bound to."""
    return f"reckon.{check_namespace(namespace)}.>"


def hex_id(number: int) -> str:
    """A u64 id as it stands in subjects, keys and logs: 16 hex digits."""
    return f"{number:016x}"


def kv_producer(worker_id: int, dp_rank: int) -> str:
    return f"kv.{hex_id(worker_id)}.{dp_rank}"


def worker_producer(worker_id: int) -> str:
    return f"worker.{hex_id(worker_id)}"


def rank_of_kv_producer(producer: str) -> tuple[int, int] | None:
    """(worker_id, dp_rank) of a `kv_producer`; None for any other producer."""
    match = _KV_PRODUCER.match(producer)
    return None if match is None else (int(match[1], 16), int(match[2]))


def frontend_producer(frontend_id: int) -> str:
    return f"frontend.{hex_id(frontend_id)}"


def request_producer(frontend_id: int) -> str:
    return f"request.{hex_id(frontend_id)}"


def threshold_producer(model: str) -> str:
    return "threshold." + base64.urlsafe_b64encode(model.encode()).decode().rstrip("=")


CONTROL_PRODUCER = "control"


def subject(namespace: str, producer: str) -> str:
    """The subject that `producer` writes to."""
    return f"reckon.{namespace}.{producer}"


def producer_of(subject: str) -> str:
    """The producer part of a subject; BadSubject if it is none of ours."""
    root, _, rest = subject.partition(".")
    _namespace, _, producer = rest.partition(".")
    if root != "reckon" or not producer:
        raise BadSubject(subject, "is not a subject of the log")
    return producer
