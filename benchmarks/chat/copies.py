"""The cost of copies between HBM and DRAM for two KV layouts in HBM. On a GPU; no model.

    python -m benchmarks.chat.copies [--layers 80] [--kv-heads 8] [--head-bytes 128] [--blocks 137] [--json FILE]

vLLM's offloading worker copies the blocks of one prompt to DRAM and back. Once with the layers of a block apart (LBHNC,
vLLM's default), and once together (BHLNC, which the connector requests). The default is Llama-3.1-70B with FP8 KV on
one GPU: 2,192 tokens of 160 KiB. Figures are medians over `--repeats`. The thread time is that of the thread that runs
the model.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from pydantic import BaseModel, ConfigDict, Field

from components.worker.compat import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    CPULoadStoreSpec,
    CPUOffloadingWorker,
    GPULoadStoreSpec,
    SharedOffloadRegion,
)
from kvstore.errors import FailedError, run_command, validated

Positive = Annotated[int, Field(ge=1)]
_ALIGNMENT = 4096


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid")

    layers: Positive = 80
    kv_heads: Positive = 8
    head_bytes: Positive = 128
    block_tokens: Positive = 16
    blocks: Positive = 137
    repeats: Positive = 15
    json_file: Path | None = None


class Row(msgspec.Struct):
    layout: str
    direction: str
    copies_per_block: int
    gigabytes_per_second: float
    thread_ms: float  # of the caller, to submit


def worker_of(options: Options, *, together: bool) -> CPUOffloadingWorker:
    page = 2 * options.kv_heads * options.head_bytes * options.block_tokens
    block, count = page * options.layers, 2 * options.blocks
    memory = torch.zeros(count * block, dtype=torch.int8, device="cuda")
    sizes = [block] if together else [page] * options.layers
    tensors, start = [], 0
    for size in sizes:
        tensors.append(CanonicalKVCacheTensor(memory[start : start + count * size].view(count, size), size))
        start += count * size
    refs = [CanonicalKVCacheRef(number, size) for number, size in enumerate(sizes)]
    row_bytes = -(-block // _ALIGNMENT) * _ALIGNMENT
    region = SharedOffloadRegion(
        engine_id=f"kvtier-copies-{os.getpid()}",
        num_chunks=options.blocks,
        rank=0,
        kv_bytes_per_chunk=row_bytes,
        cpu_page_size=block,
    )
    return CPUOffloadingWorker(CanonicalKVCaches(tensors, [refs]), 1, options.blocks, region)


def measure(options: Options, *, together: bool) -> list[Row]:
    worker = worker_of(options, together=together)
    layout, copies = ("BHLNC", 1) if together else ("LBHNC", options.layers)
    blocks = torch.randperm(2 * options.blocks)[: options.blocks].tolist()
    rows = list(range(options.blocks))
    found = []
    for direction, submit in (("HBM to DRAM", worker.submit_store), ("DRAM to HBM", worker.submit_load)):
        thread, speed = [], []
        for number in range(options.repeats + 3):  # the first ones warm up
            hbm = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[0])
            specs = (hbm, CPULoadStoreSpec(rows)) if direction == "HBM to DRAM" else (CPULoadStoreSpec(rows), hbm)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            submit(number, *specs)
            thread.append(time.perf_counter() - begun)
            worker.wait({number})
            torch.cuda.synchronize()
            (result,) = worker.get_finished()
            speed.append(result.transfer_size / result.transfer_time / 1e9)
        found.append(
            Row(
                layout,
                direction,
                copies,
                round(statistics.median(speed[3:]), 1),
                round(1e3 * statistics.median(thread[3:]), 2),
            )
        )
    worker.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.copies", description=__doc__.split("\n")[0])
    for name, word in (
        ("layers", "default 80"),
        ("kv-heads", "of a rank; default 8"),
        ("head-bytes", "of K or V of a token; default 128"),
        ("block-tokens", "default 16"),
        ("blocks", "of the prompt; default 137"),
        ("repeats", "default 15"),
    ):
        parser.add_argument(f"--{name}", help=word)
    parser.add_argument("--json", dest="json_file", help="where to write the result")
    options = validated(Options, vars(parser.parse_args()))
    if not torch.cuda.is_available():
        raise FailedError("there is no GPU here")
    found = [row for together in (False, True) for row in measure(options, together=together)]
    print(f"{'layout':<8}{'direction':<13}{'copies a block':>15}{'GB/s':>8}{'thread ms':>11}")
    for row in found:
        print(
            f"{row.layout:<8}{row.direction:<13}{row.copies_per_block:>15}{row.gigabytes_per_second:>8}{row.thread_ms:>11}"
        )
    if options.json_file:
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.chat.copies", main)
