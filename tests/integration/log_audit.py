"""An independent look at a namespace's whole log, after a test has done its worst.

Reads raw records through `eventstore.codec` alone and keeps its own books in plain dictionaries;
only `parted` folds, to compare digests. Every finding is a sentence; a clean log has none.

- `misnumbered`: every fact is there once. Records, and each producer's numbers within an epoch, run
  on without a hole; what comes again is the same fact, and none comes too late to count.
- `unaccounted`: whatever was accepted has one ending, and every answer that a client saw has the
  one that it should have. Only a frontend that died for good leaves requests without one.
- `leftover`: nothing is live or booked at the head.
- `parted`: every replica's digest is that of a fold from the first record, and that fold and these
  books agree on what is live.

The log must be untrimmed, and of one life.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from eventstore import codec
from eventstore.errors import LogGap
from eventstore.events import (
    AnyEvent,
    FrontendRemoved,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestRejected,
    RequestRouted,
    StateReset,
    WorkerRemoved,
)
from eventstore.log import Record
from eventstore.subjects import hex_id, producer_of, request_producer
from router.fold import apply
from router.state import RouterState

Ending: TypeAlias = RequestCompleted | RequestFailed | RequestCancelled | RequestRejected

REFUSED_UNRECORDED: Final = frozenset(
    {"not_ready", "log_unavailable", "shutting_down", "model_not_found"}
)
"""Codes of refusals before acceptance: a frontend that can't take requests, or knows nobody who
serves the model."""


class Ended(StrEnum):
    """How an answer ended, as its client saw it."""

    WHOLE = "whole"
    ERROR = "error"
    """As a status, or as the last frame of a stream."""
    ABORTED = "aborted"
    """By the client."""
    BROKEN = "broken"
    """By the other side, or there was none."""


class Answer(NamedTuple):
    """What a client saw of one request.

    frontend: the process that was asked; any name, of this process alone. mark: the request's
    `max_tokens`, which no other request has: it names the request in the log where the client never
    learned its id. status: 0 if none came. code: `error.code` of an error.
    """

    frontend: str
    mark: int
    status: int
    ended: Ended
    code: str = ""
    request_id: str | None = None


class View(NamedTuple):
    """A replica's digest, after it applied record `cursor`."""

    replica: str
    cursor: int
    digest: str


class Fact(NamedTuple):
    """One event that counts. seq: of its record."""

    seq: int
    producer: str
    event: AnyEvent


def audit(
    records: Sequence[Record], answers: Iterable[Answer] = (), views: Iterable[View] = ()
) -> list[str]:
    """All findings. records: the whole log. views: of everyone who lives, at its head."""
    facts, findings = read(records)
    views = list(views)
    return [
        *findings,
        *unaccounted(facts, answers, {view.replica for view in views}),
        *leftover(facts),
        *parted(records, facts, views),
    ]


def misnumbered(records: Iterable[Record]) -> list[str]:
    """What is missing, doubled, late or unreadable in the log itself."""
    return read(records)[1]


