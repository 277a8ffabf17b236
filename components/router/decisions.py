"""What the router shows of its decisions: a log line each, and Prometheus series.

Worker ids are shown in hexadecimal, as Dynamo's own metrics do.
"""

import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from components.router.cost import Choice

logger = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Decisions:
    """Counts and shows decisions. For one event loop."""

    def __init__(self, block_tokens: int):
        self.registry = CollectorRegistry()
        self._block_tokens = block_tokens
        self._workers: set[str] = set()
        self._blocks = Gauge(
            "kvtier_router_candidate_blocks",
            "Blocks of the last prompt by where this worker would find them",
            ["worker", "tier"],
            registry=self.registry,
        )
        self._seconds = Gauge(
            "kvtier_router_candidate_seconds",
            "Price of the last prompt on this worker, in its parts",
            ["worker", "part"],
            registry=self.registry,
        )
        self._chosen = Counter(
            "kvtier_router_decisions", "Prompts sent to this worker", ["worker"], registry=self.registry
        )
        self._chosen_blocks = Counter(
            "kvtier_router_chosen_blocks",
            "Blocks of the prompts sent to this worker by where it was to find them",
            ["worker", "tier"],
            registry=self.registry,
        )
        self._retries = Counter(
            "kvtier_router_retries",
            "Prompts that went to another worker because this one failed",
            ["worker"],
            registry=self.registry,
        )
        self._predicted = Histogram(
            "kvtier_router_predicted_ttft_seconds",
            "Time to first token as predicted",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._actual = Histogram(
            "kvtier_router_ttft_seconds",
            "Time from the decision to the first token",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def decided(self, decision_id: str, prompt_tokens: int, chosen: Choice, choices: Sequence[Choice]) -> None:
        """Show a decision and, for each worker, what it would have found and cost."""
        for choice in choices:
            worker = label(choice)
            for tier, blocks in self._tiers(choice).items():
                self._blocks.labels(worker, tier).set(blocks)
            for part, seconds in _parts(choice).items():
                self._seconds.labels(worker, part).set(seconds)
        worker = label(chosen)
        self._chosen.labels(worker).inc()
        for tier, blocks in self._tiers(chosen).items():
            self._chosen_blocks.labels(worker, tier).inc(blocks)
        self._predicted.observe(chosen.ttft_seconds)
        self._forget_others({label(choice) for choice in choices})
        logger.info(
            "decision %s: %d tokens -> worker %s | %s",
            decision_id,
            prompt_tokens,
            worker,
            " | ".join(self._line(choice) for choice in choices),
        )

    def first_token(self, seconds: float) -> None:
        self._actual.observe(seconds)

    def retried(self, failed: Choice) -> None:
        self._retries.labels(label(failed)).inc()

    def _tiers(self, choice: Choice) -> dict[str, int]:
        """Blocks by tier; a block that is not whole counts as missing."""
        hbm = choice.hbm_tokens // self._block_tokens
        local = (choice.hbm_tokens + choice.dram_tokens) // self._block_tokens
        loaded = (choice.hbm_tokens + choice.dram_tokens + choice.store_tokens) // self._block_tokens
        tokens = choice.hbm_tokens + choice.dram_tokens + choice.store_tokens + choice.missing_tokens
        total = -(-tokens // self._block_tokens)
        return {"hbm": hbm, "dram": local - hbm, "store": loaded - local, "missing": total - loaded}

    def _line(self, choice: Choice) -> str:
        tiers = " ".join(f"{tier} {blocks}" for tier, blocks in self._tiers(choice).items())
        parts = " ".join(f"{part} {seconds:.4f}" for part, seconds in _parts(choice).items())
        return f"{label(choice)}: blocks {tiers}; seconds {parts}"

    def _forget_others(self, present: set[str]) -> None:
        """Workers come and go: series of those that are gone would stay for ever."""
        for worker in self._workers - present:
            for tier in ("hbm", "dram", "store", "missing"):
                self._blocks.remove(worker, tier)
            for part in ("wait", "fetch", "copy", "prefill", "ttft", "price"):
                self._seconds.remove(worker, part)
        self._workers = present


def label(choice: Choice) -> str:
    rank = choice.candidate.dp_rank
    return format(choice.candidate.worker, "x") + (f".{rank}" if rank else "")


def _parts(choice: Choice) -> dict[str, float]:
    return {
        "wait": choice.wait_seconds,
        "fetch": choice.fetch_seconds,
        "copy": choice.copy_seconds,
        "prefill": choice.prefill_seconds,
        "ttft": choice.ttft_seconds,
        "price": choice.price_seconds,
    }
