"""Commands as `python -m MODULE` runs them, in this process, which has imported them already. A process of its own is
started for each of them once (tests/graphs/test_serve.py)."""

import contextlib
import io
import json
import sys
from importlib import import_module
from typing import Any
from unittest.mock import patch

from kvstore.errors import run_command

PACKAGES = ("kvstore", "components.router", "components.worker")


class Ended:
    """What a command said and how it ended."""

    def __init__(self, code: int, said: str, complained: str):
        self.code, self.said, self.complained = code, said, complained

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.said.splitlines()]


def run(module: str, *arguments: object) -> Ended:
    """Run the main function of a module, or of a package's __main__, until it ends."""
    entry = import_module(f"{module}.__main__" if module in PACKAGES else module)
    said, complained = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
        patch.object(sys, "argv", [entry.__file__]),
    ):
        try:
            run_command(module, lambda: entry.main([str(argument) for argument in arguments]))
        except SystemExit as ended:  # and not pytest.raises, which would keep alive what a start that failed had opened
            return Ended(int(ended.code or 0), said.getvalue(), complained.getvalue())
