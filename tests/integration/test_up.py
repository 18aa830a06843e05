"""`reckon up` as a user has it: the real processes, signals and ports."""

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import secrets
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from eventstore.store_lock import StoreLock
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
MARK = "RUN_OF_TEST"
READY_S = 30.0
END_S = 10.0
"""The promise is 5 s; the rest is for a machine that is busy with other tests."""
SMALL = ("--workers", "1", "--frontends", "1")
OURS = ("DYN_", "RECKON_", "NATS_")


def free_ports(count: int) -> int:
    """A port that, with the `count` - 1 next ones, nobody listened on a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


def command(data_dir: Path, port: int, *flags: str) -> list[str]:
    up = (sys.executable, "-m", "reckon", "up", "--data-dir", str(data_dir))
    return [*up, "--http-port", str(port), "--speedup-ratio", "10", *flags]


def processes(mark: str) -> dict[int, str]:
    """Pid and command line of everything that runs with this mark in its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command_line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment:
            found[int(folder.name)] = command_line
    return found


class Up:
    """A running `reckon up` and what it has shown."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, mark: str) -> None:
        self.process = process
        self.port = port
        self.mark = mark
        self.shown = ""

    async def read(self) -> None:
        assert self.process.stdout is not None
        while chunk := await self.process.stdout.read(4096):
            self.shown += chunk.decode()

    async def until_shown(self, text: str, times: int = 1) -> None:
        await eventually(
            lambda: self.shown.count(text) >= times or self.process.returncode is not None, READY_S
        )
        assert self.shown.count(text) >= times, self.shown

    async def until_ready(self) -> None:
        await self.until_shown("Ctrl-C ends it")

    def pid(self, name: str) -> int:
        """Of a child, as shown last."""
        return int(re.findall(rf"{name} is (?:ready|back) \(pid (\d+)\)", self.shown)[-1])

    def url(self, path: str, replica: int = 1) -> str:
        return f"http://127.0.0.1:{self.port + replica - 1}{path}"

    async def end(self, number: signal.Signals) -> int:
        """Send the signal, and return the exit status when nothing is left."""
        self.process.send_signal(number)
        async with asyncio.timeout(END_S):
            status = await self.process.wait()
        await eventually(lambda: not processes(self.mark))
        return status


@asynccontextmanager
async def running(data_dir: Path, *flags: str, replicas: int = 1) -> AsyncIterator[Up]:
    port, mark = free_ports(replicas), secrets.token_hex(8)
    env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    process = await asyncio.create_subprocess_exec(
        *command(data_dir, port, *flags),
        cwd=ROOT,
        env={**env, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    up = Up(process, port, mark)
    reading = asyncio.create_task(up.read())
    try:
        yield up
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await reading
        await eventually(lambda: not processes(mark))


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def healthy_workers(url: str) -> set[int]:
    """The workers that a frontend can choose; empty while it is not healthy."""
    try:
        _, body = await get(url)
    except (aiohttp.ClientError, OSError):
        return set()
    health = json.loads(body)
    ids = {instance["instance_id"] for instance in health["instances"]}
    return ids if health["status"] == "healthy" else set()


async def ask_as_shown(up: Up) -> str:
    """Run the curl line of the screen, by its words, and return the body of the answer."""
    (line,) = re.findall(r"^ *(curl .*)$", up.shown, re.M)
    words = shlex.split(line)
    header, body = words[words.index("-H") + 1], words[words.index("-d") + 1]
    headers = dict([header.split(": ", 1)])
    async with aiohttp.ClientSession() as session:
        async with session.post(words[2], data=body, headers=headers) as response:
            assert response.status == 200
            return await response.text()


async def test_a_deployment_from_its_start_to_the_start_of_the_next(tmp_path: Path) -> None:
    """The newcomer's path: ready, a request, kill a replica and a worker, Ctrl-C, start again."""
    async with running(tmp_path / "data", "--workers", "2", replicas=2) as up:
        await up.until_ready()
        assert "the log begins" in up.shown
        for path in ("/health", "/v1/models", "/metrics"):
            for replica in (1, 2):
                status, _ = await get(up.url(path, replica))
                assert status == 200
        answer = await ask_as_shown(up)
        assert answer.startswith("data: ") and "data: [DONE]" in answer

        before = await healthy_workers(up.url("/health"))
        assert len(before) == 2
        for name in ("frontend-2", "worker-1", "nats-server"):
            os.kill(up.pid(name), signal.SIGKILL)
            await up.until_shown(f"{name} is back")
            assert f"{name} (pid" in up.shown and "was killed by SIGKILL" in up.shown

        async def a_new_worker_serves_everywhere() -> bool:
            listed = [await healthy_workers(up.url("/health", replica)) for replica in (1, 2)]
            return listed[0] == listed[1] != before and len(listed[0]) == 2

        await eventually(a_new_worker_serves_everywhere, READY_S)
        assert "data: [DONE]" in await ask_as_shown(up)
        os.kill(up.pid("worker-2"), signal.SIGKILL)
        assert await up.end(signal.SIGINT) == 0
        assert "digests equal" in up.shown and "DIFFER" not in up.shown

    async with running(tmp_path / "data", *SMALL) as up:
        await up.until_ready()
        assert re.search(r"the log carries on from [1-9][\d,]* messages", up.shown)
        assert (tmp_path / "data" / "logs" / "frontend-1.log.1").exists()
        assert await up.end(signal.SIGTERM) == 0


