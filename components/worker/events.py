"""KV events of the DRAM tier that a router can use.

Stock vLLM's tiering emits them bare: a hash, no tokens, no parent, and Dynamo drops those. Here the request of each
chunk is noted, both when the engine stores the chunk and when it came from the store, and the event is made of it when
the DRAM tier reports the chunk. The medium stays "CPU": Dynamo credits it as pinned host memory.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from components.worker.compat import (
    BlockStored,
    GroupOffloadConfig,
    KVCacheEvent,
    OffloadingEvent,
    OffloadingEventsTracker,
    OffloadingKVEventsConfig,
    OffloadKey,
    Request,
    generate_block_hash_extra_keys,
    make_offload_key,
    maybe_convert_block_hash,
)


class _Place(NamedTuple):
    """Where a chunk that is not reported yet stands."""

    request: Request
    group: GroupOffloadConfig
    chunk: int

    @property
    def parent(self) -> OffloadKey | None:
        first = self.chunk * self.group.hashes_per_chunk
        return make_offload_key(self.request.block_hashes[first - 1], self.group.group_idx) if first else None


class _Told(NamedTuple):
    """What the base class needs to tell that a chunk is gone."""

    block_hashes: list[bytes]
    group_idx: int


class ChunkEvents(OffloadingEventsTracker):
    """Replaces the scheduler's tracker. For the scheduler's thread; holds at most `chunks_max` chunks that were
    reported, as many that were not yet, and of those in DRAM the ones that came before their parents.

    `describe` hears of every chunk that the engine is about to store. `is_arriving` says whether DRAM has a row for a
    chunk that is not filled yet.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        chunks_max: int,
        describe: Callable[[Request, GroupOffloadConfig, int, OffloadKey], None],
        is_arriving: Callable[[OffloadKey], bool],
    ):
        super().__init__(OffloadingKVEventsConfig(enabled, self_describing_kv_events=enabled))
        self._chunks_max = chunks_max
        self._describe = describe
        self._is_arriving = is_arriving
        self._places: OrderedDict[OffloadKey, _Place] = OrderedDict()
        self._early: dict[OffloadKey, _Place] = {}  # in DRAM before its parent, and not told yet
        # The base class pops a chunk when it is evicted; what never gets there is bounded here.
        self._pending_event_metadata: OrderedDict[OffloadKey, _Told] = OrderedDict()

    def record_store(
        self, req: Request, group_config: GroupOffloadConfig, chunk_idx: int, offload_key: OffloadKey
    ) -> None:
        self._describe(req, group_config, chunk_idx, offload_key)
        self.record(req, group_config, chunk_idx, offload_key)

    def record(self, request: Request, group: GroupOffloadConfig, chunk: int, key: OffloadKey) -> None:
        """The DRAM tier is about to report the chunk."""
        if self.self_describing_enabled and group.sliding_window_size_in_chunks is None:
            self._places[key] = _Place(request, group, chunk)
            if len(self._places) > self._chunks_max:
                self._places.popitem(last=False)

    def reset(self) -> None:
        self._places.clear()
        self._early.clear()
        super().reset()

    def _take_stored_event(self, event: OffloadingEvent) -> Iterable[BlockStored]:
        """Parents first, since a router drops a chunk whose parent it does not know: the pieces of a fetch come in any
        order. And chunks that follow each other in one event: everybody takes that in at a fraction of the cost. A
        chunk of which nothing is known is left out: a bare event would only be dropped, with a warning."""
        found = [(key, place) for key in event.keys if (place := self._places.pop(key, None)) is not None]
        found += self._early.items()
        self._early.clear()
        runs: list[list[tuple[OffloadKey, _Place]]] = []
        for key, place in sorted(found, key=lambda one: (id(one[1].request), one[1].group.group_idx, one[1].chunk)):
            last = runs[-1][-1][1] if runs else None
            if last and (last.request, last.group, last.chunk + 1) == place:
                runs[-1].append((key, place))
            else:
                runs.append([(key, place)])
        told = []
        for run in sorted(runs, key=lambda run: run[0][1].chunk):  # the run with its parent begins before it
            first = run[0][1]
            if self._follows(first.parent):
                self._early.update(run)
                continue
            for key, place in run:
                self._note_told(key, place)
            told.append(_stored(*first, len(run), event))
        return told

    def _follows(self, parent: OffloadKey | None) -> bool:
        """Whether a chunk's parent is yet to be told."""
        if parent is None or parent in self._pending_event_metadata:
            return False
        return parent in self._early or parent in self._places or self._is_arriving(parent)

    def _take_removed_event(self, event: OffloadingEvent) -> Iterable[KVCacheEvent]:
        """What went before it was told is not told at all."""
        keys = [key for key in event.keys if self._early.pop(key, None) is None]
        return super()._take_removed_event(replace(event, keys=keys))

    def _note_told(self, key: OffloadKey, place: _Place) -> None:
        request, group, chunk = place
        first = chunk * group.hashes_per_chunk
        told = self._pending_event_metadata
        told[key] = _Told(request.block_hashes[first : first + group.hashes_per_chunk], group.group_idx)
        if len(told) > self._chunks_max:
            told.popitem(last=False)


def _stored(
    request: Request, group: GroupOffloadConfig, chunk: int, chunks: int, event: OffloadingEvent
) -> BlockStored:
    """One event for chunks of a request that follow each other."""
    first, last = chunk * group.hashes_per_chunk, (chunk + chunks) * group.hashes_per_chunk
    lora, kind = request.lora_request, group.kv_event_group_spec
    block_tokens = group.tokens_per_chunk // group.hashes_per_chunk
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(one) for one in request.block_hashes[first:last]],
        parent_block_hash=maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None,
        token_ids=list(request.all_token_ids[first * block_tokens : last * block_tokens]),
        block_size=block_tokens,
        lora_id=lora.adapter_id if lora is not None else None,
        medium=event.medium,
        lora_name=lora.name if lora is not None else None,
        extra_keys=_extra_keys(request, first, last, block_tokens),
        group_idx=group.group_idx,
        kv_cache_spec_kind=kind.kv_cache_spec_kind,
        kv_cache_spec_sliding_window=kind.kv_cache_spec_sliding_window,
        locality=event.locality.value if event.locality is not None else None,
    )


def _extra_keys(request: Request, first: int, last: int, block_tokens: int) -> list[tuple[object, ...] | None]:
    """What else went into each block's hash (LoRA, salt, images), as in the engine's own events for HBM."""
    if not (request.lora_request or request.cache_salt or request.mm_features or request.prompt_embeds is not None):
        return [None] * (last - first)
    return [
        generate_block_hash_extra_keys(request, block * block_tokens, (block + 1) * block_tokens, 0)[0]
        for block in range(first, last)
    ]
