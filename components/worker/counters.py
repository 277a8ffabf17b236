"""The tier's series in vLLM's metrics: their definitions, and the counts since vLLM collected them last."""

from collections.abc import Iterable

from components.worker.compat import OffloadingConnectorStats, OffloadingCounterMetadata
from kvstore.net.wire import Outcome
from kvstore.seal import Reason

FETCHED = "vllm:kvtier_fetched_chunks"
STORED = "vllm:kvtier_stored_chunks"
FETCHED_BYTES = "vllm:kvtier_fetched_bytes"
STORED_BYTES = "vllm:kvtier_stored_bytes"
ABANDONED = "vllm:kvtier_fetch_abandoned_chunks"
TIMED_OUT = "vllm:kvtier_fetch_timeout_chunks"
IDENTITY = "vllm:kvtier_identity_checks"
REJECTED = "vllm:kvtier_rejected_values"
MOVER_RESTARTS = "vllm:kvtier_mover_restarts"

# Each series' help text, its label, and the label's values.
_SERIES: dict[str, tuple[str, str, Iterable[str]]] = {
    FETCHED: (
        "Chunks requested from the kvtier store, by outcome. A miss is a false hit: the plan or the store "
        "listed the chunk, the target did not have it",
        "outcome",
        [outcome.name.lower() for outcome in Outcome if outcome is not Outcome.STORED],
    ),
    STORED: (
        "Chunks offered to the kvtier store, by outcome. known: stored already (deduplicated). dropped: the "
        "write queue was full, and the chunk was evicted from DRAM before there was room",
        "outcome",
        ["stored", "known", "dropped", "refused", "unreachable"],
    ),
    FETCHED_BYTES: ("Bytes loaded from the kvtier store into DRAM", "", ()),
    STORED_BYTES: ("Bytes written from DRAM to the kvtier store", "", ()),
    ABANDONED: (
        "Chunks whose fetch the worker cancelled: a prefill is estimated faster, or the deadline cannot be met",
        "",
        (),
    ),
    TIMED_OUT: ("Chunks whose fetch timed out: it was in flight at its deadline", "", ()),
    IDENTITY: (
        "Checks of the weights and adapters that ranks compute with, by result. After changed, failed and "
        "adapter_changed the DRAM tier is empty; after failed the tier is off",
        "outcome",
        ["same", "changed", "failed", "adapter", "adapter_changed"],
    ),
    REJECTED: (
        "Values from the kvtier store whose seal did not hold, by reason: planted, altered or damaged. They "
        "were not used",
        "reason",
        [str(reason) for reason in Reason],
    ),
    MOVER_RESTARTS: ("Restarts of the mover process: look at the worker's log", "", ()),
}
DEFINITIONS = {
    name: OffloadingCounterMetadata(meaning, (label,) if label else ()) for name, (meaning, label, _) in _SERIES.items()
}


class Counters:
    """For the scheduler's thread. All series begin at 0: Prometheus sees no increase in a series that appears with its
    first count."""

    def __init__(self) -> None:
        self._stats = OffloadingConnectorStats()
        for name, (*_, values) in _SERIES.items():
            for value in values or (None,):
                self.add(name, 0, value)

    def add(self, name: str, count: int, value: str | None = None) -> None:
        """`value` is the label's, if the series has a label."""
        self._stats.increase_counter(name, count, () if value is None else (value,))

    def take(self) -> OffloadingConnectorStats | None:
        """The counts since the last call; None if there are none."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats
