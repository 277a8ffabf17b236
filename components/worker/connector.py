"""The connector that vLLM loads: vLLM's OffloadingConnector, with two changes.

Prefetch: stock offloading asks the tiers for a request's chunks when the scheduler has a slot for it. This connector
asks when the request arrives, so the fetch runs while the request queues. Loads in their step: stock copies chunks from
DRAM to HBM between steps, and learns two steps later that they are there. This connector copies them at the start of
the step that computes the rest of the prompt, unless that delays decoding requests too long (loads.py).
"""

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace

from components.worker.compat import (
    BlockPool,
    ForwardContext,
    GroupOffloadConfig,
    KVCacheBlocks,
    KVCacheConfig,
    KVConnectorFactory,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorStats,
    LaunchedMetadata,
    LookupResult,
    OffloadingConnector,
    OffloadingConnectorScheduler,
    OffloadKey,
    Request,
    RequestOffloadState,
    SchedulerOutput,
    VllmConfig,
    beside_computing,
    compute_after_loads,
    current_platform,
    get_offload_group_idx,
    manager_lock,
)
from components.worker.events import ChunkEvents
from components.worker.identity import Identity, KnownRequests
from components.worker.layout import WANTED_LAYOUT, choose_block_hash, engine_layout, needs_canonical, tp_agnostic
from components.worker.loads import Loads
from components.worker.manager import HoldingTieringManager
from components.worker.remote_tier import TIER_TYPE, RemoteTier
from components.worker.step_clock import StepClock, prefilled
from kvstore.bus.plan import FIELD, HINT_TYPE

# A field of a prefill worker's handover, in vLLM's kv_transfer_params: the hexadecimal digest of the identity that it
# computes KV with. It is absent if the worker does not know it, or if its prefix cache may hold KV of another identity.
_PREFILLED_WITH = f"{FIELD}.prefilled_with"
# A growing answer is stored in pieces of this size. A worker that dies loses at most one of them.
ANSWER_PIECE_TOKENS = 128


@dataclass
class _Loading:
    """A request with a load between steps, until its first step after the load."""

    request: Request
    over: bool = False
    void: bool = False  # the loaded KV is invalid


