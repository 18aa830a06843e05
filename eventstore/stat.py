"""`python -m eventstore stat`: what the log holds, by kind of event, and its snapshots."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from rich.box import SIMPLE
from rich.table import Table

from eventstore import codec
from eventstore.log import EventLog, Extent, Record
from eventstore.show import entries, iso_time
from eventstore.snapshots import (
    BadSnapshot,
    SnapshotGone,
    SnapshotStore,
    read_header,
    unusable,
)

RECENT_S = 60
UNREADABLE = "unreadable"
_NS = 1_000_000_000


class KindStat(Struct):
    """What there is of one kind of event.

    messages: how many hold at least one such event. bytes: of the encoded events, without their
    batches' envelopes; of an unreadable message all of it.
    """

    events: int = 0
    messages: int = 0
    bytes: int = 0
    oldest_ns: int = 0
    newest_ns: int = 0
    _last_seq: int = 0

    def add(self, record: Record, size: int) -> None:
        if not self.events:
            self.oldest_ns = record.time_ns
        self.newest_ns = record.time_ns
        self.events += 1
        self.bytes += size
        if record.seq != self._last_seq:
            self._last_seq = record.seq
            self.messages += 1


class Tally:
    """Counts records as they are added, in order."""

    def __init__(self) -> None:
        self.records = 0
        self.missing = 0
        """Numbers between two records that no record has."""
        self._last_seq = 0
        self.total = KindStat()
        self.kinds: dict[str, KindStat] = {}
        self.producers: set[str] = set()
        self._recent: deque[tuple[int, Counter[str]]] = deque()
        """(second, events by kind), of the last minute before the newest record."""

    def add(self, record: Record) -> None:
        if self.records:
            self.missing += record.seq - self._last_seq - 1
        self.records += 1
        self._last_seq = record.seq
        second = record.time_ns // _NS
        if not self._recent or self._recent[-1][0] < second:
            self._recent.append((second, Counter()))
            while self._recent[0][0] <= second - RECENT_S:
                self._recent.popleft()
        recent = self._recent[-1][1]
        for entry in entries(record):
            if entry.event is None:
                kind, size = UNREADABLE, len(record.data) if entry.number is None else 0
            else:
                kind, size = codec.tag_of(entry.event), len(codec.encoded_event(entry.event))
            if entry.producer is not None:
                self.producers.add(entry.producer)
            self.kinds.setdefault(kind, KindStat()).add(record, size)
            self.total.add(record, size)
            recent[kind] += 1

    def rate(self, stat: KindStat) -> float:
        """Events a second between the oldest and the newest record of all; 0 if that is no time."""
        span_ns = self.total.newest_ns - self.total.oldest_ns
        return stat.events * _NS / span_ns if span_ns > 0 else 0.0

    def recent_rate(self, kind: str | None) -> float:
        """Events a second in the last minute before the newest record. None: of all kinds."""
        counts = [c.total() if kind is None else c[kind] for _, c in self._recent]
        return sum(counts) / RECENT_S


async def tally(log: EventLog, extent: Extent, progress: Callable[[int], object]) -> Tally:
    """Read the whole log. progress: told the seq now and then. Raises LogUnavailable."""
    result = Tally()
    async for record in log.read(extent.first_seq, extent.last_seq):
        result.add(record)
        if record.seq % 1000 == 0:
            progress(record.seq)
    return result


def as_json(namespace: str, extent: Extent, result: Tally) -> dict[str, Any]:
    """All of it. bytes: what the stream takes on the server; event_bytes: the events alone."""
    return {
        "namespace": namespace,
        "identity": extent.identity,
        "first_seq": extent.first_seq,
        "last_seq": extent.last_seq,
        "messages": result.records,
        "missing": result.missing,
        "bytes": extent.bytes,
        "producers": len(result.producers),
        **_numbers(result, None, result.total),
        "kinds": {kind: _numbers(result, kind, stat) for kind, stat in _sorted(result)},
    }


def _numbers(result: Tally, kind: str | None, stat: KindStat) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "events": stat.events,
        "event_bytes": stat.bytes,
        "oldest": iso_time(stat.oldest_ns) if stat.events else None,
        "newest": iso_time(stat.newest_ns) if stat.events else None,
        "events_per_s": result.rate(stat),
        "events_per_s_last_minute": result.recent_rate(kind),
    }
    return numbers if kind is None else {"messages": stat.messages, **numbers}


def as_table(namespace: str, extent: Extent, result: Tally) -> Table:
    """One row a kind, the most frequent first; rates in events a second."""
    total = result.total
    title = [
        f"{namespace}: records {extent.first_seq:,} to {extent.last_seq:,}, "
        f"{extent.bytes:,} bytes on the server, {len(result.producers):,} producers"
    ]
    if result.missing:
        title.append(f"{result.missing:,} records are missing: see python -m eventstore verify")
    if total.events:
        title.append(f"from {iso_time(total.oldest_ns, 3)} to {iso_time(total.newest_ns, 3)}")
    table = Table(
        title="\n".join(title), title_justify="left", title_style="", box=SIMPLE, show_footer=True
    )
    headings = ("events", "messages", "bytes", "events/s", "last minute")
    table.add_column("kind", footer="all", no_wrap=True)
    for heading, footer in zip(headings, _cells(result, None, total, result.records), strict=True):
        table.add_column(heading, footer=footer, justify="right", no_wrap=True)
    for kind, stat in _sorted(result):
        table.add_row(kind, *_cells(result, kind, stat, stat.messages))
    return table


def _cells(result: Tally, kind: str | None, stat: KindStat, messages: int) -> list[str]:
    return [
        f"{stat.events:,}",
        f"{messages:,}",
        f"{stat.bytes:,}",
        f"{result.rate(stat):,.1f}",
        f"{result.recent_rate(kind):,.1f}",
    ]


def _sorted(result: Tally) -> list[tuple[str, KindStat]]:
    return sorted(result.kinds.items(), key=lambda item: (-item[1].events, item[0]))


# --- snapshots ------------------------------------------------------------------------------------


async def list_snapshots(store: SnapshotStore, extent: Extent) -> list[dict[str, Any]]:
    """What there is, the oldest first. `unusable`: why a replica could not begin with it."""
    listed: list[dict[str, Any]] = []
    for ref in await store.refs():
        entry: dict[str, Any] = {
            "name": ref.name,
            "seq": ref.seq,
            "unusable": unusable(ref, extent),
        }
        try:
            header = await read_header(store, ref)
        except (BadSnapshot, SnapshotGone) as error:
            entry["unusable"] = str(error)
        else:
            entry |= {
                "time": iso_time(header.time_ns),
                "bytes": header.size,
                "digest": header.digest,
                "version": header.version,
            }
        listed.append(entry)
    return listed


def snapshots_table(listed: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=f"{len(listed)} snapshots", title_justify="left", title_style="", box=SIMPLE
    )
    for heading in ("snapshot", "time", "bytes", "digest", ""):
        table.add_column(heading, no_wrap=heading != "")
    for entry in listed:
        size = f"{entry['bytes']:,}" if "bytes" in entry else ""
        table.add_row(
            entry["name"],
            entry.get("time", ""),
            size,
            entry.get("digest", ""),
            entry["unusable"] or "",
        )
    return table
