"""The hints of a client in `nvext.agent_hints`, as Dynamo passes them on in `routing`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from components.router.failures import Refused

OUTPUT_TOKENS_MAX = 1 << 20
PRIORITY_MAX = 1000
# Limit for any priority: a higher weight would ignore all other requests.
WEIGHT_MAX = 10.0


class Hints(NamedTuple):
    """- `output_tokens`: expected length of the answer; 0: no hint.
    - `output_tokens_max`: the client's limit for it.
    - `weight`: the cost of a second of waiting, relative to other requests.
    """

    output_tokens: int = 0
    output_tokens_max: float = math.inf
    weight: float = 1.0

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        """The default priority is 0. With 1 a second counts twice, with -1 half, and so on. The frontend passes the
        deprecated `latency_sensitivity` on as `priority_jump`. Raises Refused."""
        routing = request.get("routing") or {}
        most = (request.get("stop_conditions") or {}).get("max_tokens") or math.inf
        expected = _checked("osl", routing.get("expected_output_tokens"), 1, OUTPUT_TOKENS_MAX)
        name, field = ("priority", "priority") if "priority" in routing else ("latency_sensitivity", "priority_jump")
        priority = _checked(name, routing.get(field), -PRIORITY_MAX, PRIORITY_MAX)
        weight = min(WEIGHT_MAX, 1 + abs(priority))
        return cls(int(min(expected, most)), most, weight if priority >= 0 else 1 / weight)

    def expected(self, usual_tokens: float) -> float:
        """The expected length of the answer, if answers usually have `usual_tokens`."""
        return self.output_tokens or min(usual_tokens, self.output_tokens_max)


def _checked(name: str, value: Any, least: int, most: int) -> float:
    """The value, if it is in range; 0 for None. Raises Refused."""
    if value is None:
        return 0
    if isinstance(value, int | float) and least <= value <= most:
        return value
    raise Refused(f"nvext.agent_hints.{name}: {value} given, expected {least} to {most}")
