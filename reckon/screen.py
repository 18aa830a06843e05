"""What `reckon up` shows: the first screen, the status line, a line for what happens. Pure."""

import json
import shlex
from collections.abc import Sequence
from typing import assert_never

from msgspec import Struct
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reckon.supervisor import BecameReady, Died

CURSORS_MAX = 64


class Replica(Struct, frozen=True):
    """A frontend now. `cursor`, `head` and `lag` are in messages of the log; None: no answer."""

    name: str
    cursor: int | None = None
    head: int | None = None
    lag: int | None = None
    done: int = 0
    in_flight: int = 0


class Verdict(Struct, frozen=True):
    """The newest comparison of digests: were they equal at log position `cursor`?"""

    cursor: int
    equal: bool


class Digests:
    """Compares replicas at equal log positions, the only place where their digests must agree.

    Replicas are asked one after the other, so while the log grows they are seldom seen at the same
    position; the last positions of each are kept until another one is seen there.
    """

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self._at: dict[int, dict[str, str]] = {}
        self._cursors: dict[str, int] = {}

    def saw(self, name: str, cursor: int, digest: str) -> None:
        """Replica `name` had this digest at `cursor`. The newest CURSORS_MAX positions count."""
        if cursor < self._cursors.get(name, 0):
            self._at.clear()  # perhaps another log, with other records at the same positions
        self._cursors[name] = cursor
        here = self._at.setdefault(cursor, {})
        here[name] = digest
        if len(here) > 1:
            self.verdict = Verdict(cursor, len(set(here.values())) == 1)
        for old in sorted(self._at)[:-CURSORS_MAX]:
            del self._at[old]


class Status(Struct, frozen=True):
    """What the status line tells."""

    up_s: float
    workers_up: int
    workers: int
    replicas: tuple[Replica, ...]
    digests: Verdict | None

    @property
    def replicas_up(self) -> int:
        return sum(replica.cursor is not None for replica in self.replicas)

    def milestones(self) -> tuple[object, ...]:
        """What is worth a line of its own where no line can be redrawn."""
        digests_equal = self.digests.equal if self.digests is not None else None
        return self.workers_up, self.replicas_up, digests_equal


def status_line(status: Status) -> Text:
    """One line, most important first, because a narrow terminal cuts its end off."""
    replicas = status.replicas
    heads = [replica.head for replica in replicas if replica.head is not None]
    lags = ", ".join("-" if replica.lag is None else f"{replica.lag:,}" for replica in replicas)
    done = sum(replica.done for replica in replicas)
    in_flight = sum(replica.in_flight for replica in replicas)
    parts = [
        _duration(status.up_s),
        _count("workers", status.workers_up, status.workers),
        _count("frontends", status.replicas_up, len(replicas)),
        f"{done:,} requests done, {in_flight:,} running",
        f"log {max(heads, default=0):,}, lag {lags}",
    ]
    if status.digests is not None and status.digests.equal:
        parts.append("digests equal")
    elif status.digests is not None:
        parts.append(f"[bold red]DIGESTS DIFFER at {status.digests.cursor:,}[/]")
    line = Text.from_markup(" · ".join(parts))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _count(what: str, up: int, all_of_them: int) -> str:
    text = f"{up}/{all_of_them} {what}"
    return text if up == all_of_them else f"[yellow]{text}[/]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def happened(event: BecameReady | Died) -> str:
    """A line for something that the supervisor noticed."""
    match event:
        case BecameReady(name, pid, 1):
            return f"{name} is ready (pid {pid})"
        case BecameReady(name, pid):
            return f"{name} is back (pid {pid})"
        case Died(name, pid, how, delay_s):
            return f"{name} (pid {pid}) {how}; starting it again in {delay_s:.1f} s"
        case _ as unreachable:
            assert_never(unreachable)


class Place(Struct, frozen=True):
    """A child as the first screen shows it."""

    name: str
    pid: int
    address: str
    log: str
    """Path of its log file in the data directory."""


class Overview(Struct, frozen=True):
    """What the first screen tells."""

    places: Sequence[Place]
    data_dir: str
    messages_before: int
    """In the log when this deployment started."""
    frontend_url: str
    model: str
    log_options: Sequence[str]
    """With which `reckon log …` finds this deployment's log."""
    command: str
    """How `reckon` was called."""
    victim: Place
    """A child to kill, to see it come back."""


def first_screen(overview: Overview) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "pid", "where", "log lines"):
        table.add_column(heading, justify="right" if heading == "pid" else "left", overflow="fold")
    for place in overview.places:
        table.add_row(place.name, str(place.pid), place.address, place.log)
    before = overview.messages_before
    log = f"carries on from {before:,} messages" if before else "begins"
    return Group(
        table,
        Text(f"In {overview.data_dir} the log {log}."),
        Text(""),
        Text("Try"),
        Text(f"  {curl(overview.frontend_url, overview.model)}"),
        Text(f"  kill -9 {overview.victim.pid}    # {overview.victim.name} dies and comes back"),
        Text(
            f"  {overview.command} log tail {shlex.join(overview.log_options)}    # event by event"
        ),
        Text("Ctrl-C ends it; the log stays."),
    )


def curl(frontend_url: str, model: str) -> str:
    """A command line that asks for a streamed chat answer."""
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 32,
        "messages": [{"role": "user", "content": "Where are we?"}],
    }
    url, header = f"{frontend_url}/v1/chat/completions", "Content-Type: application/json"
    return shlex.join(["curl", "-N", url, "-H", header, "-d", json.dumps(body)])
