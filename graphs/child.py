"""Runs one command of a deployment in place of itself: pinned to its cores, and never outliving the supervisor."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if cores := os.environ.pop("KVTIER_CORES", ""):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    command = sys.argv[1:]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
