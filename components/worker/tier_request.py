"""The tier's state of one request: the places of its chunks, its fetches, and its deadline."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from components.worker.compat import (
    JobId,
    OffloadKey,
    ReqContext,
    Request,
    get_offload_block_hash,
    get_offload_group_idx,
)
from components.worker.mover import frames
from components.worker.mover.link import Job
from kvstore.bus.plan import Plan


def names(keys: Iterable[OffloadKey]) -> list[frames.Name]:
    """The chunks' names, as the mover knows them."""
    return [(get_offload_block_hash(key), get_offload_group_idx(key)) for key in keys]


@dataclass(eq=False)
class Load(Job):
    """A fetch of consecutive chunks of a request, from `first_chunk` on."""

    command: frames.Load
    keys: list[OffloadKey]
    request: "TierRequest"
    first_chunk: int
    cancelled: bool = False
    overdue: bool = False  # it reached its deadline unfinished


@dataclass(eq=False)
class TierRequest:
    """For the scheduler's thread. `number` is its name to the mover. Times are time.monotonic(), in seconds."""

    number: int
    context: ReqContext
    plan: Plan | None
    arrived: float
    deadline: float  # after it, the request no longer waits for this tier
    chunk_tokens: int
    identity: bytes | None = None  # of its KV; None: not known, and nothing is loaded or stored
    engine_request: Request | None = None
    asked: list[OffloadKey] | None = None  # without a plan: the chunks that the store was asked for
    targets: dict[OffloadKey, str | None] | None = None  # the store's answer
    awaited: bool = False  # whether a step has waited for the answer
    hurried: bool = False  # whether it has a slot in the engine
    gone: bool = False  # whether the engine is done with it
    abandoned: bool = False  # whether nothing more is fetched for it
    submitted: int = 0  # chunks whose fetch was begun
    fetches: dict[OffloadKey, int] = field(default_factory=dict)  # how often each chunk was
    loads: dict[JobId, Load] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)  # chunks that came from the store, at least in part
    tokens_sent: int = 0
    _planned: list[str | None] = field(init=False)  # by chunk

    def __post_init__(self) -> None:
        self._planned = self.plan.targets() if self.plan is not None else []

    @property
    def until(self) -> float:
        """When the request stops waiting."""
        if self.plan is None:
            return self.deadline
        return min(self.deadline, self.arrived + self.plan.wait_seconds(max(self.submitted, self.plan.fetch)))

    @property
    def gave_up(self) -> bool:
        return self.abandoned or time.monotonic() > self.until

    @property
    def undecided(self) -> bool:
        """Whether the store's answer is pending."""
        return self.asked is not None and self.targets is None and time.monotonic() <= self.deadline

    def answer(self, targets: list[str | None], seconds: float) -> None:
        """Take the store's answer, which may be shorter than the question. Fetches get `seconds` from now."""
        if self.targets is None:
            self.targets = dict(zip(self.asked or (), targets, strict=False))
            self.deadline += seconds

    def chunk(self, key: OffloadKey) -> int:
        """The chunk's number in the request; -1: it is not a whole one, or not known."""
        end = self.context.get_offload_key_position(key)
        return end // self.chunk_tokens - 1 if end is not None and end % self.chunk_tokens == 0 else -1

    def target(self, key: OffloadKey) -> str | None:
        """The target that holds the chunk; None: no target."""
        if self.plan is None:
            return self.targets.get(key) if self.targets is not None else None
        chunk = self.chunk(key)
        return self._planned[chunk] if 0 <= chunk < len(self._planned) else None
