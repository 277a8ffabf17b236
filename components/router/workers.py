"""What the router knows of the workers from their own announcements: model cards and tier reports.

Plain state, filled from Dynamo's discovery and from the bus; no I/O of its own.
"""

import json
import logging
from dataclasses import dataclass

from kvstore.bus.messages import WorkerReport

logger = logging.getLogger(__name__)

# Ten heartbeats: a worker whose reports stop is still served, without its tier.
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Card:
    """What matters here of a worker's model deployment card."""

    block_tokens: int
    total_blocks: int
    model: str
    taints: frozenset[str] = frozenset()  # its topology's, too: dynamo.topology/zone=a


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

    @property
    def cards(self) -> dict[int, Card]:
        return self._cards

    def set_cards(self, cards: dict[str, str]) -> None:
        """Take in the model cards (JSON) that discovery holds now, by worker id."""
        self._parsed = {text: self._parsed.get(text) or parse_card(text) for text in cards.values()}
        parsed = {int(worker): self._parsed[text] for worker, text in cards.items()}
        self._cards = {worker: card for worker, card in parsed.items() if card is not None}

    def heard(self, report: WorkerReport, now: float) -> None:
        if report.endpoint == self._endpoint and report.worker.isdigit():
            self._reports[int(report.worker)] = _Report(report, now)

    def report(self, worker: int, block_tokens: int, now: float) -> WorkerReport | None:
        """The worker's tier, or None if it has none that the router can use."""
        known = self._reports.get(worker)
        if known is None or now - known.heard > REPORT_SECONDS:
            return None
        return known.report if known.report.block_tokens == block_tokens else None

    def reports(self, now: float) -> dict[int, tuple[WorkerReport, float]]:
        """What each worker's tier said last, and seconds since."""
        return {worker: (known.report, now - known.heard) for worker, known in self._reports.items()}

    def forget_silent(self, now: float) -> None:
        self._reports = {
            worker: known for worker, known in self._reports.items() if now - known.heard <= REPORT_SECONDS
        }


def parse_card(text: str) -> Card | None:
    """A model deployment card, or None if it says nothing of a KV cache."""
    try:
        card = json.loads(text)
        runtime = card.get("runtime_config") or {}
        return Card(
            int(card["kv_cache_block_size"]),
            int(runtime.get("total_kv_blocks") or 0),
            card["display_name"],
            frozenset(runtime.get("taints") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
