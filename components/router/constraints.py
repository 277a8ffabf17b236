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
    def of(cls, routing: Mapping[str, Any], own_id: int | None = None) -> Self:
        """To a frontend this router, `own_id`, is a worker: it may say that it chose it, and refuses a client's
        backend_instance_id that is none of its own. It passes prefill_worker_id on: so a client names a worker."""
        allowed = routing.get("allowed_worker_ids")
        constraints = routing.get("routing_constraints") or {}
        return cls(
            _first(routing, ("prefill_worker_id", "backend_instance_id"), own_id),
            _first(routing, ("prefill_dp_rank", "dp_rank")),
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


def _first(routing: Mapping[str, Any], names: tuple[str, ...], but: int | None = None) -> int | None:
    return next((routing[name] for name in names if routing.get(name) not in (None, but)), None)
