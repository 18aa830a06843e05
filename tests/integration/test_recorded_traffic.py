"""A generated trace sent through a whole deployment: what kv mode is for, seen from outside."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import aiohttp
import pytest

from simulations.generate import TrafficOptions, generate
from simulations.trace import encode_request

ROOT = Path(__file__).parents[2]
WORKERS = 4
READY_S = 30.0
STOP_S = 10.0
TRAFFIC = TrafficOptions(
    duration_s=80.0,
    sessions_per_s=1.6,
    turns_mean=5.0,
    pause_s_median=8.0,
    system_prompts=8,
    system_tokens_median=600.0,
    user_tokens_median=600.0,
    user_tokens_sigma=0.5,
    output_tokens_median=30.0,
    input_tokens_max=8_000,
)
SPEEDUP = 10


def two_free_ports() -> int:
    """A port p such that nobody listens on p and p + 1 now."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@asynccontextmanager
async def deployment(data_dir: Path, router_mode: str) -> AsyncIterator[list[str]]:
    """The URLs of the two frontends of a `reckon up` that is ready."""
    port = two_free_ports()
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    log_path = data_dir.with_suffix(".log")
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "reckon", "up", "--data-dir", data_dir),
            *("--http-port", str(port), "--router-mode", router_mode),
            *("--workers", str(WORKERS), "--speedup-ratio", str(SPEEDUP)),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
            for url in urls:
                while not await is_ready(session, url):
                    assert process.returncode is None, log_path.read_text()
                    await asyncio.sleep(0.1)
        yield urls
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health") as response:
            health = await response.json()
    except aiohttp.ClientError:
        return False
    return health["status"] == "healthy" and len(health["instances"]) == WORKERS


async def report_of(router_mode: str, trace: Path) -> dict[str, float]:
    async with deployment(trace.parent / router_mode, router_mode) as urls:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "simulations", "send-trace", trace, "--json"),
            *("--speedup", str(SPEEDUP), "--url", urls[0], "--url", urls[1]),
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "80"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    report: dict[str, float] = json.loads(out.decode().splitlines()[-1])
    return report


async def test_kv_mode_reuses_more_than_round_robin_and_knows_beforehand(tmp_path: Path) -> None:
    requests = generate(TRAFFIC, Random(1))
    assert 200 <= len(requests) <= 500
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(b"".join(map(encode_request, requests)))
    round_robin = await report_of("round-robin", trace)
    kv = await report_of("kv", trace)
    for report in (round_robin, kv):
        assert (report["requests"], report["errors"]) == (len(requests), 0)
    assert kv["cached_share_reported"] > 1.3 * round_robin["cached_share_reported"]
    assert kv["cached_share_predicted"] == pytest.approx(kv["cached_share_reported"], abs=0.03)
