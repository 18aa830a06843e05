"""`python -m simulations send-trace`: what it prints and how it ends."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from simulations.trace import encode_request
from tests.integration.completions_stand_in import (
    StandIn,
    answer,
    answer_two,
    refuse,
    serving,
    trace,
)

ROOT = Path(__file__).parents[2]


async def send_trace(
    *arguments: str | Path, interrupt: Callable[[], Awaitable[None]] | None = None
) -> tuple[int, str, str]:
    """Run the command; exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "simulations", "send-trace", *arguments),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    if interrupt is not None:
        await interrupt()
        process.send_signal(signal.SIGINT)
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(map(encode_request, trace(6, gap_ms=10))))
    return path


async def test_the_command_prints_a_table_and_one_json_line(trace_file: Path) -> None:
    stand_in = StandIn(answer)
    async with serving(stand_in):
        code, out, _ = await send_trace(
            *(trace_file, "--url", stand_in.url, "--speedup", "100", "--json"),
            *("--skip", "1", "--requests", "4"),
        )
    assert code == 0
    assert "4 requests, 0 errors" in out
    report = json.loads(out.splitlines()[-1])
    assert (report["requests"], report["errors"]) == (4, 0)
    assert (report["cached_share_reported"], report["cached_share_predicted"]) == (0.5, 0.25)
    assert all(isinstance(body["prompt"], str) for body in stand_in.bodies)


async def test_the_command_fails_if_every_request_failed(trace_file: Path) -> None:
    stand_in = StandIn(refuse)
    async with serving(stand_in):
        code, out, _ = await send_trace(trace_file, "--url", stand_in.url, "--speedup", "100")
    assert code == 1
    assert "http_503_overloaded" in out


async def test_ctrl_c_prints_the_report_so_far(trace_file: Path) -> None:
    stand_in = StandIn(answer_two)
    async with serving(stand_in):
        code, out, error = await send_trace(
            *(trace_file, "--url", stand_in.url, "--json", "--max-inflight", "1"),
            interrupt=lambda: stand_in.until_arrived(3),
        )
    assert code == 130
    assert "Traceback" not in error
    report = json.loads(out.splitlines()[-1])
    assert (report["requests"], report["unfinished"]) == (2, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"timestamp": 0, "input_length": "x", "output_length": 1, "hash_ids": [0]}', "line 1"),
        ("", "has no request after the first 0"),
    ],
)
async def test_a_file_that_is_no_trace_is_one_clear_line(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    code, out, error = await send_trace(path)
    assert (code, out) == (1, "")
    assert error.startswith(f"Error: {path}") and said in error and len(error.splitlines()) == 1


async def test_a_url_that_does_not_answer_is_one_clear_line(
    trace_file: Path, unused_tcp_port: int
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    code, out, error = await send_trace(trace_file, "--url", url)
    assert (code, out) == (1, "")
    said, try_this = error.splitlines()
    assert said.startswith(f"Error: {url}") and "refused" in said.lower()
    assert try_this.startswith("Try: ")


async def test_a_url_that_is_none_is_misuse(trace_file: Path) -> None:
    code, _, error = await send_trace(trace_file, "--url", "127.0.0.1:8000")
    assert code == 2
    assert error.startswith("Error: --url: ") and len(error.splitlines()) == 1
