"""Commands for operators of targets: status, integrity check, benchmark, and export and import of chunks."""

import os
import sys
from importlib import import_module

# The module of each, imported when it is called.
COMMANDS = {"stat": "stat", "verify": "verify", "bench": "bench", "export": "export", "import": "import_"}


def run(command: str, argv: list[str]) -> int:
    """Run one of COMMANDS; its exit code."""
    try:
        return int(import_module(f"kvstore.tools.{COMMANDS[command]}").main(argv))
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 0
