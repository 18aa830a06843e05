"""One process of the deployment: what starts it, what tells that it is ready, how it is ended.

Every child leads a session of its own, so that a terminal's Ctrl-C reaches `reckon up` alone, and
so that whatever the child itself started can be ended with it. It asks the kernel to be killed when
its parent dies, so that even `kill -9` of `reckon up` leaves nothing behind (Linux; elsewhere the
children would stay).
"""

import asyncio
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from reckon.childlog import ChildLog
from reckon.restart import Life

READ_BYTES = 64 * 1024
ASK_AGAIN_S = 0.1
DRAIN_S = 0.5
"""How long to wait for the rest of a dead child's output: somebody else may hold the pipe open."""

# Asking for the signal after the fork and before the exec would run Python code between the two,
# which is not safe once there are threads (asyncio waits for children in threads on Python 3.11).
# So a small program asks and then becomes the child. The parent may have died before the request:
# then nobody would send the signal, which the comparison with its pid finds.
_DIE_WITH_PARENT = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""

Asked = Callable[[], Awaitable[bool]]
"""A question that is asked until the answer is yes."""
Readiness = re.Pattern[str] | Asked
"""What tells that a child is ready: a line of output that the pattern finds, or a yes."""


class ChildSpec(Struct, frozen=True, kw_only=True):
    """What to run. `argv[0]` is an absolute path."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path
    ready: Readiness
    address: str = ""
    """For people: where it listens, if that is known beforehand."""
    needs: str | None = None
    """Another child that must be ready before this one starts."""
    stop_turn: int = 0
    """Children of a lower turn are ended first; those of one turn together."""
    stop_grace_s: float = 1.0
    """From SIGTERM to SIGKILL."""
    pass_fds: tuple[int, ...] = ()
    """Open files that the child gets too."""


class ChildState(StrEnum):
    WAITING = "waiting"
    """For its turn, or for its next start."""
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


class Child:
    """A child's present: its state, its process, what it said."""

    def __init__(self, spec: ChildSpec) -> None:
        """Raises OSError if the log file cannot be opened."""
        self.spec = spec
        self.log = ChildLog(spec.log_path)
        self.state = ChildState.WAITING
        self.pid = 0
        """Of its latest process."""
        self.starts = 0
        self.failed_starts = 0
        self.ready_line = ""
        """The line that told of the latest readiness, if one did."""
        self.ready = asyncio.Event()
        self.stop_asked = asyncio.Event()
        self.line_seen = asyncio.Event()

    @property
    def name(self) -> str:
        return self.spec.name

    def hear(self, chunk: bytes) -> None:
        """Take output as it came, and notice the line that tells of readiness."""
        pattern = self.spec.ready
        for line in self.log.write(chunk):
            if isinstance(pattern, re.Pattern) and pattern.search(line):
                self.ready_line = line
                self.line_seen.set()


async def run_once(child: Child, hurry: asyncio.Event, on_ready: Callable[[], None]) -> Life:
    """Run the child's process to its end; afterwards nothing of its session is left.

    on_ready: called when the child becomes ready. It is ended when `child.stop_asked` is set, with
    no further patience once `hurry` is. Raises OSError if no process can be made.
    """
    loop = asyncio.get_running_loop()
    child.line_seen.clear()
    child.state = ChildState.STARTING
    process, output = await _spawn(child.spec)
    child.pid, child.starts = process.pid, child.starts + 1
    ready_at: float | None = None

    async def become_ready() -> None:
        nonlocal ready_at
        await _until_ready(child)
        ready_at = loop.time()
        child.state = ChildState.READY
        child.ready.set()
        on_ready()

    try:
        async with asyncio.TaskGroup() as tasks:
            hearing = tasks.create_task(_hear(child, output), name=f"hear {child.name}")
            ending = tasks.create_task(_end_when_asked(child, process, hurry))
            watching = tasks.create_task(become_ready())
            try:
                returncode = await process.wait()
            finally:
                _kill_group(process.pid)
                await process.wait()
            ended_at = loop.time()
            ending.cancel()
            watching.cancel()
            await asyncio.wait([hearing], timeout=DRAIN_S)
            hearing.cancel()
    finally:
        output.close()
        child.ready.clear()
        child.state = ChildState.WAITING
    return Life(None if ready_at is None else ended_at - ready_at, returncode)


async def _spawn(spec: ChildSpec) -> tuple[asyncio.subprocess.Process, io.FileIO]:
    # A pipe of our own: with asyncio's, `wait` lasts until the pipe closes, and whatever the child
    # started may hold it open for longer than the child lives.
    read_fd, write_fd = os.pipe()
    output = io.FileIO(read_fd)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())),
            *spec.argv,
            env=spec.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_fd,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            pass_fds=spec.pass_fds,
        )
    except BaseException:
        output.close()
        raise
    finally:
        os.close(write_fd)
    return process, output


async def _hear(child: Child, output: io.FileIO) -> None:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), output
    )
    try:
        while chunk := await reader.read(READ_BYTES):
            child.hear(chunk)
    finally:
        transport.close()


async def _until_ready(child: Child) -> None:
    ready = child.spec.ready
    if isinstance(ready, re.Pattern):
        await child.line_seen.wait()
        return
    while True:
        if await ready():
            return
        await asyncio.sleep(ASK_AGAIN_S)


async def _end_when_asked(
    child: Child, process: asyncio.subprocess.Process, hurry: asyncio.Event
) -> None:
    await child.stop_asked.wait()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(child.spec.stop_grace_s):
            await hurry.wait()
    _kill_group(process.pid)


def _kill_group(pid: int) -> None:
    """SIGKILL to whatever is left of the session that `pid` led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
