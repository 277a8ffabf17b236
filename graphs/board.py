"""The output of `dynamo serve`: on a terminal one updated line per process; elsewhere one line per change."""

import asyncio
import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

_COLORS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STARTING = "starting"
_REDRAW_SECONDS = 0.5


class Board:
    """The status board. For one event loop. `verbose` shows all output of the processes instead of the table."""

    def __init__(self, names: Sequence[str], *, verbose: bool = False, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._names = list(names)
        self._verbose = verbose
        self._table = self._out.isatty() and not verbose
        self._drawn = False
        self._states = dict.fromkeys(names, "waiting")
        self._since = dict.fromkeys(names, time.monotonic())
        self._last = dict.fromkeys(names, "")  # line that the process printed

    def status(self, name: str, text: str) -> None:
        """Show a process's new state."""
        self._states[name], self._since[name] = text, time.monotonic()
        if self._table:
            self._draw()
        else:
            self._print(name, text)

    def output(self, name: str, line: str) -> None:
        """A line that a process printed."""
        self._last[name] = _ESCAPES.sub("", line)
        if self._verbose:
            self._print(name, line)

    async def keep_drawing(self) -> None:
        """Update the seconds of starting processes, until cancelled."""
        while self._table:
            self._draw()
            await asyncio.sleep(_REDRAW_SECONDS)

    def settle(self) -> None:
        """Stop updating the table; from now on print one line per change."""
        if self._table:
            self._draw()
        self._table = False

    def _print(self, name: str, text: str) -> None:
        prefix = f"{name:>14} | "
        if self._out.isatty():
            color = _COLORS[self._names.index(name) % len(_COLORS)]
            prefix = f"\033[{color}m{prefix}\033[0m"
        print(prefix + text, file=self._out, flush=True)

    def _draw(self) -> None:
        if self._drawn:
            self._out.write(f"\033[{len(self._names)}A")
        width = shutil.get_terminal_size().columns - 1
        for name in self._names:
            self._out.write(f"\033[2K{self._line(name)[:width]}\n")
        self._out.flush()
        self._drawn = True

    def _line(self, name: str) -> str:
        text = self._states[name]
        if text != STARTING:
            return f"{name:>14}  {text}"
        return f"{name:>14}  {text} {time.monotonic() - self._since[name]:4.0f} s  {self._last[name]}"
