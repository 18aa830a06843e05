"""The exclusive use of a directory, for as long as any process that could touch it lives."""

import fcntl
import os
from pathlib import Path

from eventstore.errors import LogUnavailable

_LOCK = "lock"


class StoreInUse(LogUnavailable):
    """Another live server has the store directory."""


class StoreLock:
    """The exclusive use of a store directory. It ends with the last process that holds `fd`."""

    def __init__(self, store_dir: Path) -> None:
        """Make the directory if need be, and take its lock.

        Raises StoreInUse, and LogUnavailable if the directory cannot be written.
        """
        self.store_dir = store_dir
        self._path = store_dir / _LOCK
        self.fd = self._take()
        # Whoever held it last may have removed the file in between; then the lock is on nothing.
        while not self._is_named():
            os.close(self.fd)
            self.fd = self._take()
        os.ftruncate(self.fd, 0)

    def _take(self) -> int:
        try:
            self.store_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(self.store_dir, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            raise StoreInUse(
                f"{self.store_dir} is in use by another nats-server"
                + (f" at {url}" if url else ""),
                f"--nats-url {url}, or another data directory" if url else "another data directory",
            ) from error
        except OSError as error:
            os.close(fd)
            raise unwritable(self.store_dir, error) from error
        return fd

    def _is_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), self._path.stat())
        except FileNotFoundError:
            return False

    def tell(self, url: str) -> None:
        """Leave the server's address for those who find the store in use."""
        os.pwrite(self.fd, url.encode(), 0)

    def release(self) -> None:
        """Leave the directory without a lock. Safe to call twice.

        Call it once nobody else holds `fd`: the file goes, and with it the lock.
        """
        if self.fd >= 0:
            if self._is_named():
                self._path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1


def unwritable(store_dir: Path, error: OSError) -> LogUnavailable:
    """What to say of a directory that cannot be written."""
    return LogUnavailable(
        f"the data directory {store_dir} cannot be used: {error.strerror or error}",
        "another data directory, or its permissions",
    )