def read(records: Iterable[Record]) -> tuple[list[Fact], list[str]]:
    """The facts that count, in order, and what is wrong with how they were written."""
    facts: list[Fact] = []
    findings: list[str] = []
    written: dict[str, dict[int, list[bytes | None]]] = defaultdict(dict)
    """By producer and epoch: its facts, in order of their numbers."""
    last_seq = 0
    for record in records:
        if record.seq != last_seq + 1:
            findings.append(f"record {record.seq} follows record {last_seq}")
        last_seq = record.seq
        decoded = codec.decode(record.data)
        if decoded.batch is None or decoded.unreadable:
            findings.append(f"record {record.seq} can't be read: {decoded.unreadable}")
            continue
        batch = decoded.batch
        owner = producer_of(record.subject)
        if batch.producer != owner and not batch.producer.startswith(owner + "."):
            findings.append(f"record {record.seq} on {owner} was written by {batch.producer}")
        epochs = written[batch.producer]
        known = epochs.setdefault(batch.epoch, [])
        is_late = batch.epoch < max(epochs)
        if batch.first > len(known):
            where = f"{batch.producer} epoch {batch.epoch} before record {record.seq}"
            findings.append(f"numbers {len(known)} to {batch.first - 1} of {where} are missing")
            known += [None] * (batch.first - len(known))
        for number, event in enumerate(batch.events, batch.first):
            name = f"fact {number} of {batch.producer} epoch {batch.epoch}"
            data = codec.encoded_event(event)
            if number < len(known):
                if data != known[number]:
                    findings.append(f"{name} is another one in record {record.seq}")
                continue
            known.append(data)
            if is_late:
                findings.append(f"{name} in record {record.seq} is behind a later epoch")
            else:
                facts.append(Fact(record.seq, batch.producer, event))
    return facts, findings


# --- requests and answers -------------------------------------------------------------------------


def unaccounted(
    facts: Sequence[Fact], answers: Iterable[Answer] = (), alive: Collection[str] = ()
) -> list[str]:
    """Requests and answers whose endings are not as they must be.

    alive: processes that run, and have written all their facts: nothing excuses them. Of others a
    frontend is taken for dead if nothing came from it after the end of its lease.
    """
    accepted: dict[str, RequestAccepted] = {}
    endings: dict[str, list[Ending]] = defaultdict(list)
    for fact in facts:
        match fact.event:
            case RequestAccepted() as event:
                accepted[event.request_id] = event
            case (
                RequestCompleted() | RequestFailed() | RequestCancelled() | RequestRejected()
            ) as event:
                endings[event.request_id].append(event)
    by_mark: dict[int, list[RequestAccepted]] = defaultdict(list)
    for event in accepted.values():
        if event.max_tokens is not None:
            by_mark[event.max_tokens].append(event)
    answers = list(answers)
    asked: dict[str, set[int]] = defaultdict(set)
    """Process → ids of its frontend: what it accepted tells."""
    for answer in answers:
        asked[answer.frontend] |= {event.frontend_id for event in by_mark[answer.mark]}
    gone = _gone(facts).difference(*(asked[name] for name in alive))
    findings = [
        f"request {request_id} ends with {_tags(ends)}"
        for request_id, ends in endings.items()
        if len(ends) > 1
    ]
    findings += [
        f"request {request_id} ends and was never accepted"
        for request_id in endings - accepted.keys()
    ]
    findings += [
        f"request {event.request_id} has no ending, and {hex_id(event.frontend_id)} lives"
        for event in accepted.values()
        if event.request_id not in endings and event.frontend_id not in gone
    ]
    for answer in answers:
        died = bool(asked[answer.frontend] & gone)
        findings += _wrong(answer, by_mark[answer.mark], endings, died)
    return findings


def _tags(events: Iterable[AnyEvent]) -> str:
    return " and ".join(codec.tag_of(event) for event in events)


def _gone(facts: Iterable[Fact]) -> set[int]:
    """Frontends of which nothing came after the end of their lease."""
    removed: dict[str, int] = {}
    for fact in facts:
        if isinstance(fact.event, FrontendRemoved):
            removed[request_producer(fact.event.frontend_id)] = fact.event.frontend_id
        else:
            removed.pop(fact.producer, None)
    return set(removed.values())


