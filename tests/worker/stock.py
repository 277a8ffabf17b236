"""vLLM's own offloading, put together without an engine: its scheduler's half, its DRAM tier, a request; and an
executor whose ranks say what they are told to."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingKVEventsConfig,
    ReqContext,
    RequestOffloadingContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import OffloadingGroupConfig
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager
from vllm.v1.request import Request

from components.worker import weights
from components.worker.weights import LoadedAdapter, RankDigest

BLOCK_TOKENS = 4
SPEC = FullAttentionSpec(BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)

init_none_hash(sha256_cbor)


def offload_key(number: int, group: int = 0) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), group)


def engine_request(name: str = "r", prompt_tokens: int = 16, answer_tokens: int = 0, **options: Any) -> Request:
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256_cbor)
    tokens, sampling = list(range(prompt_tokens)), SamplingParams(max_tokens=1000)
    request = Request(name, tokens, sampling, None, block_hasher=hasher, **options)
    request.append_output_token_ids(list(range(answer_tokens)))
    return request


def primary(rows: int = 16) -> CPUPrimaryTierOffloadingManager:
    """The DRAM tier's bookkeeping, over memory that nobody uses."""
    memory = memoryview(np.zeros((rows, 8), dtype=np.int8))
    return CPUPrimaryTierOffloadingManager(rows, SimpleNamespace(create_kv_memoryview=lambda: memory))


class Tier(SecondaryTierManager):
    """A secondary tier that holds everything and remembers its jobs; a test finishes them."""

    def __init__(self) -> None:
        super().__init__(None, memoryview(np.zeros((1, 8), dtype=np.int8)), "test")
        self.jobs: list[TransferJob] = []
        self.results: list[JobResult] = []
        self.finished: list[str] = []

    def on_new_request(self, context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, context: ReqContext) -> None:
        self.finished.append(context.req_id)

    def lookup(self, key: Any, context: ReqContext) -> LookupResult:
        return LookupResult.HIT

    def submit_load(self, job: TransferJob) -> None:
        self.jobs.append(job)

    submit_store = submit_load

    def get_finished_jobs(self) -> list[JobResult]:
        results, self.results = self.results, []
        return results

    def drain_jobs(self) -> None:
        pass


def offloading(manager: Any, *, groups: int = 1, blocks_per_chunk: int = 1) -> OffloadingConnectorScheduler:
    """The scheduler's half of stock offloading over that manager; KV events are on, and each group is full attention
    with blocks of 4 tokens."""
    described = [OffloadingGroupConfig(BLOCK_TOKENS, (f"layer {group}",), group) for group in range(groups)]
    spec: Any = SimpleNamespace(
        config=SimpleNamespace(groups=described),
        blocks_per_chunk=blocks_per_chunk,
        tokens_per_block=(BLOCK_TOKENS,) * groups,
        tokens_per_hash=BLOCK_TOKENS,
        offload_prompt_only=False,
        kv_events_config=OffloadingKVEventsConfig(True, True),
        get_manager=lambda: manager,
    )
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_cache_retention_interval=None, enable_prefix_caching=True),
        speculative_config=None,
        parallel_config=SimpleNamespace(world_size=1, decode_context_parallel_size=1),
    )
    caches = [KVCacheGroupSpec(list(one.layer_names), SPEC) for one in described]
    return OffloadingConnectorScheduler(spec, config, KVCacheConfig(1, [], caches))


def group_config(**changes: Any) -> GroupOffloadConfig:
    """Chunks of one block of 4 tokens, but for what is changed."""
    return offloading(None).config.kv_group_configs[0]._replace(**changes)


def step_output(finished: tuple[str, ...] = (), **scheduled: int) -> SchedulerOutput:
    """What the scheduler says of a step: who computes how many tokens, and who has ended."""
    output = SchedulerOutput.make_empty()
    output.finished_req_ids.update(finished)
    output.num_scheduled_tokens.update(scheduled)
    output.total_num_scheduled_tokens = sum(scheduled.values())
    return output


class Ranks(Executor):
    """As many ranks as there are models; `adapters` says what is loaded under a number. What they are asked is kept:
    "model", or the number of an adapter."""

    def __init__(self, config: Any = None, *models: Any):
        self.vllm_config = config
        self.parallel_config = SimpleNamespace(world_size=max(1, len(models)))
        self.models: list[Any] = list(models) or [has("model")]
        self.adapters: dict[int, Any] = {}
        self.asked: list[Any] = []
        self.called: list[object] = []
        self.sleeping_tags: set[str] = set()
        self.broken: Exception | None = None
        self.room = 1000  # for so many adapters
        self.loaded: list[int] = []  # what makes room first comes first

    def _init_executor(self) -> None:
        pass

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        if method is not weights.answer:
            self.called.append(method)
            return [None] * len(self.models)
        if self.broken is not None:
            raise self.broken
        question, *of = args
        if question == "model_digest":
            self.asked.append("model")
            return list(self.models)
        adapter, in_use = of
        self.asked.append(adapter.lora_int_id)
        used = [*(number for number in reversed(in_use) if number in self.loaded), adapter.lora_int_id]
        self.loaded = [*(number for number in self.loaded if number not in used), *used][-self.room :]
        found = self.adapters.setdefault(adapter.lora_int_id, f"content of {adapter.lora_path}")
        answers = found if isinstance(found, list) else [found] * len(self.models)
        return [LoadedAdapter(one, frozenset(self.loaded)) if type(one) is str else one for one in answers]

    def check_health(self) -> None:
        self.collective_rpc("check_health")


def has(model: str, *sums: int) -> RankDigest:
    """A rank's word on what it has loaded."""
    return RankDigest(model.encode(), sums, 10**9, 0.5)
