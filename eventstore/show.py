"""Events as lines for people and as JSON for programs, and which of them are asked for."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from eventstore import codec
from eventstore.errors import BadSubject
from eventstore.events import AnyEvent, Candidate
from eventstore.log import Record
from eventstore.subjects import hex_id, producer_of

_IDS = ("worker_id", "frontend_id", "parent_hash")
NONE = "-"


class Entry(Struct, frozen=True):
    """One event of the log, or what could not be read.

    producer, epoch, number are None if the whole message is unreadable, and event is None if it or
    the message is; then `unreadable` says why.
    """

    seq: int
    time_ns: int
    subject: str
    producer: str | None
    epoch: int | None
    number: int | None
    event: AnyEvent | None
    unreadable: str | None = None


def entries(record: Record) -> Iterator[Entry]:
    """The events of a record in the order in which they were written."""
    seq, time_ns, subject, data = record
    decoded = codec.decode(data)
    batch = decoded.batch
    if batch is None:
        yield Entry(seq, time_ns, subject, None, None, None, None, decoded.unreadable[0].reason)
        return
    reasons = {unreadable.index: unreadable.reason for unreadable in decoded.unreadable}
    readable = iter(batch.events)
    for index in range(decoded.count):
        number, reason = batch.first + index, reasons.get(index)
        event = next(readable) if reason is None else None
        yield Entry(seq, time_ns, subject, batch.producer, batch.epoch, number, event, reason)


class Selection(Struct, frozen=True):
    """Which entries are asked for; None asks for nothing in particular.

    subject: a NATS pattern against the part behind the namespace, see `check_pattern`.
    """

    subject: str | None = None
    request_id: str | None = None
    worker_id: int | None = None

    def takes_record(self, record: Record) -> bool:
        """Cheap: whether any of its entries may be wanted."""
        if self.subject is None:
            return True
        try:
            return matches(self.subject, producer_of(record.subject))
        except BadSubject:
            return False

    def takes(self, entry: Entry) -> bool:
        """Of a record that is taken. An unreadable entry is of no request and no worker."""
        if self.request_id is not None:
            if getattr(entry.event, "request_id", None) != self.request_id:
                return False
        if self.worker_id is not None:
            return getattr(entry.event, "worker_id", None) == self.worker_id
        return True


def check_pattern(pattern: str) -> str:
    """Return `pattern`: tokens between dots, `*` for any one, `>` at the end for one or more.

    Raises ValueError.
    """
    tokens = pattern.split(".")
    for position, token in enumerate(tokens):
        wild = token in ("*", ">")
        if not token or (not wild and set(token) & set("*> \t\r\n")):
            raise ValueError(f"{pattern!r} is not a subject pattern such as request.*")
        if token == ">" and position != len(tokens) - 1:
            raise ValueError(f"{pattern!r} has a '>' that is not at its end")
    return pattern


def matches(pattern: str, subject: str) -> bool:
    """Whether the checked `pattern` takes `subject`."""
    wanted, found = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(found) <= len(wanted):
            return False
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(
        want in ("*", token) for want, token in zip(wanted, found, strict=True)
    )


def iso_time(time_ns: int, digits: int = 9) -> str:
    """UTC nanoseconds as RFC 3339 with `digits` of the fraction, the rest cut off."""
    whole = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    fraction = f".{time_ns % 1_000_000_000:09d}"[: digits + 1] if digits else ""
    return f"{whole:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def text_line(entry: Entry) -> str:
    """`seq  time  producer  tag  key=value …`; a list of hashes as its length and first hash."""
    head = f"{entry.seq:>8}  {iso_time(entry.time_ns, 3)}  "
    if entry.event is None:
        where = entry.producer or entry.subject
        return (
            f"{head}{where}  unreadable  number={_text(entry.number)} why={_text(entry.unreadable)}"
        )
    fields = [
        f"{name}={_field(name, getattr(entry.event, name))}"
        for name in entry.event.__struct_fields__
    ]
    return "  ".join((f"{head}{entry.producer}", codec.tag_of(entry.event), " ".join(fields)))


def _field(name: str, value: object) -> str:
    if name in _IDS and isinstance(value, int):
        return hex_id(value)
    if isinstance(value, list):
        first = [_item(value[0])] if value else []
        return ":".join([str(len(value)), *first])
    return _text(value)


def _item(value: object) -> str:
    if isinstance(value, Candidate):
        return f"{hex_id(value.worker_id)}/{value.dp_rank}@{value.cost:g}"
    return hex_id(value) if isinstance(value, int) else _text(value)


def _text(value: object) -> str:
    """One word without control characters, whatever a client put into a string."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    if isinstance(value, str) and (
        not text.isprintable() or not text or " " in text or '"' in text
    ):
        return json.dumps(text)
    return text


def json_line(entry: Entry) -> str:
    """One JSON object with all of it; hashes and ids are numbers of up to 64 bits."""
    line: dict[str, Any] = {
        "seq": entry.seq,
        "time": iso_time(entry.time_ns),
        "subject": entry.subject,
        "producer": entry.producer,
        "epoch": entry.epoch,
        "number": entry.number,
    }
    if entry.event is not None:
        line["event"] = codec.to_json_value(entry.event)
    else:
        line["unreadable"] = entry.unreadable
    return msgspec.json.encode(line).decode()


def formatter(as_json: bool) -> Callable[[Entry], str]:
    return json_line if as_json else text_line