def _wrong(
    answer: Answer,
    accepted: Sequence[RequestAccepted],
    endings: Mapping[str, list[Ending]],
    frontend_died: bool,
) -> Iterator[str]:
    """frontend_died: what it had not written is lost, and allowed to be."""
    name = f"the {answer.ended} answer {answer.status} {answer.code} to request {answer.mark}"
    if answer.ended is Ended.BROKEN and not frontend_died:
        yield f"{name} came from {answer.frontend}, which lives"
    if len(accepted) > 1:
        yield f"{name} is one, and {len(accepted)} requests were accepted"
    if not accepted:
        was_refused = answer.ended is Ended.ERROR and answer.code in REFUSED_UNRECORDED
        was_unheard = answer.ended is Ended.ABORTED and answer.status == 0
        if not (frontend_died or was_refused or was_unheard):
            yield f"{name} is of no accepted request"
        return
    request_id = accepted[0].request_id
    if answer.request_id not in (None, request_id):
        yield f"{name} names {answer.request_id}; accepted was {request_id}"
    for ending in endings.get(request_id, []):  # none: told by who lives, above
        if not _fits(answer, ending):
            yield f"{name} is recorded as {ending}"


def _fits(answer: Answer, ending: Ending) -> bool:
    match answer.ended:
        case Ended.WHOLE:
            return isinstance(ending, RequestCompleted)
        case Ended.ERROR:
            failed = ending if isinstance(ending, RequestFailed | RequestRejected) else None
            return failed is not None and failed.code == answer.code
        case Ended.ABORTED | Ended.BROKEN:
            return True  # the end may have been under way already


# --- bookings -------------------------------------------------------------------------------------


def leftover(facts: Iterable[Fact]) -> list[str]:
    """Requests that are still live at the head, and where they are booked."""
    live, booked = books(facts)
    return [
        f"request {request_id} of frontend {hex_id(frontend_id)} is "
        + (f"booked on {hex_id(booked[request_id])}" if request_id in booked else "live")
        for request_id, frontend_id in live.items()
    ]


def books(facts: Iterable[Fact]) -> tuple[dict[str, int], dict[str, int]]:
    """Frontend of each live request, and worker of each booked one, after these facts."""
    live: dict[str, int] = {}
    booked: dict[str, int] = {}
    removed: set[int] = set()
    for fact in facts:
        match fact.event:
            case RequestAccepted(request_id=request_id, frontend_id=frontend_id):
                live[request_id] = frontend_id
            case RequestRouted(request_id=request_id, worker_id=worker_id):
                if request_id in live and worker_id not in removed:
                    booked[request_id] = worker_id
            case RequestMigrated(request_id=request_id):
                booked.pop(request_id, None)
            case (
                RequestCompleted(request_id=request_id)
                | RequestFailed(request_id=request_id)
                | RequestCancelled(request_id=request_id)
                | RequestRejected(request_id=request_id)
            ):
                live.pop(request_id, None)
                booked.pop(request_id, None)
            case WorkerRemoved(worker_id=worker_id):
                removed.add(worker_id)
                booked = {key: on for key, on in booked.items() if on != worker_id}
            case FrontendRemoved(frontend_id=frontend_id):
                live = {key: of for key, of in live.items() if of != frontend_id}
                booked = {key: on for key, on in booked.items() if key in live}
            case StateReset():
                live, booked = {}, {}
    return live, booked


# --- replicas -------------------------------------------------------------------------------------


def parted(records: Sequence[Record], facts: Iterable[Fact], views: Iterable[View]) -> list[str]:
    """Replicas that are not at the head, or not in the state that the log leads to."""
    state, head = RouterState(), records[-1].seq if records else 0
    try:
        for record in records:
            apply(state, record)
    except LogGap as gap:
        return [f"the log can't be folded from its first record: {gap}"]
    findings, digest = [], state.digest()
    for view in views:
        if view.cursor != head:
            findings.append(f"{view.replica} is at record {view.cursor} of {head}")
        elif view.digest != digest:
            findings.append(f"{view.replica} has digest {view.digest}, a fold of the log {digest}")
    live, booked = books(facts)
    if state.requests.keys() != live.keys() or len(state.active) != len(booked):
        findings.append(
            f"a fold has {len(state.requests)} live requests and {len(state.active)} bookings, "
            f"the log {len(live)} and {len(booked)}"
        )
    return findings
