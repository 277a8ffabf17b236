"""Dynamo's discovery by files: what a process registers there outlives it for some 10 s, and gets requests."""

import contextlib
import json
import socket
from pathlib import Path

from kvstore.transport import split_address

_CONNECT_SECONDS = 1.0


def forget_dead(folder: Path) -> None:
    """Take away what was registered by processes that do not listen any more, as Dynamo itself does later."""
    records = list((folder / "v1").glob("*/*"))
    dead = {_instance(path) for path in records if path.parent.name == "instances" and _refuses(path)}
    for path in records:
        if _instance(path) in dead:
            with contextlib.suppress(OSError):
                path.unlink()


def _instance(path: Path) -> str:
    """The id at the end of a record's name: namespace/component/endpoint/id, with its slashes quoted."""
    return path.name.rpartition("%2F")[2]


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
