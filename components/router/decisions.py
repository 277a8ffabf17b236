"""Decisions for the operator: counters, a log line each, and the history."""

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client import CollectorRegistry

from components.pricing.cost import Choice, Choices
from components.router.history import History
from components.router.records import Decision, Prefilled, label, parts, sources, tiers
from components.router.series import DecisionCollector, Distributions, Totals

logger = logging.getLogger(__name__)

# Candidates in a log line, the cheapest first: in a large cluster, to log all takes longer than the decision.
LOGGED = 8


class Decisions:
    """Counts, logs and keeps decisions. For one event loop."""

    def __init__(self, block_tokens: int):
        self.registry = CollectorRegistry()
        self.block_tokens = block_tokens
        self.history = History()
        self._totals = Totals()
        self.registry.register(DecisionCollector(self._totals, self.history, block_tokens))
        self.distributions = Distributions(self.registry)

    def decided(
        self,
        decision_id: str,
        prompt_tokens: int,
        chosen: Choice,
        choices: Choices,
        prefilled: Prefilled | None = None,
    ) -> Decision:
        """Count a decision, log it, and keep it with all candidates."""
        worker = label(chosen)
        self._totals.decisions[worker] += 1
        self._totals.blocks.setdefault(worker, Counter()).update(tiers(chosen, self.block_tokens))
        if prefilled is None:
            self._totals.tokens.update(sources(chosen))
        decision = self.history.keep(decision_id, prompt_tokens, chosen, choices, prefilled)
        self.distributions.predicted_ttft.observe(decision.predicted_ttft_seconds)
        if logger.isEnabledFor(logging.INFO):
            self._log(decision, chosen, choices)
        return decision

    def took(self, stages: Mapping[str, float]) -> None:
        """Observe the duration of each stage in seconds."""
        for stage, seconds in stages.items():
            self.distributions.stages.labels(stage).observe(seconds)
            self._totals.decision_seconds += seconds

    def fell_back(self, missing: str) -> None:
        self._totals.fallbacks[missing] += 1

    def missed(self, deadline: str) -> None:
        self._totals.missed[deadline] += 1

    def retried(self, failed: Choice) -> None:
        self._totals.retries[label(failed)] += 1

    def first_token(self, decision: Decision, seconds: float) -> None:
        """It came so many seconds after the decision on the worker that answers."""
        if decision.other_ttft_seconds is not None:
            self.distributions.regret.observe(max(0.0, seconds - decision.other_ttft_seconds))
        decision.ttft_seconds = seconds + (decision.prefilled.ttft_seconds if decision.prefilled else 0.0)
        self.distributions.ttft.observe(decision.ttft_seconds)
        if decision.predicted_ttft_seconds > 0:
            self.distributions.ttft_ratio.observe(decision.ttft_seconds / decision.predicted_ttft_seconds)

    def answered(self, decision: Decision, first_tokens: int, tokens: int, seconds: float) -> None:
        """Note a finished answer: `tokens` in `seconds` after the first output, which had `first_tokens`."""
        decision.output_tokens = first_tokens + tokens
        self._totals.output_tokens += decision.output_tokens
        if tokens:
            decision.tpot_seconds = seconds / tokens
            self.distributions.tpot.observe(decision.tpot_seconds)

    def ended(self, decision_id: str, outcome: str) -> Decision | None:
        """The decision, if it was made and is known still."""
        self._totals.outcomes[outcome] += 1
        return self.history.ended(decision_id, outcome)

    def totals(self) -> Totals:
        """The same numbers as in Prometheus, as a copy."""
        return replace(copy.deepcopy(self._totals), open=self.history.open)

    def _log(self, decision: Decision, chosen: Choice, choices: Choices) -> None:
        cheapest = [choices[number] for number in choices.price_seconds.argsort()[:LOGGED].tolist()]
        others = [choice for choice in cheapest if choice.candidate is not chosen.candidate]
        lines = [self._line(choice) for choice in [chosen, *others][:LOGGED]]
        if len(choices) > LOGGED:
            lines.append(f"{len(choices) - LOGGED} more expensive")
        logger.info(
            "decision %s: %d tokens -> worker %s | %s",
            decision.id,
            decision.prompt_tokens,
            decision.chosen,
            " | ".join(lines),
        )

    def _line(self, choice: Choice) -> str:
        blocks = " ".join(f"{tier} {count}" for tier, count in tiers(choice, self.block_tokens).items())
        seconds = " ".join(f"{part} {value:.4f}" for part, value in parts(choice).items())
        return f"{label(choice)}: blocks {blocks}; seconds {seconds}"
