"""Log lines: the levels of a filter, readable lines, JSON lines, and what a line cannot do."""

import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from eventstore.logs import OFF, JsonFormatter, LogFilter, TextFormatter, configure, parse_filter

LOGGERS = ("asyncio", "nats", "aiohttp", "reckon_test", "reckon_test.deep")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Logging is the process's, so a test must put it back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture
def lines() -> Callable[..., list[str]]:
    """Configure with a filter and options, log with `say`, and get the lines."""

    def run(text: str, say: Callable[[], None], **options: bool) -> list[str]:
        stream = io.StringIO()
        configure(parse_filter(text), stream=stream, **options)
        say()
        return stream.getvalue().splitlines()

    return run


def record(
    message: str, *args: object, level: int = logging.INFO, **extra: object
) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "frontend.app", "msg": message, "args": args, "levelno": level, **extra}
    )
    made.levelname = logging.getLevelName(level)
    made.created = datetime(2026, 1, 1, 12, 0, 0, 123_000, tzinfo=UTC).timestamp()
    return made


# --- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "level", "modules"),
    [
        ("info", logging.INFO, {}),
        ("DEBUG", logging.DEBUG, {}),
        ("trace", logging.DEBUG, {}),
        ("warn", logging.WARNING, {}),
        ("warning", logging.WARNING, {}),
        ("error", logging.ERROR, {}),
        ("off", OFF, {}),
        ("info,router=debug", logging.INFO, {"router": logging.DEBUG}),
        (" warn , router.replica = off ", logging.WARNING, {"router.replica": OFF}),
        ("router=debug", logging.INFO, {"router": logging.DEBUG}),
        ("error,router", logging.ERROR, {"router": logging.DEBUG}),
        ("info,a::b=warn", logging.INFO, {"a.b": logging.WARNING}),
        ("info,debug", logging.DEBUG, {}),
    ],
)
def test_filters(text: str, level: int, modules: dict[str, int]) -> None:
    assert parse_filter(text) == LogFilter(level, modules)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("info,", "''"),
        ("info,router=loud", "'loud'"),
        ("router=", "''"),
        ("=debug", "'=debug'"),
        ("info;debug", "'info;debug'"),
        ("[span]=debug", "'[span]=debug'"),
        ("a..b=info", "'a..b=info'"),
        ("3", "'3'"),
    ],
)
def test_bad_filters_name_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        parse_filter(text)


def test_a_module_level_holds_for_what_is_below_it(lines: Callable[..., list[str]]) -> None:
    def say() -> None:
        logging.getLogger("reckon_test.deep").debug("deep")
        logging.getLogger("reckon_else").debug("else")
        logging.getLogger("reckon_else").info("info")

    said = lines("info,reckon_test=debug", say)
    assert [line.split()[-1] for line in said] == ["deep", "info"]


def test_off_is_silence(lines: Callable[..., list[str]]) -> None:
    assert lines("off", lambda: logging.getLogger("reckon_test").critical("x")) == []


def test_libraries_are_quiet_unless_named(lines: Callable[..., list[str]]) -> None:
    def say() -> None:
        for name in ("asyncio", "nats.aio.client", "aiohttp.access"):
            logging.getLogger(name).info("chat")
            logging.getLogger(name).warning("matter")

    assert [line.split()[-1] for line in lines("debug", say)] == ["matter"] * 3
    assert [line.split()[-1] for line in lines("debug,nats=info", say)].count("chat") == 1
    assert lines("error", say) == [], "nor are they louder than the rest"


def test_configuring_replaces_what_was_there(lines: Callable[..., list[str]]) -> None:
    lines("info", lambda: None)
    assert len(lines("info", lambda: logging.getLogger("reckon_test").info("once"))) == 1


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure(parse_filter("info"))
    logging.getLogger("reckon_test").info("hello")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("  INFO  reckon_test  hello\n")


# --- readable lines ---------------------------------------------------------------------------


def test_a_readable_line() -> None:
    text = TextFormatter().format(record("ready port=%d", 8000, request_id="r-1"))
    assert text == "2026-01-01T12:00:00.123Z  INFO  frontend.app  ready port=8000 request_id=r-1"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (logging.DEBUG, " DEBUG  "),
        (logging.WARNING, "  WARN  "),
        (logging.ERROR, " ERROR  "),
        (logging.CRITICAL, " ERROR  "),
    ],
)
def test_levels_line_up(level: int, shown: str) -> None:
    assert f"123Z{shown}frontend.app" in TextFormatter().format(record("x", level=level))


def test_a_message_cannot_forge_a_line() -> None:
    text = TextFormatter().format(record("bad\nname\r\x1b[2J\x85é\t", field="a\nb"))
    assert "\n" not in text and "\r" not in text and "\x1b" not in text
    assert text.endswith(r"bad\nname\r\x1b[2J\x85é" + "\t" + r" field=a\nb")


def test_a_traceback_follows_its_line() -> None:
    text = TextFormatter().format(record("failed", exc_info=raised()))
    first, *rest = text.splitlines()
    assert first.endswith("failed")
    assert rest[0].startswith("Traceback") and rest[-1] == "ValueError: inner"


def test_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-3")
    time.tzset()
    try:
        assert (
            TextFormatter(local_tz=True)
            .format(record("x"))
            .startswith("2026-01-01T15:00:00.123+03:00")
        )
        assert TextFormatter().format(record("x")).startswith("2026-01-01T12:00:00.123Z")
    finally:
        monkeypatch.undo()
        time.tzset()


# --- JSON lines -------------------------------------------------------------------------------


def test_a_json_line() -> None:
    line = JsonFormatter().format(record("ready %s", "é", request_id="r-1", seq=2**64 - 1))
    assert json.loads(line) == {
        "time": "2026-01-01T12:00:00.123Z",
        "level": "INFO",
        "target": "frontend.app",
        "message": "ready é",
        "request_id": "r-1",
        "seq": 2**64 - 1,
    }


def test_a_traceback_stays_inside_its_record() -> None:
    line = JsonFormatter().format(record("failed", exc_info=raised(), stack_info="Stack:\n  x"))
    assert "\n" not in line
    exception = json.loads(line)["exception"]
    assert exception.startswith("Traceback") and "ValueError: inner" in exception
    assert exception.endswith("Stack:\n  x")


def test_any_field_becomes_json() -> None:
    odd: list[object] = []
    odd.append(odd)
    line = JsonFormatter().format(
        record("x\udc80", a=float("nan"), b=b"\xff", c=odd, d=None, e=True, f=0.5, level_of="x")
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    entry = json.loads(line, parse_constant=refuse)
    assert entry["a"] == "nan" and entry["b"] == "b'\\xff'" and entry["c"] == "[[...]]"
    assert entry["d"] is None and entry["e"] is True and entry["f"] == 0.5


def test_a_field_cannot_replace_the_records_own(lines: Callable[..., list[str]]) -> None:
    def say() -> None:
        logging.getLogger("reckon_test").info("true", extra={"level": "x", "target": "y"})

    (line,) = lines("info", say, jsonl=True)
    assert json.loads(line)["level"] == "INFO"
    assert json.loads(line)["target"] == "reckon_test"


def raised() -> object:
    try:
        raise ValueError("inner")
    except ValueError:
        return sys.exc_info()