class KvtierConnector(OffloadingConnector):
    """There is one in the scheduler's process and one in each rank's. Methods run on the scheduler's thread. They may
    block only while the GPU is busy with an earlier step (step_clock.py). The tier's I/O is in a process of its own
    (mover/)."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        extra["self_describing_kv_events"] = True
        choose_block_hash(vllm_config)
        extra["canonical_layout"] = needs_canonical(vllm_config, kv_cache_config, extra)
        identity = _identity(vllm_config, kv_cache_config) if role == KVConnectorRole.SCHEDULER else None
        super().__init__(vllm_config, role, kv_cache_config)
        # Stock loads begin after the running step, because that may still zero their blocks. It writes nothing else to
        # them: the scheduler does not reassign a block while a running step writes to it.
        self._zeroes = kv_cache_config.needs_kv_cache_zeroing
        if self.connector_scheduler is None or identity is None:
            return
        manager = self.connector_scheduler.manager
        assert isinstance(manager, HoldingTieringManager)
        self._manager = manager
        tiers = [tier for tier in manager.secondary_tiers if isinstance(tier, RemoteTier)]
        if len(tiers) != 1:
            raise ValueError(f"kvtier: {len(tiers)} secondary_tiers of type {TIER_TYPE!r} given, expected one")
        (self._tier,) = tiers
        self._groups: tuple[GroupOffloadConfig, ...] = self.connector_scheduler.config.kv_group_configs
        self._block_pool: BlockPool | None = None
        self._identity = identity
        identity.on_stale = self._undo_loaded
        identity.on_unload = self._undo_unloaded
        self._known = KnownRequests(identity, self._note_answer, images=bool(extra.get("share_images")))
        self._loading: dict[str, _Loading] = {}
        self._drop = False  # whether the DRAM tier's content is invalid
        self._sources: dict[str, dict[str, int]] = {}  # of running requests: cached prompt tokens by tier
        # Requests whose prompt KV another connector transfers from a prefill worker. That worker has stored it.
        self._handed_over: set[str] = set()
        # Requests whose fetch has not fully begun: the store has not answered yet (without a plan), or no row is free.
        # In order of arrival, in which they are scheduled.
        self._arriving: dict[str, RequestOffloadState] = {}
        self._computed: list[str] = []  # requests of the last step that have something to store
        self._clock = StepClock()
        self._loads = Loads(self.connector_scheduler, self._tier.row_bytes)
        self._events = ChunkEvents.replace(self.connector_scheduler)
        self.connector_scheduler._build_store_jobs = self._build_store_jobs
        self.connector_scheduler._build_partial_tail_store_jobs = self._build_partial_tail_store_jobs
        self._tier.on_load = self._note_load
        self._tier.announce(identity.base, {})

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Block outermost, so that a block is copied in one piece instead of one for each layer. Hybrid models, whose
        layers of different shapes share memory, exclude heads before layers."""
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        if current_platform.is_cpu():
            return None  # its kernels support only one layout, and MLA's backend does not declare it
        wanted = "BLHNC" if vllm_config.model_config.is_hybrid else WANTED_LAYOUT
        layout: str | None = extra.get("kv_cache_layout", wanted)
        return layout

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._block_pool = gpu_block_pool

    def on_new_request(self, request: Request) -> None:
        _hand_over_plan(request)
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            self._handed_over.add(request.request_id)
        super().on_new_request(request)
        status = self.connector_scheduler._req_status[request.request_id]
        status.update_offload_keys()
        self._tier.arrived(request)
        self._known.arrived(request, self._engine_cache())
        self._begin(request)

    def _begin(self, request: Request) -> None:
        """Look up the request in the tier, once the identity of its KV is known."""
        status = self.connector_scheduler._req_status[request.request_id]
        identity = self._known.identity(request.request_id)
        if identity is None or self._drop:
            return
        if not self._tier.identify(request.request_id, identity) or request.skip_reading_prefix_cache:
            return
        if request.request_id in self._handed_over:
            return  # it is only stored, never loaded
        keys = [key for state in status.group_states for key in state.offload_keys]
        self._tier.ask(request.request_id, sorted(keys, key=status.req_context.get_offload_key_position))
        self._manager.expect(request.request_id)
        self._arriving[request.request_id] = status
        with manager_lock(self._manager):
            self._prefetch(status)

    def _engine_cache(self) -> object:
        """The engine's prefix cache. A reset replaces the object."""
        return self._block_pool.cached_block_hash_to_block if self._block_pool is not None else None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._known.look(request, self._engine_cache())
        if self._drop and not self._drop_cache() and self._copying():
            return None, False  # for a step or two
        self._begin(request)
        self._arriving.pop(request.request_id, None)  # from here on, the scheduler asks itself
        if request.request_id in self._handed_over:
            prefilled_with = (request.kv_transfer_params or {}).get(_PREFILLED_WITH)
            return 0 if self._known.admit(request, handed_over=str(prefilled_with)) else None, False
        if self._known.identity(request.request_id) is None:
            self._known.admit(request)
            return 0, False
        # With a chunk or less to compute there is nothing to load.
        beyond = request.num_tokens - num_computed_tokens > min(group.tokens_per_chunk for group in self._groups)
        speed = self._clock.dram_bytes_per_second
        copy_seconds = self._loads.seconds(request.num_tokens - num_computed_tokens, speed)
        self._tier.hurry(request.request_id)
        if beyond:
            self._tier.await_answer(request.request_id, self._clock.spare_seconds())
            if self._tier.await_chunks(request.request_id, self._clock.spare_seconds(copy_seconds)):
                self._manager.take_in()
        skip = request.skip_reading_prefix_cache
        request.skip_reading_prefix_cache = skip or self._drop  # no hits in a DRAM tier that is about to be dropped
        with self._loads.waited_for(request.num_tokens - num_computed_tokens, speed):
            found, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        request.skip_reading_prefix_cache = skip
        if found is None or not self._known.admit(request) or (found and self._drop):
            return None, False
        if self._drop and (identity := self._known.identity(request.request_id)) is not None:
            self._tier.identify(request.request_id, identity)  # to store it when DRAM is dropped
        found = found and self._loads.worth_loading(request, num_computed_tokens, found)
        if not found:
            return found, False
        in_step = self._loads.admit(request, found, speed)
        return found, not in_step

    def _note_answer(self, gone: Collection[str], outcome: str) -> None:
        """The ranks have reported their identity. The KV of the requests `gone` has another one: make it unusable, and
        recompute what is being loaded for them."""
        if outcome not in ("same", "adapter"):
            self._drop = True
        for req_id in gone:
            self._arriving.pop(req_id, None)
            if req_id in self._loading:
                self._void(req_id)
        self._tier.note_identity(outcome)
        self._tier.forget(gone)
        self._tier.announce(self._identity.base, self._known.adapters())

    def _undo_loaded(self) -> None:
        """Loaded KV may be of other weights, and the scheduler may be about to use it: void all loads."""
        for req_id, loading in list(self._loading.items()):
            if loading.over:
                self._void(req_id)

    def _void(self, req_id: str) -> None:
        """Make the request's load unusable. Once the load has ended, the scheduler finds the request in its state
        before the load."""
        loading = self._loading[req_id]
        loading.void = True
        if loading.over:
            del self._loading[req_id]
            self._sources.pop(req_id, None)
            loading.request.num_computed_tokens = 0
            self._kv_cache_manager.free(loading.request)

    def _undo_unloaded(self) -> None:
        """Void loads of requests with adapters: after an unload, an adapter may be another one when the request is
        computed."""
        for req_id, loading in list(self._loading.items()):
            adapter = loading.request.lora_request
            if adapter is not None and self._identity.known(adapter) is None:
                self._void(req_id)

    def _copying(self) -> bool:
        """Whether ranks copy to or from DRAM, or a scheduled step has begun a load."""
        scheduler = self.connector_scheduler
        return bool(
            scheduler._jobs or scheduler._current_batch_allocated_block_ids or scheduler._current_batch_jobs_to_flush
        )

    def _drop_cache(self) -> bool:
        """Clear the DRAM tier. Not while ranks or the mover copy to or from its rows, since they would fill them
        afterwards. Until then nothing is looked up and nothing is stored."""
        if self._copying() or not self._tier.drained():
            return False
        self.connector_scheduler.reset_cache()
        self._drop = False
        return True

    def reset_cache(self) -> bool | None:
        self._known.reset()
        self._drop = True
        self._drop_cache()
        return True

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        speed = self._clock.dram_bytes_per_second
        self._loads.allocated(request, blocks, num_external_tokens, speed, super().update_state_after_alloc)
        if request.request_id in self._handed_over:
            states = self.connector_scheduler._req_status[request.request_id].group_states
            for group, state in zip(self._groups, states, strict=True):
                state.next_stored_chunk_idx = request.num_prompt_tokens // group.tokens_per_chunk
        self._note_sources(request, num_external_tokens)
        self._known.runs(request)
        self._loading.pop(request.request_id, None)
        if num_external_tokens and not self._loads.in_step(request.request_id):
            self._loading[request.request_id] = _Loading(request)
        self._manager.let_go(request.request_id)

    def _note_sources(self, request: Request, load_tokens: int) -> None:
        """Note the sources of a prompt's cached tokens when it first runs. Later calls, after a load between steps or a
        preemption, change nothing."""
        if request.prefill_stats is None or request.num_preemptions or request.request_id in self._sources:
            return
        hbm = request.prefill_stats.num_local_cached_tokens
        store = self._tier.fetched_tokens(request.request_id, hbm, hbm + load_tokens)
        self._sources[request.request_id] = {"hbm": hbm, "dram": load_tokens - store, "store": store}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        for status in list(self._arriving.values()):
            if self._drop or not self._tier.has_room:
                break
            self._prefetch(status)
        meta = self._loads.scheduled(scheduler_output, super().build_connector_meta)
        if self._drop:
            self._drop_cache()
        self._known.step_ends(scheduler_output.num_scheduled_tokens)
        self._clock.begin(*prefilled(scheduler_output), time.monotonic(), bool(meta.in_step))
        if not scheduler_output.total_num_scheduled_tokens:
            self._tier.wait()
        return meta

    def start_load_kv(self, forward_context: ForwardContext, **options: object) -> None:
        """Runs in the rank's process, as the next methods do: before the step is computed, if the step begins with
        loads."""
        meta = self._connector_metadata
        if meta.computed:  # stock copies a step's stores after the next step has begun: this is the next one
            self.connector_worker.prepare_store_kv(meta)
            meta.store_jobs.clear()
        loads, meta.load_jobs = meta.load_jobs, {}
        super().start_load_kv(forward_context, **options)
        meta.load_jobs = loads
        with contextlib.nullcontext() if self._zeroes else beside_computing():
            self.connector_worker.start_kv_transfers(meta)
        if meta.in_step:
            compute_after_loads(self.connector_worker.worker, meta.in_step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        meta = self._connector_metadata
        if not meta.in_step:
            return super().get_finished(finished_req_ids)
        # The step waits for these loads in any case, so this adds no wait.
        self.connector_worker.worker.wait(set(meta.in_step))
        sent, received = super().get_finished(finished_req_ids)
        return sent, received - {meta.load_jobs[job_id].req_id for job_id in meta.in_step}

    def build_connector_worker_meta(self) -> LaunchedMetadata:
        """The rank's last call in a step, when all of the step but sampling is launched on the GPU."""
        meta = super().build_connector_worker_meta() or LaunchedMetadata()
        return LaunchedMetadata(meta.completed_jobs, meta.transfer_stats, time.monotonic())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._clock.note_worker(connector_output.kv_connector_worker_meta)
        for req_id in self._loading.keys() & (connector_output.finished_recving or ()):
            self._loading[req_id].over = True
            if self._loading[req_id].void or self._identity.stale:
                self._void(req_id)
        super().update_connector_output(connector_output)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called by the scheduler once at the end of every step."""
        if self.connector_scheduler is not None:
            now = time.monotonic()
            self._clock.end(now)
            if self._clock.due(now):
                self._tier.prefill, self._tier.prefill_share = self._clock.prefill, self._clock.prefill_share
                self._tier.tell_pace(self._clock.dram_bytes_per_second, len(self._arriving), self._resident())
        return super().get_kv_connector_stats()

    def _resident(self) -> tuple[int, int, int, int]:
        """Cached blocks in HBM and its capacity in blocks; cached chunks in DRAM and its capacity in chunks."""
        pool = self._block_pool
        if pool is None:
            return (0, 0, *self._manager.dram_chunks())
        # A block may be listed under several hashes.
        cached = min(len(pool.cached_block_hash_to_block), pool.num_gpu_blocks)
        return (cached, pool.num_gpu_blocks, *self._manager.dram_chunks())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, object] | None]:
        sources = self._leave(request)
        return super().request_finished(request, block_ids)[0], sources

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, object] | None]:
        sources = self._leave(request)
        return super().request_finished_all_groups(request, block_ids)[0], sources

    def _leave(self, request: Request) -> dict[str, object] | None:
        """The answer's kv_transfer_params: the sources of cached tokens and, for a decode worker, the identity that the
        KV was computed with."""
        self._arriving.pop(request.request_id, None)
        self._loading.pop(request.request_id, None)
        self._handed_over.discard(request.request_id)
        self._tier.cancel(request.request_id)
        sources = self._sources.pop(request.request_id, None)
        said: dict[str, object] = {FIELD: sources} if sources is not None else {}
        transfer = request.kv_transfer_params or {}
        if transfer.get("do_remote_decode") and (digest := self._known.computed_with(request)) is not None:
            said[_PREFILLED_WITH] = digest.hex()
        return said or None

    def _prefetch(self, status: RequestOffloadState) -> None:
        """Look up the chunks that are not in HBM. The manager then promotes those that the tier holds, up to the first
        miss."""
        req_id = status.req.request_id
        if self._tier.undecided(req_id):
            return
        for group, state in zip(self._groups, status.group_states, strict=True):
            if group.sliding_window_size_in_chunks is not None:
                continue  # only the window is needed, and its place depends on the hits
            for key in state.offload_keys[self._chunks_in_hbm(status.req, group) :]:
                if not self._tier.has_room:
                    return  # the rest follows when rows are free again
                if self._manager.lookup(key, status.req_context) is LookupResult.MISS:
                    break
        self._arriving.pop(req_id, None)

    def _chunks_in_hbm(self, request: Request, group: GroupOffloadConfig) -> int:
        """The number of leading whole chunks in the engine's prefix cache."""
        if self._block_pool is None or group.hashes_per_chunk * group.tokens_per_block != group.tokens_per_chunk:
            return 0  # hashed in units that are not this group's blocks
        blocks = 0
        for block_hash in request.block_hashes:
            if not self._block_pool.get_cached_block(block_hash, [group.group_idx]):
                break
            blocks += 1
        return blocks // group.hashes_per_chunk

    def _build_store_jobs(self, output: SchedulerOutput) -> dict[int, object]:
        """Prompts are stored as they are computed, answers in pieces and at their end. No request needs an answer's
        chunks before the answer ends. To look for them in every step, and to copy and put each alone, would take the
        engine's time.

        A step's new chunks are looked up when the next step is scheduled, while the step runs. A rank begins to copy
        them only then in any case, and the first token does not wait for the lookup."""
        statuses = self.connector_scheduler._req_status
        due = {
            req_id: tokens
            for req_id, tokens in output.num_scheduled_tokens.items()
            if (status := statuses.get(req_id)) and _piece_ends(status.req, tokens)
        }
        if self._loads.possible:
            last, self._computed = self._computed, list(due)
            due = {req_id: 0 for req_id in last if (one := statuses.get(req_id)) and not one.req.is_finished()}
        finished = [req_id for req_id in output.finished_req_ids if not self._loads.in_step(req_id)]
        due = {req_id: tokens for req_id, tokens in due.items() if self._may_store(req_id)}
        for req_id in finished:
            if (status := statuses.get(req_id)) is not None and not self._may_store(req_id):
                status.max_offload_tokens = 0
        for req_id in output.finished_req_ids:
            self._known.left(req_id)
        if not due and not finished:
            return {}
        only = SimpleNamespace(num_scheduled_tokens=due, finished_req_ids=finished)
        jobs: dict[int, object] = OffloadingConnectorScheduler._build_store_jobs(self.connector_scheduler, only)
        return jobs

    def _may_store(self, req_id: str) -> bool:
        return not self._drop and self._known.may_store(req_id)

    def _build_partial_tail_store_jobs(self, output: SchedulerOutput) -> dict[int, object]:
        """The stores of hybrid models' states, which vLLM builds separately."""
        state = output.kv_connector_block_state
        if state is not None and state.boundary_state_offloads:
            kept = {key: one for key, one in state.boundary_state_offloads.items() if self._may_store(key)}
            output = SimpleNamespace(kv_connector_block_state=SimpleNamespace(boundary_state_offloads=kept))
        jobs: dict[int, object] = OffloadingConnectorScheduler._build_partial_tail_store_jobs(
            self.connector_scheduler, output
        )
        return jobs

    def _note_load(self, request: Request, key: OffloadKey, end: int) -> None:
        """DRAM is about to announce a fetched chunk that ends at the token `end`, before any lookup has found it
        there."""
        group = self._groups[get_offload_group_idx(key)]
        self._events.record_lookup(request, group, end // group.tokens_per_chunk - 1, key)


def _identity(config: VllmConfig, kv_cache: KVCacheConfig) -> Identity:
    """Raises ValueError if this engine's chunks cannot be shared, or its model cannot be identified."""
    extra, parallel = config.kv_transfer_config.kv_connector_extra_config, config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ValueError(
            "kvtier: distributed-executor-backend 'external_launcher' given, expected one where one scheduler asks all "
            "ranks which weights they have (mp, ray); run this engine without kvtier"
        )
    ranks = [
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.prefill_context_parallel_size,
        parallel.decode_context_parallel_size,
    ]
    layout = engine_layout(config, kv_cache, extra)
    identity = Identity(config, layout, ranks, alike=tp_agnostic(config, kv_cache, extra))
    if problem := identity.establish():
        raise ValueError(problem)
    return identity


def _hand_over_plan(request: Request) -> None:
    """Put the router's plan into kv_transfer_params, the only part of a request that vLLM shows to tiers. An entry of
    that name from a client is removed. A router that is not this project's sends the plan as a hint, which clients
    cannot set."""
    transfer = {key: value for key, value in (request.kv_transfer_params or {}).items() if key != FIELD}
    extra_args = request.sampling_params.extra_args if request.sampling_params else None
    if extra_args and FIELD in extra_args:
        transfer[FIELD] = extra_args[FIELD]
    elif request.kv_hints is not None:
        for hint in request.kv_hints.actions:
            if hint.action_type == HINT_TYPE:
                transfer[FIELD] = hint.payload
    request.kv_transfer_params = transfer or None


def _piece_ends(request: Request, tokens: int) -> bool:
    """Whether the step that computes `tokens` tokens of the request ends a piece. In the prompt, each step does."""
    answered = request.num_computed_tokens - request.num_prompt_tokens
    return answered < 0 or answered // ANSWER_PIECE_TOKENS != (answered + tokens) // ANSWER_PIECE_TOKENS


# In vLLM's MultiConnector (together with NIXL), statistics look up their connector by name in vLLM's registry. Without
# an entry there, the first request ends the engine.
if "KvtierConnector" not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector("KvtierConnector", __name__, "KvtierConnector")
