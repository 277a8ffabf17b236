"""The router's state of the workers: their model cards and tier reports.

Plain state, filled from Dynamo's discovery and from the bus; no I/O of its own.
"""

import json
import logging
import math
from dataclasses import dataclass

from kvstore.bus.messages import WorkerReport

logger = logging.getLogger(__name__)

# Ten heartbeats: a worker whose reports stop is still served, without its tier.
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Card:
    """The relevant fields of a worker's model deployment card."""

    block_tokens: int
    total_blocks: int
    model: str
    taints: frozenset[str] = frozenset()  # including its topology: dynamo.topology/zone=a
    context_tokens: int = 0  # limit of prompt plus answer, if the engine enforces one; 0: unknown


@dataclass(frozen=True)
class _Report:
    report: WorkerReport
    heard: float


class Workers:
    """Cards and reports by worker id. For one event loop."""

    def __init__(self, endpoint: str):
        self._endpoint = endpoint
        self._cards: dict[int, Card] = {}
        self._parsed: dict[str, Card | None] = {}
        self._reports: dict[int, _Report] = {}
        self._progress: dict[int, float] = {}  # time of each worker's last progress

    @property
    def cards(self) -> dict[int, Card]:
        return self._cards

    def set_cards(self, cards: dict[str, str]) -> None:
        """Replace the cards by the current model cards (JSON) of discovery, by worker id."""
        self._parsed = {text: self._parsed.get(text) or parse_card(text) for text in cards.values()}
        parsed = {int(worker): self._parsed[text] for worker, text in cards.items()}
        self._cards = {worker: card for worker, card in parsed.items() if card is not None}
        self._progress = {worker: when for worker, when in self._progress.items() if worker in self._cards}

    def context_tokens(self, least: bool = False) -> int:
        """The longest context of a worker, or the shortest (`least`); 0 if no worker reports one."""
        lengths = [card.context_tokens for card in self._cards.values() if card.context_tokens]
        return (min if least else max)(lengths, default=0)

    def heard(self, report: WorkerReport, now: float) -> None:
        if report.endpoint != self._endpoint or not (report.worker.isascii() and report.worker.isdigit()):
            return
        worker = int(report.worker)
        known = self._reports.get(worker)
        if known is not None and _of_engine(known.report) != _of_engine(report):
            self.progressed(worker, now)
        self._reports[worker] = _Report(report, now)

    def progressed(self, worker: int, now: float) -> None:
        """Note progress of the worker's engine, for any request."""
        self._progress[worker] = now

    def last_progress(self, worker: int) -> float:
        return self._progress.get(worker, -math.inf)

    def report(self, worker: int, block_tokens: int, now: float) -> WorkerReport | None:
        """The report of the worker's tier; None if it is too old, or has another block size."""
        known = self._reports.get(worker)
        if known is None or now - known.heard > REPORT_SECONDS:
            return None
        return known.report if known.report.block_tokens == block_tokens else None

    def reports(self, now: float) -> dict[int, tuple[WorkerReport, float]]:
        """The last report of each worker's tier, and its age in seconds."""
        return {worker: (known.report, now - known.heard) for worker, known in self._reports.items()}

    def block_bytes(self) -> int:
        """Bytes of a KV block, by the first tier that reports; 0 if none does."""
        known = next(iter(self._reports.values()), None)
        return known.report.chunk_bytes // known.report.blocks_per_chunk if known else 0

    def forget_silent(self, now: float) -> None:
        self._reports = {
            worker: known for worker, known in self._reports.items() if now - known.heard <= REPORT_SECONDS
        }


def _of_engine(report: WorkerReport) -> tuple[float, ...]:
    """The fields of a report that change as the engine works. Another process sends the report, even if the engine
    hangs."""
    return (
        report.queue,
        report.prefill_base_seconds,
        report.prefill_seconds_per_token,
        report.prefill_seconds_per_token_squared,
        report.dram_bytes_per_second,
    )


def parse_card(text: str) -> Card | None:
    """A parsed model deployment card; None if it has no KV cache."""
    try:
        card = json.loads(text)
        runtime = card.get("runtime_config") or {}
        budget = (runtime.get("runtime_data") or {}).get("token_budget") or {}
        return Card(
            int(card["kv_cache_block_size"]),
            int(runtime.get("total_kv_blocks") or 0),
            card["display_name"],
            frozenset(runtime.get("taints") or ()),
            int(budget["combined_limit"]) if budget.get("reject_prompt_overflow") else 0,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
