"""What a child prints, kept in a file of bounded size and, its last lines, in memory."""

from collections import deque
from pathlib import Path
from typing import BinaryIO

BYTES_MAX = 8 * 1024 * 1024
"""Of one file; with the one before it a child takes at most twice this on disk."""
LAST_LINES = 12
LINE_BYTES_MAX = 4096
"""Of a line as kept in memory; longer ones are cut there, not in the file."""


class ChildLog:
    """One child's log file, over all its restarts.

    Opening moves the file of the last deployment to `<name>.log.1` and starts an empty one; so does
    a file that reaches `bytes_max`. A full disk loses log lines, never the child: what cannot be
    written is dropped, and the last lines in memory still tell.
    """

    def __init__(self, path: Path, *, bytes_max: int = BYTES_MAX) -> None:
        """Raises OSError if the file cannot be made."""
        self.path = path
        self._bytes_max = bytes_max
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._rest = b""
        self._file: BinaryIO = self._open()
        self._size_bytes = 0

    def write(self, chunk: bytes) -> list[str]:
        """Add output as it came, and return the lines that it completed, without their ends."""
        self._write(chunk)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        self._rest = self._rest[:LINE_BYTES_MAX]
        lines = [line[:LINE_BYTES_MAX].decode(errors="replace").rstrip("\r") for line in whole]
        self._last.extend(line for line in lines if line.strip())
        return lines

    def note(self, text: str) -> None:
        """Add a line of the supervisor's own, to the file alone."""
        unfinished = "\n" if self._rest else ""
        self._write(f"{unfinished}--- {text}\n".encode())

    def last_lines(self) -> list[str]:
        """The newest lines, oldest first, with an unfinished one at the end."""
        rest = self._rest.decode(errors="replace")
        return [*self._last, rest] if rest.strip() else list(self._last)

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        return self.path.open("wb", buffering=0)

    def _write(self, data: bytes) -> None:
        try:
            if self._size_bytes + len(data) > self._bytes_max and self._size_bytes:
                full, self._file = self._file, self._open()
                full.close()
                self._size_bytes = 0
            self._size_bytes += self._file.write(data)
        except OSError:
            return
