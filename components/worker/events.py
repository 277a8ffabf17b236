"""KV events of the DRAM tier: vLLM's self-describing ones, with all inputs of a block's hash.

Stock events omit a prompt's cache salt and images, which the engine's events for HBM include. Without them a router
confuses the chunks of two tenants.
"""

from components.worker.compat import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    OffloadingEventsTracker,
    Request,
    generate_block_hash_extra_keys,
)


class ChunkEvents(OffloadingEventsTracker):
    """For the scheduler's thread."""

    @staticmethod
    def replace(scheduler: OffloadingConnectorScheduler) -> "ChunkEvents":
        """Change the class of the scheduler's tracker, since constructors differ between vLLM's releases."""
        scheduler._events_tracker.__class__ = ChunkEvents
        tracker: ChunkEvents = scheduler._events_tracker
        return tracker

    def _build_event_metadata(self, req: Request, group_config: GroupOffloadConfig, chunk_idx: int) -> object:
        described = super()._build_event_metadata(req, group_config, chunk_idx)
        if req.lora_request or req.cache_salt or req.mm_features or req.prompt_embeds is not None:
            first, tokens = chunk_idx * group_config.tokens_per_chunk, described.block_size
            described.extra_keys = tuple(
                generate_block_hash_extra_keys(req, start, start + tokens, 0)[0]
                for start in range(first, first + group_config.tokens_per_chunk, tokens)
            )
        return described