async def test_beside_a_running_deployment(tmp_path: Path) -> None:
    """Another one starts with other ports and another data directory, and not without."""
    async with running(tmp_path / "one", *SMALL) as one:
        await one.until_ready()
        async with running(tmp_path / "one", *SMALL) as same:
            assert await same.process.wait() == 1
        assert same.shown.splitlines()[0] == (
            f"Error: the data directory {tmp_path / 'one'} is in use by another deployment"
        )
        async with running(tmp_path / "two", *SMALL) as two:
            await two.until_ready()
            assert await two.end(signal.SIGHUP) == 0
        assert await healthy_workers(one.url("/health"))


async def test_nothing_is_left_when_it_is_killed(tmp_path: Path) -> None:
    async with running(tmp_path / "data", *SMALL) as up:
        await up.until_ready()
        # Itself, the server, a worker, a frontend, and who receives the log for the frontend.
        assert len(processes(up.mark)) == 5
        await up.end(signal.SIGKILL)
    async with running(tmp_path / "data", *SMALL) as up:
        await up.until_ready()


async def test_the_end_may_come_during_the_start(tmp_path: Path) -> None:
    async with running(tmp_path / "data", *SMALL) as up:
        await up.until_shown("nats-server is ready")
        assert await up.end(signal.SIGTERM) == 0


async def test_a_child_that_cannot_start_ends_it_with_its_last_words(tmp_path: Path) -> None:
    """Here a model without files."""
    async with running(tmp_path / "data", *SMALL, "--model-path", str(tmp_path)) as up:
        async with asyncio.timeout(READY_S):
            assert await up.process.wait() == 1
    assert "Error: worker-1 exited with status" in up.shown
    assert re.search(r"^  Error: .*tokenizer\.json", up.shown, re.M)
    assert up.shown.splitlines()[-1].startswith("Try: ")
    assert "Traceback" not in up.shown


async def test_a_start_that_takes_too_long_names_who_is_late(tmp_path: Path) -> None:
    async with running(tmp_path / "data", *SMALL, "--start-timeout", "0.01") as up:
        async with asyncio.timeout(READY_S):
            assert await up.process.wait() == 1
    assert "Error: nats-server was not ready within 0.01 s" in up.shown


async def refused(*argv: str, env: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Exit status and stderr of a command that must not start anything."""
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), END_S)
    assert out == b""
    return process.returncode, err.decode()


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    """Found before anything is started or written, also for the second frontend."""
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port + 1)):
        status, err = await refused(*command(tmp_path / "data", port))
    assert (status, err.splitlines()[0]) == (1, f"Error: port {port + 1} of 127.0.0.1 is in use")
    assert err.splitlines()[1].startswith("Try: ") and len(err.splitlines()) == 2
    assert not (tmp_path / "data").exists()


async def test_a_data_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, err = await refused(*command(tmp_path / "file" / "data", free_ports(2)))
    assert status == 1 and len(err.splitlines()) == 2
    assert err.startswith("Error: the data directory") and "Not a directory" in err


async def test_misuse_is_one_line_and_has_a_status_of_its_own(tmp_path: Path) -> None:
    status, err = await refused(*command(tmp_path / "data", 8000, "--workers", "none"))
    assert (status, err) == (2, "Error: --workers: 'none' is not a whole number\n")


async def test_the_default_data_directory_is_in_the_users_state(tmp_path: Path) -> None:
    """What holds the store there holds the deployment up: it is the directory that is used."""
    lock = StoreLock(tmp_path / "reckon" / "nats")
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    up = (sys.executable, "-m", "reckon", "up", "--http-port", str(free_ports(2)))
    status, err = await refused(*up, env=env)
    lock.release()
    assert status == 1 and f"{tmp_path / 'reckon'} is in use" in err


OWN_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@asynccontextmanager
async def on_a_terminal(
    argv: list[str],
) -> AsyncIterator[tuple[asyncio.subprocess.Process, io.FileIO]]:
    """The process, in the foreground of a terminal of 40 lines and 120 columns, and its far end."""
    far, near = pty.openpty()
    fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWN_THE_TERMINAL, *argv),
        cwd=ROOT,
        stdin=near,
        stdout=near,
        stderr=near,
        start_new_session=True,
    )
    os.close(near)
    os.set_blocking(far, False)
    try:
        with io.FileIO(far, "r+") as terminal:
            yield process, terminal
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


class Shown:
    """What a terminal has shown up to now."""

    def __init__(self, far: io.FileIO) -> None:
        self.text = ""
        self._far = far

    def has(self, text: str) -> bool:
        with contextlib.suppress(OSError):  # nobody at the other end any more
            self.text += (self._far.read(65536) or b"").decode(errors="replace")
        return text in self.text


async def test_on_a_terminal_there_is_a_status_line_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    argv = command(tmp_path / "data", free_ports(1), *SMALL)
    async with on_a_terminal(argv) as (process, far):
        shown = Shown(far)
        line = "1/1 workers · 1/1 frontends · 0 requests done"
        await eventually(lambda: shown.has(line), READY_S)
        await eventually(lambda: shown.has("\x1b[2K0:00:"), READY_S)
        far.write(b"\x03")
        await eventually(lambda: shown.has("All has ended."), END_S)
        async with asyncio.timeout(END_S):
            assert await process.wait() == 0


async def test_closing_the_window_ends_it(tmp_path: Path) -> None:
    """There is nowhere left to write to, and still everything ends in order."""
    argv = command(tmp_path / "data", free_ports(1), *SMALL)
    async with on_a_terminal(argv) as (process, far):
        shown = Shown(far)
        await eventually(lambda: shown.has("Ctrl-C ends it"), READY_S)
        far.close()
        async with asyncio.timeout(END_S):
            assert await process.wait() == 0
