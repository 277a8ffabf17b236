"""The processes that the store's benchmark starts: clients, a bare socket server, the owner of a Mooncake segment.

    PYTHON -m benchmarks.store.worker client BATCH_BYTES     commands come on standard input, answers go out: JSON
    PYTHON -m benchmarks.store.worker socket ADDRESS BYTES   moves bytes and does nothing else
    PYTHON -m benchmarks.store.worker mooncake JSON          holds the segment until standard input ends

Only the standard library is imported at the top: a peer's own interpreter runs this file, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from benchmarks.store import peers
from benchmarks.store.peers import Client, Keys

STAMP_BYTES = 16


def batch_keys(dataset: str, size: int, batch: int, count: int) -> list[bytes]:
    return [blake2b(f"{dataset}/{size}/{batch}/{n}".encode(), digest_size=STAMP_BYTES).digest() for n in range(count)]


class Values:
    """The values, and memory to get them into. A value is its key, followed by a slice of one random buffer."""

    def __init__(self, batch_bytes: int):
        self.source = peers.allocate(batch_bytes, peers.random_content(batch_bytes))
        self.rooms = peers.allocate(batch_bytes)

    def slots(self, memory: memoryview, size: int, batch: int = 0) -> list[memoryview]:
        """Slices of the memory, with another first slice for each batch, so that a batch never leaves what the next
        expects."""
        pieces = [memory[start : start + size] for start in range(0, len(memory), size)]
        first = batch % len(pieces)
        return pieces[first:] + pieces[:first]

    def put(self, client: Client, keys: Keys, size: int, batch: int) -> int:
        values = self.slots(self.source, size, batch)
        heads = [bytes(value[:STAMP_BYTES]) for value in values]
        for value, key in zip(values, keys, strict=True):
            value[:STAMP_BYTES] = key
        good = client.put(keys, values)
        for value, head in zip(values, heads, strict=True):
            value[:STAMP_BYTES] = head
        return good

    def check(self, keys: Keys, size: int, batch: int) -> None:
        """Every value must begin with its key; the first and the last are compared whole."""
        rooms, values = self.slots(self.rooms, size), self.slots(self.source, size, batch)
        if any(room[:STAMP_BYTES] != key for room, key in zip(rooms, keys, strict=True)):
            raise ValueError("a value that was read is another one")
        for number in (0, -1):
            # As bytes: memoryviews are compared item by item.
            if bytes(rooms[number][STAMP_BYTES:]) != bytes(values[number][STAMP_BYTES:]):
                raise ValueError("a value that was read is not what was written")


class Worker:
    """One client process: it holds clients of several stores and runs batches on one of them at a time."""

    def __init__(self, batch_bytes: int):
        self._batch_bytes = batch_bytes
        self._values = Values(batch_bytes)
        self._clients: dict[str, Client] = {}
        self._last: tuple[Keys, int, int] = ([], batch_bytes, 0)

    def open(self, name: str, kind: str, where: Any, connections: int = 1) -> None:
        match kind:
            case "kvtier":
                self._clients[name] = peers.Kvtier(where)
            case "kvtier-once":
                self._clients[name] = peers.KvtierOnce(where)
            case "mooncake":
                self._clients[name] = peers.Mooncake(where, [self._values.source, self._values.rooms])
            case _:
                pooled: dict[str, Callable[[Any, int], Client]] = {
                    "socket": peers.BareSocket,
                    "redis": peers.Redis,
                    "lmcache": peers.LMCache,
                }
                self._clients[name] = pooled[kind](where, connections)

    def run(self, name: str, operation: str, dataset: str, size: int, batches: list[int], at: float) -> dict[str, Any]:
        """Put or get batches from the time `at` on. Returns the end, and the number of good values."""
        client = self._clients[name]
        count = self._batch_bytes // size
        keys = [batch_keys(dataset, size, batch, count) for batch in batches]
        rooms = self._values.slots(self._values.rooms, size)
        good, refused = 0, getattr(client, "refused", 0)
        time.sleep(max(0.0, at - time.monotonic()))
        start = time.monotonic()
        for batch, names in zip(batches, keys, strict=True):
            if operation == "put":
                good += self._values.put(client, names, size, batch)
            else:
                good += client.get(names, rooms)
        end = time.monotonic()
        self._last = (keys[-1], size, batches[-1])
        refused = getattr(client, "refused", 0) - refused
        return {"start": start, "end": end, "good": good, "asked": count * len(batches), "refused": refused}

    def check(self) -> None:
        """Check the values of the last get."""
        self._values.check(*self._last)

    def clear(self, name: str) -> None:
        client = self._clients[name]
        assert isinstance(client, peers.Mooncake)
        client.clear()

    def to_disk(self, name: str, owner: str, dataset: str, size: int, batches: list[int]) -> dict[str, Any]:
        client = self._clients[name]
        assert isinstance(client, peers.Mooncake)
        keys = [key for batch in batches for key in batch_keys(dataset, size, batch, self._batch_bytes // size)]
        return {"on_disk": client.to_disk(keys, owner)}

    def serve(self) -> None:
        calls: dict[str, Callable[..., dict[str, Any] | None]] = {
            "open": self.open,
            "run": self.run,
            "check": self.check,
            "clear": self.clear,
            "to_disk": self.to_disk,
        }
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a peer library's output must not mix with answers
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = calls[command.pop("call")](**command) or {}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


def own_mooncake_segment(settings: dict[str, Any]) -> None:
    store = peers.mooncake(settings)
    print(store.get_hostname(), flush=True)
    sys.stdin.read()
    store.close()


def main() -> None:
    role, *rest = sys.argv[1:]
    if role == "client":
        Worker(int(rest[0])).serve()
    elif role == "socket":
        peers.serve_bare_socket(rest[0], int(rest[1]))
    else:
        own_mooncake_segment(json.loads(rest[0]))


if __name__ == "__main__":
    main()
