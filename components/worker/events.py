"""KV events of the DRAM tier that a router can use.

Stock vLLM's tiering emits them bare: a hash, no tokens, no parent, and Dynamo drops those. Here the description of each
chunk is noted while its request is at hand, both when the engine stores it and when it is fetched, and put into the
event when the DRAM tier reports the chunk. The medium stays "CPU": Dynamo credits it as pinned host memory.
"""

import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable

from components.worker.compat import (
    BlockStored,
    GroupOffloadConfig,
    OffloadEventMetadata,
    OffloadingEvent,
    OffloadingEventsTracker,
    OffloadingKVEventsConfig,
    OffloadKey,
    Request,
    generate_block_hash_extra_keys,
)


@dataclasses.dataclass(slots=True)
class Description(OffloadEventMetadata):
    """What a stored event says of a chunk, and where in its prompt the chunk stands."""

    chunk: int = 0


_PLAIN_FIELDS = operator.attrgetter(*(field.name for field in dataclasses.fields(OffloadEventMetadata)))


class ChunkEvents(OffloadingEventsTracker):
    """Replaces the scheduler's tracker. For the scheduler's thread; holds at most `chunks_max` descriptions.

    `describe` hears of every chunk that the engine is about to store.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        chunks_max: int,
        describe: Callable[[Request, GroupOffloadConfig, int, OffloadKey], None],
    ):
        super().__init__(OffloadingKVEventsConfig(enabled, self_describing_kv_events=enabled))
        self._chunks_max = chunks_max
        self._describe = describe
        # The base class pops a description when its chunk is evicted; what never gets there is bounded here.
        self._pending_event_metadata: OrderedDict[OffloadKey, Description] = OrderedDict()

    def record_store(
        self, req: Request, group_config: GroupOffloadConfig, chunk_idx: int, offload_key: OffloadKey
    ) -> None:
        self._describe(req, group_config, chunk_idx, offload_key)
        if offload_key not in self._pending_event_metadata:
            super().record_store(req, group_config, chunk_idx, offload_key)
        while len(self._pending_event_metadata) > self._chunks_max:
            self._pending_event_metadata.popitem(last=False)

    def _build_event_metadata(self, req: Request, group_config: GroupOffloadConfig, chunk_idx: int) -> Description:
        plain = super()._build_event_metadata(req, group_config, chunk_idx)
        described = Description(*_PLAIN_FIELDS(plain), chunk_idx)
        described.extra_keys = _extra_keys(req, group_config, chunk_idx)
        return described

    def _take_stored_event(self, event: OffloadingEvent) -> Iterable[BlockStored]:
        """Parents first, since a router drops a chunk whose parent it does not know, and chunks that follow each other
        in one event: everybody takes that in at a fraction of the cost. A chunk that nobody described is left out: a
        bare event would only be dropped, with a warning."""
        known = [key for key in event.keys if key in self._pending_event_metadata]
        known.sort(key=lambda key: self._pending_event_metadata[key].chunk)
        runs: list[BlockStored] = []
        by_last_hash: dict[object, BlockStored] = {}
        for one in super()._take_stored_event(OffloadingEvent(known, event.medium, event.removed, event.locality)):
            run = by_last_hash.pop(one.parent_block_hash, None)
            if run is None or (run.group_idx, run.lora_name) != (one.group_idx, one.lora_name):
                run = one
                runs.append(run)
            else:
                run.block_hashes += one.block_hashes
                run.token_ids += one.token_ids
                run.extra_keys += one.extra_keys
            by_last_hash[one.block_hashes[-1]] = run
        return runs


def _extra_keys(request: Request, group: GroupOffloadConfig, chunk: int) -> tuple[tuple[object, ...] | None, ...]:
    """What else went into each block's hash (LoRA, salt, images), as in the engine's own events for HBM."""
    tokens = group.tokens_per_chunk // group.hashes_per_chunk
    first = chunk * group.hashes_per_chunk
    return tuple(
        generate_block_hash_extra_keys(request, block * tokens, (block + 1) * tokens, 0)[0]
        for block in range(first, first + group.hashes_per_chunk)
    )
