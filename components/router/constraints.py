"""Which workers a request may go to, by what Dynamo passes with it in `routing`: the candidates are Dynamo's own."""

from collections.abc import Mapping
from typing import Any, Self

import msgspec


class Constraints(msgspec.Struct, frozen=True):
    """None where the request does not say. What Dynamo itself decides when it takes a pinned request (an overloaded
    worker, say) shows as a failure of that worker, and the prompt is decided again without it."""

    worker: int | None  # the client insists on it
    dp_rank: int | None
    allowed_workers: frozenset[int] | None
    required_taints: frozenset[str]

    @classmethod
    def of(cls, routing: Mapping[str, Any]) -> Self:
        allowed = routing.get("allowed_worker_ids")
        constraints = routing.get("routing_constraints") or {}
        return cls(
            routing.get("backend_instance_id"),
            routing.get("dp_rank"),
            None if allowed is None else frozenset(allowed),
            frozenset(constraints.get("required_taints") or ()),
        )

    def allow(self, worker: int, dp_rank: int, taints: frozenset[str]) -> bool:
        return (
            self.worker in (None, worker)
            and self.dp_rank in (None, dp_rank)
            and (self.allowed_workers is None or worker in self.allowed_workers)
            and self.required_taints <= taints
        )
