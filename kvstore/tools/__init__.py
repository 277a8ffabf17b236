"""Commands for operators of targets: status, integrity check, benchmark, and export and import of chunks."""

import os
import sys
from collections.abc import Callable

from kvstore.tools import bench, export, import_, stat, verify

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "stat": stat.main,
    "verify": verify.main,
    "bench": bench.main,
    "export": export.main,
    "import": import_.main,
}


def run(command: str, argv: list[str]) -> int:
    """Run one of COMMANDS; its exit code."""
    try:
        return COMMANDS[command](argv)
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 0
