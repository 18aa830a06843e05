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
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(store_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(store_dir, error) from error
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = os.pread(self.fd, 200, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise StoreInUse(
                f"{store_dir} is in use by another nats-server" + (f" at {url}" if url else ""),
                f"--nats-url {url}, or another data directory" if url else "another data directory",
            ) from error
        except OSError as error:
            os.close(self.fd)
            raise unwritable(store_dir, error) from error
        os.ftruncate(self.fd, 0)

    def tell(self, url: str) -> None:
        """Leave the server's address for those who find the store in use."""
        os.pwrite(self.fd, url.encode(), 0)

    def release(self) -> None:
        """Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def unwritable(store_dir: Path, error: OSError) -> LogUnavailable:
    """What to say of a directory that cannot be written."""
    return LogUnavailable(
        f"the data directory {store_dir} cannot be used: {error.strerror or error}",
        "another data directory, or its permissions",
    )
