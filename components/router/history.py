"""The last decisions in full, and those whose prompts run."""

import collections
import itertools
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence

from components.pricing.cost import Choice, Choices
from components.router.records import Decision, Prefilled, explained, record

KEPT = 1000  # 30 MB with 64 workers
# Limit of running prompts that are tracked. Beyond it the oldest are still served, but their outcome is not shown.
_OPEN_MAX = 20_000
# Limit of answered prompts between two ticks of the page.
_ANSWERED_MAX = 4096


class History:
    """For one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self.answered_lately: deque[Decision] = deque(maxlen=_ANSWERED_MAX)
        self.latest: Sequence[Choice] = ()  # all candidates of the newest decision
        self._last: OrderedDict[str, Decision] = OrderedDict()
        self._open: OrderedDict[str, Decision] = OrderedDict()
        # For decisions that were not viewed yet: the input from which candidates and targets are built on the first
        # view.
        self._unseen: dict[str, tuple[Choice, Choices]] = {}

    @property
    def open(self) -> int:
        """The number of prompts that have not ended."""
        return len(self._open)

    def keep(
        self, decision_id: str, prompt_tokens: int, chosen: Choice, choices: Choices, prefilled: Prefilled | None
    ) -> Decision:
        """The record of a decision: until `ended`, and among the last."""
        decision = record(decision_id, prompt_tokens, chosen, [chosen])
        decision.other_ttft_seconds = choices.least_ttft_but(chosen)
        if prefilled is not None:
            decision.prefilled = prefilled
            decision.predicted_ttft_seconds += prefilled.predicted_ttft_seconds
            decision.without_store_ttft_seconds += prefilled.without_store_ttft_seconds
        self._last[decision_id] = self._open[decision_id] = decision
        self._unseen[decision_id] = chosen, choices
        self.latest = choices
        self.count += 1
        if len(self._last) > KEPT:
            forgotten, _ = self._last.popitem(last=False)
            self._unseen.pop(forgotten, None)
        if len(self._open) > _OPEN_MAX:
            self._open.popitem(last=False)
        return decision

    def ended(self, decision_id: str, outcome: str) -> Decision | None:
        """The decision, if it was made and is known still."""
        decision = self._open.pop(decision_id, None)
        if decision is not None:
            decision.outcome = outcome
            if decision.ttft_seconds is not None:
                self.answered_lately.append(decision)
        return decision

    def last(self, limit: int = KEPT, worker: str = "") -> list[Decision]:
        """The latest first; with `worker` only those of this worker."""
        chosen = (one for one in reversed(self._last.values()) if worker in ("", one.chosen))
        return [self._seen(decision) for decision in itertools.islice(chosen, limit)]

    def newest(self, limit: int) -> list[Decision]:
        """The latest first, each with only the chosen candidate."""
        return list(itertools.islice(reversed(self._last.values()), limit))

    def open_by_worker(self) -> Mapping[str, int]:
        return collections.Counter(decision.chosen for decision in self._open.values())

    def find(self, decision_id: str) -> Decision | None:
        decision = self._last.get(decision_id) or self._open.get(decision_id)
        return None if decision is None else self._seen(decision)

    def _seen(self, decision: Decision) -> Decision:
        """The decision with all candidates and targets. Built on the first view: for every prompt, it would take longer
        than the decision itself."""
        if (priced := self._unseen.pop(decision.id, None)) is not None:
            full = explained(decision.id, decision.prompt_tokens, *priced)
            decision.candidates, decision.targets = full.candidates, full.targets
        return decision
