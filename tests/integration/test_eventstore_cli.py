"""`python -m eventstore tail|stat` against a real log."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from eventstore import codec, subjects
from eventstore.__main__ import main, parse_moment, parse_worker
from eventstore.connect import Nats
from eventstore.events import (
    AnyEvent,
    BlockStored,
    Candidate,
    OutputGrown,
    RequestAccepted,
    RequestCompleted,
    RequestRouted,
    WorkerRegistered,
)
from eventstore.jetstream import JetStreamLog

ROOT = Path(__file__).parents[2]
WORKER, OTHER, FRONTEND = 0xAB, 0xCD, 0x12
KV = subjects.kv_producer(WORKER, 0)
REQUESTS = subjects.request_producer(FRONTEND)

BATCHES: list[tuple[str, list[AnyEvent]]] = [
    (subjects.worker_producer(WORKER), [WorkerRegistered(WORKER, "m", "aggregated", 16)]),
    (KV, [BlockStored(WORKER, 0, None, [1, 2, 3]), BlockStored(OTHER, 0, 3, [4])]),
    (
        REQUESTS,
        [
            RequestAccepted("req-1", FRONTEND, "m", "chat", 50, None, True),
            RequestRouted(
                *("req-1", 0, WORKER, 0, "kv", 50, 3, [1, 2, 3], 2, 1.0, 0.0, 1),
                *([Candidate(WORKER, 0, 3, 2, 4, 4.125)], "m"),
            ),
        ],
    ),
    (REQUESTS, [OutputGrown("req-2", 7), RequestCompleted("req-1", 9, "stop", 48)]),
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def filled(nats_url: str, namespace: str) -> str:
    """A namespace whose log holds BATCHES and then one record that cannot be read."""
    asyncio.run(fill(nats_url, namespace))
    return namespace


async def fill(nats_url: str, namespace: str) -> None:
    nats = await Nats.connect([nats_url], name="test")
    log = await JetStreamLog.open(nats, namespace)
    for number, (producer, events) in enumerate(BATCHES):
        data = codec.encode(producer, 1, 10 * number, events)
        await log.append(subjects.subject(namespace, producer), data, msg_id=str(number))
    await log.append(subjects.subject(namespace, "control"), b"junk", msg_id="junk")
    await log.close()
    await nats.close()


@pytest.fixture
def run(nats_url: str, filled: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on the filled log; returns its exit code and what it printed."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv, {"NATS_SERVER": nats_url, "DYN_NAMESPACE": filled})
        return code, *capsys.readouterr()

    return run


def lines_of(run: Run, *argv: str) -> list[str]:
    code, out, err = run("tail", *argv)
    assert (code, err) == (0, "")
    return out.splitlines()


def tags(lines: Sequence[str]) -> list[str]:
    return [line.split()[3] for line in lines]


def test_tail_prints_an_event_a_line(run: Run) -> None:
    lines = lines_of(run)
    assert len(lines) == 8
    assert [int(line.split()[0]) for line in lines] == [1, 2, 2, 3, 3, 4, 4, 5]
    fields = lines[1].split()
    assert fields[2:] == [
        KV,
        "kv.block_stored",
        f"worker_id={WORKER:016x}",
        "dp_rank=0",
        "parent_hash=-",
        f"sequence_hashes=3:{1:016x}",
    ]
    assert f"candidates=1:{WORKER:016x}/0@4.125" in lines[4].split()
    assert "unreadable" in lines[7] and "not a batch" in lines[7]


def test_tail_as_json_tells_everything(run: Run) -> None:
    told = [json.loads(line) for line in lines_of(run, "--json")]
    assert [(t["seq"], t["producer"], t["epoch"], t["number"]) for t in told[:3]] == [
        (1, f"worker.{WORKER:016x}", 1, 0),
        (2, KV, 1, 10),
        (2, KV, 1, 11),
    ]
    assert told[2]["event"] == {
        "type": "kv.block_stored",
        "worker_id": f"{OTHER:016x}",
        "dp_rank": 0,
        "parent_hash": f"{3:016x}",
        "sequence_hashes": [f"{4:016x}"],
    }
    assert told[0]["time"].endswith("Z") and len(told[0]["time"]) == 30
    assert told[0]["subject"].endswith(told[0]["producer"])
    assert "event" not in told[7] and told[7]["unreadable"]


@pytest.mark.parametrize(
    ("options", "seqs"),
    [
        (["--subject", "request.*"], [3, 3, 4, 4]),
        (["--subject", "kv.>"], [2, 2]),
        (["--subject", "*"], [5]),
        (["--subject", "kv"], []),
        (["--request", "req-1"], [3, 3, 4]),
        (["--request", "none"], []),
        (["--worker", f"{WORKER:016x}"], [1, 2, 3]),
        (["--worker", "0xcd"], [2]),
        (["--worker", str(WORKER), "--subject", "kv.>"], [2]),
        (["--from-seq", "3", "--to-seq", "4"], [3, 3, 4, 4]),
        (["--from-seq", "99"], []),
        (["--limit", "2"], [1, 2]),
        (["--request", "req-1", "--limit", "2"], [3, 3]),
        (["--since", "10m"], [1, 2, 2, 3, 3, 4, 4, 5]),
        (["--until", "10m"], []),
        (["--since", "2999-01-01"], []),
        (["--follow", "--to-seq", "3"], [1, 2, 2, 3, 3]),
        (["--follow", "--limit", "4", "--from-seq", "2"], [2, 2, 3, 3]),
    ],
)
def test_tail_selects(run: Run, options: list[str], seqs: list[int]) -> None:
    assert [int(line.split()[0]) for line in lines_of(run, *options)] == seqs


def test_tail_selects_by_exact_time(run: Run) -> None:
    times = [json.loads(line)["time"] for line in lines_of(run, "--json")]
    third = times[3][:26] + "Z"  # microseconds, cut off: not later than record 3
    since = [line.split()[0] for line in lines_of(run, "--since", third)]
    assert since[-5:] == ["3", "3", "4", "4", "5"]
    assert "1" not in since or times[0][:26] == times[3][:26]
    until = [line.split()[0] for line in lines_of(run, "--until", third)]
    assert until + since == ["1", "2", "2", "3", "3", "4", "4", "5"]


def test_stat_counts_by_kind(run: Run, filled: str) -> None:
    code, out, _ = run("stat", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["namespace"], told["first_seq"], told["last_seq"]) == (filled, 1, 5)
    assert (told["messages"], told["events"], told["producers"]) == (5, 8, 3)
    assert told["kinds"]["kv.block_stored"]["events"] == 2
    assert told["kinds"]["kv.block_stored"]["messages"] == 1
    assert told["kinds"]["unreadable"]["event_bytes"] == len(b"junk")
    assert sum(kind["events"] for kind in told["kinds"].values()) == 8
    assert told["oldest"] <= told["kinds"]["request.completed"]["oldest"] <= told["newest"]
    assert told["bytes"] > told["event_bytes"] > 0


def test_stat_as_a_table(run: Run, filled: str) -> None:
    code, out, _ = run("stat")
    assert code == 0
    assert filled in out and "kv.block_stored" in out and "unreadable" in out


def test_an_empty_log(nats_url: str, namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def make() -> None:
        nats = await Nats.connect([nats_url], name="test")
        await (await JetStreamLog.open(nats, namespace)).close()
        await nats.close()

    asyncio.run(make())
    environ = {"NATS_SERVER": nats_url, "DYN_NAMESPACE": namespace}
    for command in (["tail"], ["tail", "--since", "1h"], ["stat"], ["stat", "--json"]):
        assert main(command, environ) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["messages"], told["events"], told["oldest"]) == (0, 0, None)


def test_a_missing_log_is_an_error_that_helps(run: Run, filled: str) -> None:
    code, out, err = run("stat", "--namespace", "nowhere")
    assert (code, out) == (1, "")
    error, attempt = err.splitlines()
    assert error.startswith("Error: there is no stream RECKON_nowhere on nats://")
    assert attempt.startswith("Try: ") and filled in attempt


def test_a_missing_server_is_an_error_that_helps(
    monkeypatch: pytest.MonkeyPatch, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eventstore.__main__.CONNECT_WAIT_S", 0.2)
    assert main(["tail", "--nats-url", f"127.0.0.1:{free_port}"], {}) == 1
    error, attempt = capsys.readouterr().err.splitlines()
    assert error.startswith(f"Error: could not connect to NATS at nats://127.0.0.1:{free_port}")
    assert attempt.startswith("Try: ")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["tail", "--limit", "0"],
        ["tail", "--from-seq", "x"],
        ["tail", "--since", "yesterday"],
        ["tail", "--subject", "a..b"],
        ["tail", "--subject", ">.a"],
        ["tail", "--worker", "-1"],
        ["tail", "--worker", "1" * 40],
        ["tail", "--nats-url", "nats://:x"],
        ["stat", "--namespace", "a.b"],
        ["stat", "--follow"],
    ],
)
def test_misuse_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv, {})
    assert caught.value.code == 2
    error, attempt = capsys.readouterr().err.splitlines()
    assert error.startswith("Error: ") and attempt.startswith("Try: ")


def test_moments() -> None:
    now = 1_700_000_000 * 10**9
    assert parse_moment("90s", now) == now - 90 * 10**9
    assert parse_moment("1.5h", now) == now - 5400 * 10**9
    assert parse_moment("1970-01-02", now) == 86_400 * 10**9
    assert parse_moment("1970-01-01T01:00:00.000001+01:00", now) == 1_000
    assert parse_worker("00000000000000ab") == parse_worker("0xAB") == parse_worker("171") == 171
    assert parse_worker("1000000000000000") == 1 << 60


def command(nats_url: str, namespace: str, *argv: str) -> list[str]:
    options = ["--nats-url", nats_url, "--namespace", namespace]
    return [sys.executable, "-m", "eventstore", *argv, *options]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children can be interrupted, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_quiet(
    nats_url: str, filled: str, interruptible: None, number: signal.Signals
) -> None:
    following = subprocess.Popen(
        command(nats_url, filled, "tail", "-f"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert following.stdout is not None
    for _ in range(8):
        following.stdout.readline()
    following.send_signal(number)
    out, err = following.communicate(timeout=20)
    assert (following.returncode, out, err) == (0, b"", b"")


def test_what_an_interrupt_leaves_undone_is_no_success(tmp_path: Path, interruptible: None) -> None:
    """`verify` with exit code 0 says that all is well."""
    archive = tmp_path / "never.reckon"
    os.mkfifo(archive)  # nobody writes to it
    verifying = subprocess.Popen(
        [sys.executable, "-m", "eventstore", "verify", str(archive)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    with archive.open("wb"):  # returns when it is being read
        verifying.send_signal(signal.SIGINT)
        out, _ = verifying.communicate(timeout=20)
    assert (verifying.returncode, out) == (130, b"")


@pytest.mark.parametrize("mode", [[], ["-f"]])
def test_a_reader_that_leaves_is_no_error(nats_url: str, filled: str, mode: list[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    left = subprocess.run(
        command(nats_url, filled, "tail", *mode),
        stdout=write_fd,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=20,
        check=False,
    )
    os.close(write_fd)
    assert (left.returncode, left.stderr) == (0, b"")
