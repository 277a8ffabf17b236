"""Several logs as one: a target with more than one directory or device. The hash of a key chooses the log, so losing a
device loses only its share. Also several such shelves on the same devices, one per namespace."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from kvstore.disk.device import SLOTS_FEWEST, Device
from kvstore.disk.files import Files
from kvstore.disk.log import Log, LogStats, Observer, close_all
from kvstore.disk.record import Announced, Entry
from kvstore.errors import ConfigError


class Shelf:
    """Any thread may call any method."""

    def __init__(self, logs: Sequence[Log]):
        self.logs = logs

    @property
    def capacity_bytes(self) -> int:
        return sum(log.capacity_bytes for log in self.logs)

    @property
    def value_bytes_max(self) -> int:
        return min(log.value_bytes_max for log in self.logs)

    def of(self, key: bytes) -> Log:
        """The log of a key, by rendezvous hashing over the stores' ids: whatever order they are named in."""
        if len(self.logs) == 1:
            return self.logs[0]
        return max(self.logs, key=lambda log: xxhash.xxh3_64_intdigest(key, log.store_id))

    def __contains__(self, key: bytes) -> bool:
        return key in self.of(key)

    def entries(self) -> list[Entry]:
        return [entry for log in self.logs for entry in log.entries()]

    def announced(self, count: int) -> Iterator[Announced]:
        """`Log.announced` of all logs."""
        for log in self.logs:
            yield from log.announced(count)

    def keys_of(self, fingerprint: int, router_hashes: Sequence[int], count: int) -> Iterator[dict[int, bytes]]:
        """`Log.keys_of` of all logs."""
        for log in self.logs:
            yield from log.keys_of(fingerprint, router_hashes, count)

    def page(self, cursor: tuple[int, int, int], count: int) -> tuple[list[Entry], tuple[int, int, int] | None]:
        """`Log.page` of one log after the other; a cursor begins with the log's number."""
        number, *within = cursor
        if number >= len(self.logs):
            return [], None
        entries, after = self.logs[number].page((within[0], within[1]), count)
        return entries, (number + 1, 0, 0) if after is None else (number, *after)

    def observe(self, observer: Observer) -> None:
        """Notify `observer` of all later changes."""
        for log in self.logs:
            log.observer = observer

    def stats(self) -> LogStats:
        """Sums over the logs; the age of evictions is the lowest."""
        total = LogStats()
        for log in self.logs:
            for name, value in vars(log.stats).items():
                setattr(total, name, getattr(total, name) + value)
        ages = [log.stats.evicted_age_seconds for log in self.logs if log.stats.evicted_segments]
        total.evicted_age_seconds = min(ages, default=0.0)
        return total

    def key_versions(self) -> Counter[int]:
        """How many chunks have a key of each version."""
        return sum((log.key_versions() for log in self.logs), Counter())

    @property
    def held_bytes(self) -> int:
        """Space of the devices that is this shelf's."""
        return sum(log.held_bytes for log in self.logs)

    def settle(self, capacity_bytes: int | None = None) -> None:
        """Take the space that is this shelf's share, or give back what is beyond it (`Log.settle`)."""
        for log in self.logs:
            log.settle(None if capacity_bytes is None else capacity_bytes // len(self.logs))

    def delete_beyond(self) -> None:
        """Delete segments of an earlier, larger capacity."""
        for log in self.logs:
            log.delete_beyond()

    def close(self) -> list[Log]:
        """Those whose devices do not answer are returned (`close_all`)."""
        return close_all(self.logs)


class Rack:
    """A shelf for each namespace, all on the same devices, each within its quota of bytes.

    Opened in two steps: the constructor locks and checks, and changes nothing on disk; `begin` makes the shelves.

    The sum of quotas is at most the capacity: a full namespace evicts only its own values. One thread at a time may
    call its methods. Raises ConfigError if the devices cannot hold this.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        capacity_bytes: int,
        quotas: Mapping[str, int],
        *,
        segment_bytes: int | None = None,
        sync_seconds: float = 0.0,
        files: Files | None = None,
    ):
        self.shelves: dict[str, Shelf] = {}
        self._sync_seconds = sync_seconds
        self._quotas = dict(quotas)
        self._devices: list[Device] = []
        self._hung: set[Path] = set()  # devices that a log could not close: it may still write there
        names, share = list(quotas), capacity_bytes // len(paths)
        try:
            for path in paths:
                self._devices.append(Device(path, share, names, shared=True, segment_bytes=segment_bytes, files=files))
            self.check(quotas)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Make the devices ready to be written to, and open the shelves."""
        try:
            for device in self._devices:
                device.begin()
            for name, quota_bytes in self._quotas.items():
                self._open(name, quota_bytes)
            for shelf in self.shelves.values():
                shelf.settle()
        except BaseException:
            self.close()
            raise

    @property
    def open_files(self) -> int:
        """How many segments' files there may be."""
        return sum(device.space.open_files for device in self._devices)

    def check(self, quotas: Mapping[str, int]) -> None:
        """Raises ConfigError if they do not fit the devices."""
        segment_bytes = max(device.segment_bytes for device in self._devices)
        least = SLOTS_FEWEST * segment_bytes * len(self._devices)
        for name, quota_bytes in quotas.items():
            if quota_bytes < least:
                expected = f"at least {least}: two segments of {segment_bytes} bytes in each directory"
                raise ConfigError(f"namespaces.{name}.quota", quota_bytes, expected)
        for device in self._devices:
            slots = sum(quota_bytes // len(self._devices) // device.segment_bytes for quota_bytes in quotas.values())
            if slots > device.slots:
                most = sum(device.slots * device.segment_bytes for device in self._devices)
                expected = f"at most {most} in all, what --capacity makes in whole segments"
                raise ConfigError("namespaces: the sum of all quotas", sum(quotas.values()), expected)

    def change(self, quotas: Mapping[str, int]) -> None:
        """Make these the namespaces. The space of removed ones becomes free: their values are not served, and are
        overwritten when others need the space."""
        self.check(quotas)
        for name in [name for name in self.shelves if name not in quotas]:
            self._hung.update(log.path for log in self.shelves.pop(name).close())
        coming = [name for name in quotas if name not in self.shelves]
        for name in coming:
            for device in self._devices:
                device.add(name)
            self._open(name, quotas[name])
        for grows in (False, True):  # first shrink some, so that others can grow
            for name, shelf in self.shelves.items():
                if (quotas[name] > shelf.held_bytes) == grows:
                    shelf.settle(quotas[name])

    def delete_beyond(self) -> None:
        """Delete segments of an earlier, larger capacity."""
        for device in self._devices:
            device.delete_beyond()

    def close(self) -> None:
        hung = close_all(log for shelf in self.shelves.values() for log in shelf.logs)
        self._hung.update(log.path for log in hung)
        self.shelves.clear()
        for device in self._devices:
            if device.path not in self._hung:
                device.close()
        self._devices.clear()

    def _open(self, name: str, quota_bytes: int) -> Shelf:
        share = quota_bytes // len(self._devices)
        logs = [
            Log(device.path, share, namespace=name, sync_seconds=self._sync_seconds, device=device)
            for device in self._devices
        ]
        shelf = self.shelves[name] = Shelf(logs)
        return shelf
