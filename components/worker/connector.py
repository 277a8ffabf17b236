"""The connector that vLLM loads: its own OffloadingConnector, with fetches that start when a request arrives.

Stock offloading asks the tiers for a request's chunks when the scheduler has a slot for it. This one asks on arrival,
so that a fetch runs while the request queues. And where stock copies a request's chunks from DRAM to HBM between steps,
and hears of it two steps later, this one copies them at the head of the step that computes the rest of the prompt, as
long as that does not hold up who decodes (loads.py).
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

# With what a prefill worker hands over, in vLLM's kv_transfer_params: the digest of what it computes KV with, in
# hexadecimal. Absent where it does not know, or has KV of something else in its own cache.
_PREFILLED_WITH = f"{FIELD}.prefilled_with"
# Of an answer, what is stored at once while it grows. A worker that dies loses as much of it.
ANSWER_PIECE_TOKENS = 128


@dataclass
class _Loading:
    """A request with a load between steps that it was not computed after yet."""

    request: Request
    over: bool = False
    void: bool = False  # what comes is not valid any more


class KvtierConnector(OffloadingConnector):
    """One in the scheduler's process, one in each rank's. The methods here run on the scheduler's thread and must not
    block, but for as long as the GPU is busy without them (step_clock.py); the tier's I/O is in a process of its own
    (mover/)."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        extra["self_describing_kv_events"] = True
        choose_block_hash(vllm_config)
        extra["canonical_layout"] = needs_canonical(vllm_config, kv_cache_config, extra)
        identity = _identity(vllm_config, kv_cache_config) if role == KVConnectorRole.SCHEDULER else None
        super().__init__(vllm_config, role, kv_cache_config)
        # Stock loads begin after the step that runs, which may still zero their blocks; it does not write to them
        # otherwise, since the scheduler does not give a block away that a step under way writes to.
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
        self._drop = False  # whether what is in DRAM is not valid any more
        self._sources: dict[str, dict[str, int]] = {}  # of requests that run: cached tokens of the prompt by tier
        # Requests whose prompt another connector brings from a prefill worker, which has stored it.
        self._handed_over: set[str] = set()
        # Requests whose fetch has not all begun: without a plan, the store has yet to say what it holds; and there may
        # be no row free. In order of arrival, which is that of scheduling.
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
        """Block outermost: a block is copied at once, instead of in a piece for each layer. Layers of other shapes that
        share their memory (hybrid models) exclude heads before layers."""
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        if current_platform.is_cpu():
            return None  # its kernels know but one, and that for MLA does not say so
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
        """See what the tier has of the request, once it is known what its KV is computed with."""
        status = self.connector_scheduler._req_status[request.request_id]
        identity = self._known.identity(request.request_id)
        if identity is None or self._drop:
            return
        if not self._tier.identify(request.request_id, identity) or request.skip_reading_prefix_cache:
            return
        if request.request_id in self._handed_over:
            return  # it is to be stored, and nothing of it to be loaded
        keys = [key for state in status.group_states for key in state.offload_keys]
        self._tier.ask(request.request_id, sorted(keys, key=status.req_context.get_offload_key_position))
        self._manager.expect(request.request_id)
        self._arriving[request.request_id] = status
        with manager_lock(self._manager):
            self._prefetch(status)

    def _engine_cache(self) -> object:
        """The engine's own prefix cache: another object after it was thrown away."""
        return self._block_pool.cached_block_hash_to_block if self._block_pool is not None else None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._known.look(request, self._engine_cache())
        if self._drop and not self._drop_cache() and self._copying():
            return None, False  # for a step or two
        self._begin(request)
        self._arriving.pop(request.request_id, None)  # from here on the scheduler asks by itself
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
        request.skip_reading_prefix_cache = skip or self._drop  # nothing is found in DRAM that is to be dropped
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
        """The ranks have said what they compute KV with. That of these requests is not what would be computed now: let
        nobody use it, and let what is being loaded for them be computed."""
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
        """What was loaded may be of other weights, and the scheduler may be about to compute after it."""
        for req_id, loading in list(self._loading.items()):
            if loading.over:
                self._void(req_id)

    def _void(self, req_id: str) -> None:
        """Nothing of the request's load is to be used. Once it is over, the scheduler finds the request as it was
        before it."""
        loading = self._loading[req_id]
        loading.void = True
        if loading.over:
            del self._loading[req_id]
            self._sources.pop(req_id, None)
            loading.request.num_computed_tokens = 0
            self._kv_cache_manager.free(loading.request)

    def _undo_unloaded(self) -> None:
        """An adapter may be another one when a request with it is computed after its load."""
        for req_id, loading in list(self._loading.items()):
            adapter = loading.request.lora_request
            if adapter is not None and self._identity.known(adapter) is None:
                self._void(req_id)

    def _copying(self) -> bool:
        """Whether ranks copy to or from DRAM, or a step is scheduled that has begun to load."""
        scheduler = self.connector_scheduler
        return bool(
            scheduler._jobs or scheduler._current_batch_allocated_block_ids or scheduler._current_batch_jobs_to_flush
        )

    def _drop_cache(self) -> bool:
        """Forget what is in DRAM. Not while its rows are copied to or from, by ranks or by the mover, which would fill
        them meanwhile. Until then nothing is looked up and nothing is stored."""
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
        """Of a prompt that runs for the first time: again after a load between steps, and no more once preempted."""
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
        """In the rank's process, as the next methods: before the step is computed if it has loads at its head."""
        meta = self._connector_metadata
        if meta.computed:  # stock copies what a step stores after the next one has begun: this is that one
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
        # They end before the step is computed, so that this waits for nothing that the step would not.
        self.connector_worker.worker.wait(set(meta.in_step))
        sent, received = super().get_finished(finished_req_ids)
        return sent, received - {meta.load_jobs[job_id].req_id for job_id in meta.in_step}

    def build_connector_worker_meta(self) -> LaunchedMetadata:
        """The last call of the rank's in a step, when the GPU has been told all but to sample."""
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
        """The scheduler asks once at the end of every step, whatever ran in it."""
        if self.connector_scheduler is not None:
            now = time.monotonic()
            self._clock.end(now)
            if self._clock.due(now):
                self._tier.prefill, self._tier.prefill_share = self._clock.prefill, self._clock.prefill_share
                self._tier.tell_pace(self._clock.dram_bytes_per_second, len(self._arriving), self._resident())
        return super().get_kv_connector_stats()

    def _resident(self) -> tuple[int, int, int, int]:
        """Blocks in HBM and chunks in DRAM that can be hit, each with the room for them."""
        pool = self._block_pool
        if pool is None:
            return (0, 0, *self._manager.dram_chunks())
        # A block may be known by several hashes.
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
        """What the answer says beside its text, in vLLM's kv_transfer_params: where cached tokens came from, and for a
        decode worker what they were computed with."""
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
        """Look up what is not in HBM, which makes the manager promote what the tier holds, up to the first miss."""
        req_id = status.req.request_id
        if self._tier.undecided(req_id):
            return
        for group, state in zip(self._groups, status.group_states, strict=True):
            if group.sliding_window_size_in_chunks is not None:
                continue  # only the window is needed, and where that is depends on what is hit
            for key in state.offload_keys[self._chunks_in_hbm(status.req, group) :]:
                if not self._tier.has_room:
                    return  # the rest when rows are free again
                if self._manager.lookup(key, status.req_context) is LookupResult.MISS:
                    break
        self._arriving.pop(req_id, None)

    def _chunks_in_hbm(self, request: Request, group: GroupOffloadConfig) -> int:
        """Leading whole chunks that the engine's own prefix cache holds."""
        if self._block_pool is None or group.hashes_per_chunk * group.tokens_per_block != group.tokens_per_chunk:
            return 0  # hashed in other units than this group's blocks
        blocks = 0
        for block_hash in request.block_hashes:
            if not self._block_pool.get_cached_block(block_hash, [group.group_idx]):
                break
            blocks += 1
        return blocks // group.hashes_per_chunk

    def _build_store_jobs(self, output: SchedulerOutput) -> dict[int, object]:
        """The stores of prompts as they are computed, and of answers by the piece and at their end. Nobody needs an
        answer's chunks before it ends, and to look for them in each step of each request, to copy each by itself and to
        put it by itself takes the engine's time.

        What a step computes is looked for when the next one is scheduled, while this one runs: a rank begins to copy
        it then in any case, and a first token does not wait for the looking."""
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
        """The stores of hybrid models' states, which vLLM makes apart from the others."""
        state = output.kv_connector_block_state
        if state is not None and state.boundary_state_offloads:
            kept = {key: one for key, one in state.boundary_state_offloads.items() if self._may_store(key)}
            output = SimpleNamespace(kv_connector_block_state=SimpleNamespace(boundary_state_offloads=kept))
        jobs: dict[int, object] = OffloadingConnectorScheduler._build_partial_tail_store_jobs(
            self.connector_scheduler, output
        )
        return jobs

    def _note_load(self, request: Request, key: OffloadKey, end: int) -> None:
        """DRAM is about to announce a fetched chunk that ends at this token, and nobody has looked it up there yet."""
        group = self._groups[get_offload_group_idx(key)]
        self._events.record_lookup(request, group, end // group.tokens_per_chunk - 1, key)


def _identity(config: VllmConfig, kv_cache: KVCacheConfig) -> Identity:
    """Raises ValueError if this engine's chunks cannot be shared, or its model cannot be told from another."""
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
    """Put the router's plan where the tier sees it: of a request, vLLM shows kv_transfer_params alone to tiers. What a
    client wrote there under the plan's name is none. The plan of a router that is not this project's comes as a hint,
    which clients cannot set."""
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
    """Whether the step that computes so many tokens of the request ends a piece of it: each does in the prompt."""
    answered = request.num_computed_tokens - request.num_prompt_tokens
    return answered < 0 or answered // ANSWER_PIECE_TOKENS != (answered + tokens) // ANSWER_PIECE_TOKENS


# Beside NIXL, in vLLM's MultiConnector, statistics find their connector by its name in vLLM's register; without an
# entry there the first request ends the engine.
if "KvtierConnector" not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector("KvtierConnector", __name__, "KvtierConnector")
