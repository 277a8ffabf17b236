"""Dynamo's discovery by files: what a process registers there outlives it for some 10 s, and gets requests."""

import contextlib
import json
import socket
from pathlib import Path

from kvstore.net.transport import split_address

_CONNECT_SECONDS = 1.0


def forget_dead(folder: Path) -> None:
    """Take away the instances of processes that do not listen any more, as Dynamo itself does later. Their models stay:
    a model without an instance is 503, one that is unknown 404."""
    for path in (folder / "v1" / "instances").glob("*"):
        if _refuses(path):
            with contextlib.suppress(OSError):
                path.unlink()


def forget_all(folder: Path) -> None:
    """Take away the instances of the dead, and if none is left all that was registered with them: models, channels of
    events."""
    forget_dead(folder)
    registered = folder / "v1"
    if not any((registered / "instances").glob("*")):
        for path in registered.glob("*/*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _refuses(path: Path) -> bool:
    """Whether nobody listens where an instance is to be reached."""
    try:
        host, port = split_address(json.loads(path.read_text())["transport"]["tcp"].partition("/")[0])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # gone meanwhile, or not reached by TCP
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
