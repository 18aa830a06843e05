"""Log lines of a process, on stderr: readable text, or one JSON object a line.

    2026-01-01T12:00:00.123Z  INFO  frontend.app  ready replica=0 port=8000

Levels are said in the form of an env filter: `info`, `debug`, `off`, or with exceptions for
modules, `info,router=debug`. A module's level holds for everything below it. What a call passes as
`extra` comes out as fields. These are lines for people; the log of events is `eventstore.log`.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from msgspec import Struct

OFF = logging.CRITICAL + 10
LEVELS: Mapping[str, int] = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
    "off": OFF,
}
_CHATTY = ("asyncio", "nats", "aiohttp")
"""Libraries that speak at WARNING and above unless a directive names them."""
_TARGET = re.compile(r"[A-Za-z_]\w*(\.\w+)*\Z", re.ASCII)
_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL |= {ord("\t"): "\t", ord("\n"): "\\n", ord("\r"): "\\r"}


class LogFilter(Struct, frozen=True):
    """Levels of the standard library: one for everything, and others for modules."""

    level: int
    modules: dict[str, int] = {}


def parse_filter(text: str) -> LogFilter:
    """Read `level`, `module=level` or `module` (all of it), separated by commas.

    Without a level for everything it is info; of two for the same thing the last one counts.
    Raises ValueError with the reason.
    """
    level = logging.INFO
    modules: dict[str, int] = {}
    for directive in (part.strip() for part in text.split(",")):
        target, equals, name = (part.strip() for part in directive.partition("="))
        if not equals and target.lower() in LEVELS:
            level = LEVELS[target.lower()]
            continue
        target = target.replace("::", ".")
        if not _TARGET.match(target):
            raise ValueError(f"{directive!r} is not a level, a module or module=level")
        if equals and name.lower() not in LEVELS:
            raise ValueError(f"{name!r} is not a level ({', '.join(LEVELS)})")
        modules[target] = LEVELS[name.lower()] if equals else logging.DEBUG
    return LogFilter(level, modules)


def configure(
    levels: LogFilter, *, jsonl: bool = False, local_tz: bool = False, stream: TextIO | None = None
) -> None:
    """Log this process's lines to `stream` (None: stderr), in place of what was configured before.

    Call it once, in a `__main__`: the logging it sets up is the process's.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(local_tz) if jsonl else TextFormatter(local_tz))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(levels.level)
    chatty = {name: max(levels.level, logging.WARNING) for name in _CHATTY}
    for name, level in (chatty | levels.modules).items():
        logging.getLogger(name).setLevel(level)


class TextFormatter(logging.Formatter):
    """A line a record, its fields behind the message, and a traceback on lines of its own.

    Control characters are escaped, so that what a client sends cannot forge a line.
    """

    def __init__(self, local_tz: bool = False) -> None:
        super().__init__()
        self.local_tz = local_tz

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _extra(record).items())
        message = (record.getMessage() + fields).translate(_CONTROL)
        time = _time(record, self.local_tz)
        line = f"{time} {_level(record):>5}  {record.name}  {message}"
        return "\n".join([line, *_traceback(self, record)])


class JsonFormatter(logging.Formatter):
    """A JSON object a record: time, level, target, message, `exception` if any, and the fields."""

    def __init__(self, local_tz: bool = False) -> None:
        super().__init__()
        self.local_tz = local_tz

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record, self.local_tz),
            "level": _level(record),
            "target": record.name,
            "message": record.getMessage(),
        }
        traceback = _traceback(self, record)
        if traceback:
            entry["exception"] = "\n".join(traceback)
        return json.dumps(_extra(record) | entry)


def _level(record: logging.LogRecord) -> str:
    return _NAMES.get(record.levelno, record.levelname)


def _time(record: logging.LogRecord, local_tz: bool) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    if local_tz:
        return time.astimezone().isoformat(timespec="milliseconds")
    return time.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the call passed as `extra`; a value that JSON has no form for as its text."""
    fields: dict[str, Any] = {}
    for name, value in record.__dict__.items():
        if name in _STANDARD:
            continue
        plain = value is None or isinstance(value, str | int)
        if plain or (isinstance(value, float) and math.isfinite(value)):
            fields[name] = value
        else:
            fields[name] = str(value)
    return fields


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return parts
