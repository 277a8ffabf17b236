"""The names taken from vLLM: those of the installed release for real, and those of any other by its source, in the
folder that KVTIER_VLLM_SOURCE names (the one that holds `vllm`)."""

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils

from components.worker import compat
from components.worker.manager import HoldingTieringManager
from tests.worker.stock import Tier, primary

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "components" / "worker"
INSTALLED = Path(vllm.__file__).parents[1]

_OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading"
_LAYERS = "vllm.model_executor.layers"
# What this package uses of vLLM's classes beside what they promise: by module, class and member.
PRIVATE = {
    ("vllm.v1.kv_offload.tiering.manager", "TieringOffloadingManager"): (
        *compat._MANAGER_STATE,
        "_process_finished_jobs",
        "create_store_job",
        "primary_tier",
        "secondary_tiers",
    ),
    ("vllm.v1.kv_offload.tiering.manager", "CPUPrimaryTierOffloadingManager"): (
        "complete_read",
        "prepare_read",
        "get_kv_memoryview",
    ),
    ("vllm.v1.kv_offload.cpu.manager", "CPUOffloadingManager"): ("_num_chunks",),
    ("vllm.v1.kv_offload.tiering.manager", "PendingPromotion"): ("req_context", "keys", "chunk_ids"),
    ("vllm.v1.kv_offload.tiering.base", "TransferJob"): ("job_id", "keys", "chunk_ids", "req_context"),
    ("vllm.v1.kv_offload.tiering.base", "JobResult"): ("job_id", "success", "successful_keys"),
    ("vllm.v1.kv_offload.tiering.spec", "TieringOffloadingSpec"): ("_scheduler_mmap", "_engine_id"),
    ("vllm.v1.kv_offload.base", "ReqContext"): ("kv_transfer_params", "get_offload_key_position"),
    ("vllm.v1.kv_offload.cpu.shared_offload_region", "SharedOffloadRegion"): (
        "create_next_worker_view",
        "create_next_canonical_view",
        "cleanup",
        "fd",
    ),
    (f"{_OFFLOADING}.scheduler", "OffloadingConnectorScheduler"): (
        "_build_store_jobs",
        "_chunks_being_loaded",
        "_current_batch_allocated_block_ids",
        "_current_batch_jobs_to_flush",
        "_current_batch_load_jobs",
        "_events_tracker",
        "_jobs",
        "_req_status",
        "config",
        "manager",
        "reset_cache",
    ),
    (f"{_OFFLOADING}.scheduler", "RequestOffloadState"): (
        "group_states",
        "max_offload_tokens",
        "num_locally_computed_tokens",
        "req",
        "req_context",
        "transfer_jobs",
        "update_offload_keys",
    ),
    (f"{_OFFLOADING}.scheduler", "TransferJobStatus"): ("is_store", "keys", "req_id"),
    (f"{_OFFLOADING}.events", "OffloadingEventsTracker"): ("_build_event_metadata", "record_lookup"),
    (f"{_OFFLOADING}.common", "OffloadingWorkerMetadata"): ("aggregate", "completed_jobs", "transfer_stats"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1"): ("_kv_cache_manager",),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager"): ("free",),
    ("vllm.v1.outputs", "KVConnectorOutput"): ("finished_recving",),
    ("vllm.v1.request", "Request"): ("num_computed_tokens",),
    # What is known of weights and adapters (identity.py, weights.py).
    ("vllm.v1.core.block_pool", "BlockPool"): ("cached_block_hash_to_block",),
    ("vllm.v1.executor.abstract", "Executor"): ("collective_rpc", "vllm_config"),
    ("vllm.v1.worker.gpu_worker", "Worker"): ("get_model", "model_runner", "add_lora"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): ("drafter",),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): ("speculator",),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin"): ("lora_manager",),
    ("vllm.lora.worker_manager", "WorkerLoRAManager"): ("_adapter_manager", "list_adapters"),
    ("vllm.lora.model_manager", "LoRAModelManager"): ("get_adapter",),
    ("vllm.lora.lora_model", "LoRAModel"): ("loras", "modules_to_save"),
    ("vllm.lora.request", "LoRARequest"): ("lora_int_id", "lora_name", "lora_path", "load_inplace"),
    ("vllm.multimodal.inputs", "MultiModalFeatureSpec"): ("identifier", "mm_hash"),
    (f"{_LAYERS}.linear", "ColumnParallelLinear"): (
        "output_partition_sizes",
        "output_size_per_partition",
        "tp_rank",
        "tp_size",
    ),
    (f"{_LAYERS}.linear", "RowParallelLinear"): ("input_size_per_partition", "tp_rank", "tp_size"),
    (f"{_LAYERS}.linear", "LinearBase"): ("input_size", "output_size"),
    (f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding"): (
        "embedding_dim",
        "num_embeddings_per_partition",
        "org_vocab_size",
        "shard_indices",
    ),
    (f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices"): (
        "org_vocab_start_index",
        "org_vocab_end_index",
    ),
    (f"{_LAYERS}.fused_moe.routed_experts", "RoutedExperts"): ("hidden_size", "local_num_experts", "moe_config"),
    (f"{_LAYERS}.fused_moe.config", "FusedMoEParallelConfig"): ("ep_size", "tp_rank", "tp_size"),
    (f"{_LAYERS}.attention.mla_attention", "MLAAttention"): ("num_heads",),
    (f"{_LAYERS}.rotary_embedding.base", "RotaryEmbeddingBase"): ("max_position_embeddings",),
    ("vllm.distributed.parallel_state", "GroupCoordinator"): ("rank_in_group", "world_size"),
}


