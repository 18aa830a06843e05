"""`python -m simulations compare`: what it prints and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulations.trace import TraceRequest, encode_request

ROOT = Path(__file__).parents[2]


def compare(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command; exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations", "compare", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """Three conversations in turn over one system prompt, each of them growing."""
    requests = [
        TraceRequest(
            timestamp_ms=100 * number,
            input_length=512 * (4 + number // 3),
            output_length=20,
            hash_ids=[
                0,
                1,
                2,
                *(1_000 * (number % 3 + 1) + turn for turn in range(number // 3 + 1)),
            ],
        )
        for number in range(40)
    ]
    path = tmp_path / "talk.jsonl"
    path.write_bytes(b"".join(map(encode_request, requests)))
    return path


def test_the_command_compares_configurations_as_json_and_plot(
    trace_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    code, out, error = compare(
        *(trace_file, "--skip", "1", "--requests", "30", "--workers", "4", "--json"),
        *("--config", "round-robin", "--config", "no-credit:overlap_weight=0", "--config", "kv"),
        *("--plot", plot),
    )
    assert (code, "30/30" in error) == (0, True), error
    report = json.loads(out)
    assert (report["trace"], report["requests"]) == ("talk.jsonl", 30)
    round_robin, no_credit, kv = report["configurations"]
    assert no_credit["options"]["overlap_weight"] == 0
    assert kv["result"]["errors"] == 0
    assert kv["result"]["cached_share"] > round_robin["result"]["cached_share"]
    assert kv["result"]["ttft_ms"]["mean"] < round_robin["result"]["ttft_ms"]["mean"]
    assert "<svg" in plot.read_text()


def test_the_command_prints_a_table(trace_file: Path) -> None:
    code, out, _ = compare(trace_file, "--requests", "5", "--jobs", "1", "--event-delay-ms", "2")
    assert code == 0
    assert "talk.jsonl at 1 times its speed, 8 workers of 16,384 blocks, events 2 ms late" in out
    assert "TTFT ms" in out


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ((), 2, "either FILE or --shape is needed"),
        (("no-such-file",), 1, "no-such-file: No such file"),
        (("no-such-file", "--config", "a:weight=1"), 2, "--config: unknown key weight"),
        (("no-such-file", "--plot", "a.pdf"), 2, "--plot: a.pdf ends in none of"),
        (("--shape", "short", "--slow-workers", "9"), 2, "slow_workers must be 0 to 8"),
        (("--shape", "round"), 2, "conversation"),
        (("--shape", "bursts", "--skip", "10000000"), 1, "bursts, seed 0 has no request"),
    ],
)
def test_what_it_says_when_it_cannot(arguments: tuple[str, ...], code: int, problem: str) -> None:
    found, out, error = compare(*arguments)
    assert (found, out) == (code, "")
    assert problem in error


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for children in /proc")
def test_ctrl_c_ends_all_processes_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "simulations", "compare", "--shape", "decode-heavy"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline_s = time.monotonic() + 30
        while len(children.read_text().split()) < 2:  # the simulations, beside a helper of theirs
            assert time.monotonic() < deadline_s, "no simulation begins"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in error
