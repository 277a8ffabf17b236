"""Several logs as one: a target with more than one directory or device. A key lies on one of them, by its hash, so that
losing a device loses its share alone."""

from collections import Counter
from collections.abc import Sequence

import xxhash

from kvstore.disk.log import Ledger, Log, LogStats
from kvstore.disk.record import Entry


class Shelf:
    """Any thread may call any method."""

    def __init__(self, logs: Sequence[Log]):
        self.logs = logs

    @property
    def epoch(self) -> int:
        """Grows with every start, also when a log is added or taken away."""
        return sum(log.epoch for log in self.logs)

    @property
    def capacity_bytes(self) -> int:
        return sum(log.slots * log.segment_bytes for log in self.logs)

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

    def tell(self, ledger: Ledger) -> None:
        """From now on `ledger` hears of what comes and goes."""
        for log in self.logs:
            log.ledger = ledger

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

    def close(self) -> None:
        for log in self.logs:
            log.close()
