"""Where `reckon up` shows what it has to show: a terminal with a status line, or plain lines."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

PLAIN_COLUMNS = 200
"""Width where there is no terminal: enough that no line is broken."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # Rich would end the process


class Terminal:
    """Output that may lose its reader: a closed window or pipe ends the output and nothing else."""

    def __init__(self, file: TextIO, *, columns: int | None = None) -> None:
        """columns: None asks the terminal."""
        self._console = _Console(
            file=file, width=columns, highlight=False, markup=False, emoji=False
        )
        self._live: Live | None = None
        self._gone = False

    @classmethod
    def on_stdout(cls, env: Mapping[str, str]) -> Self:
        plain = not sys.stdout.isatty() and "COLUMNS" not in env
        return cls(sys.stdout, columns=PLAIN_COLUMNS if plain else None)

    @property
    def redraws(self) -> bool:
        """Whether there can be a status line."""
        return self._console.is_terminal

    def say(self, what: RenderableType) -> None:
        """Add to what is shown, above the status line. Long lines are left to the terminal."""
        self._try(lambda: self._console.print(what, soft_wrap=True))

    def show_status(self, line: Text) -> None:
        """Put `line` in the place of the status line."""
        self._try(lambda: self._draw(line))

    def end_status(self) -> None:
        """Take the status line away."""
        if self._live is not None:
            self._try(self._live.stop)
            self._live = None

    def _draw(self, line: Text) -> None:
        if self._live is None:
            # No thread that refreshes: whoever has news draws.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(line, refresh=True)

    def _try(self, write: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            write()
        except OSError:
            self._gone = True
            # What is still buffered would fail once more when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._console.file.fileno())
            os.close(nowhere)