@pytest.fixture(params=["installed", "named"])
def source(request: pytest.FixtureRequest) -> Path:
    """A folder with vLLM's source in it."""
    if request.param == "installed":
        return INSTALLED
    if not os.environ.get("KVTIER_VLLM_SOURCE"):
        pytest.skip("KVTIER_VLLM_SOURCE names no source of vLLM")
    return Path(os.environ["KVTIER_VLLM_SOURCE"])


def parsed(source: Path, module: str) -> ast.Module | None:
    path = source.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """With those of branches, of which it is not known here which is taken."""
    for one in body:
        yield one
        if isinstance(one, ast.If | ast.Try | ast.With):
            yield from statements(one.body)
        if isinstance(one, ast.If | ast.Try):
            yield from statements(one.orelse)
        if isinstance(one, ast.Try):
            yield from statements([step for handler in one.handlers for step in handler.body])


def defined(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for one in statements(body):
        match one:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name for alias in aliases)
            case ast.Assign(targets=targets):
                names.update(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def members(tree: ast.Module, name: str) -> set[str]:
    """Of a class: its methods, its fields, and what its methods set on `self`."""
    found = next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name), None)
    if found is None:
        return set()
    names = defined(found.body)
    for node in ast.walk(found):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names.add(node.attr)
    return names


def imports() -> list[tuple[str, str]]:
    """What compat.py takes from which module of vLLM."""
    tree = ast.parse((PACKAGE / "compat.py").read_text())
    return [
        (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm"
        for alias in node.names
    ]


def test_every_name_is_there_in_the_installed_release() -> None:
    names = [name for _, name in imports()]
    assert all(getattr(compat, name) is not None for name in names)
    assert len(set(names)) == len(names)


def test_every_name_that_is_taken_is_used() -> None:
    """By whoever takes it from there, or there itself."""
    used = {node.id for node in ast.walk(ast.parse((PACKAGE / "compat.py").read_text())) if isinstance(node, ast.Name)}
    files = [path for wing in ("components", "benchmarks", "tests") for path in (ROOT / wing).rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "components.worker.compat":
                used.update(alias.name for alias in node.names)
    assert [name for _, name in imports() if name not in used] == []


def test_another_process_imports_every_module_of_the_worker_and_has_the_same_block_hashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process that has imported nothing else before. Workers share blocks without PYTHONHASHSEED."""
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
    assert {"compat", "connector", "remote_tier"} <= set(names)
    program = f"""
from components.worker import {", ".join(names)}
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils
kv_cache_utils.init_none_hash(sha256_cbor)
print(compat.VLLM_VERSION, kv_cache_utils.NONE_HASH.hex())
"""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", None, raising=False)
    kv_cache_utils.init_none_hash(sha256_cbor)
    assert ended.stdout.split()[-2:] == [vllm.__version__, kv_cache_utils.NONE_HASH.hex()]


def test_names_of_vllm_are_taken_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "compat.py":
            for node in ast.walk(ast.parse(path.read_text())):
                taken = [node.module] if isinstance(node, ast.ImportFrom) else []
                taken += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(str(name).partition(".")[0] == "vllm" for name in taken), path


def test_every_name_is_there_in_the_source(source: Path) -> None:
    taken = imports()
    assert len(taken) > 50
    trees = {module: parsed(source, module) for module, _ in taken}
    missing = [
        f"{module}.{name}"
        for module, name in taken
        if (tree := trees[module]) is None or name not in defined(tree.body)
        if parsed(source, f"{module}.{name}") is None
    ]
    assert missing == []


def test_what_is_used_beside_that_is_there_in_the_source(source: Path) -> None:
    missing = []
    for (module, name), wanted in PRIVATE.items():
        tree = parsed(source, module)
        assert tree is not None, module
        missing += [f"{module}.{name}.{member}" for member in wanted if member not in members(tree, name)]
    assert missing == []


def test_a_name_that_is_not_there_is_found_out(tmp_path: Path) -> None:
    """By what the tests above go by."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "module.py").write_text(
        "import other as known\n"
        "try:\n    from elsewhere import tried\nexcept ImportError:\n    tried = None\n"
        "class Kept:\n    size: int\n    def method(self): self.state = local = 1\n"
    )
    tree = parsed(tmp_path, "vllm.module")
    assert tree is not None
    assert defined(tree.body) == {"known", "tried", "Kept"}
    assert members(tree, "Kept") == {"size", "method", "state"}
    assert members(tree, "Gone") == set()
    assert parsed(tmp_path, "vllm.absent") is None


def test_a_manager_that_is_built_otherwise_is_refused_in_words() -> None:
    compat.check_manager(HoldingTieringManager(primary(), [Tier()]))
    known = dict.fromkeys(compat._MANAGER_STATE)
    compat.check_manager(SimpleNamespace(**known))
    del known["_jobs"], known["_complete_promotion"]
    other: Any = SimpleNamespace(_transfer_jobs={}, **known)
    with pytest.raises(RuntimeError) as refused:
        compat.check_manager(other)
    assert str(refused.value) == (
        f"kvtier: vLLM {vllm.__version__} given, expected 0.31 to 0.33: its tiering manager has no _jobs, "
        "_complete_promotion"
    )


def test_a_manager_that_has_a_lock_is_called_under_it() -> None:
    """Before 0.33 it has none, and needs none."""
    without: Any = SimpleNamespace()
    with compat.manager_lock(without):
        pass
    manager: Any = SimpleNamespace(lock=threading.Lock())
    with compat.manager_lock(manager):
        assert manager.lock.locked()
    assert not manager.lock.locked()
