"""Who shares KV with whom, on real engines: pairs that differ in one thing, and a soak in which weights and adapters
change.

Engines come up one after the other in a process of their own, over one target; each is asked for a prompt whose KV the
first one has stored.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphs.tiny_model import make_tiny_adapter, make_tiny_model

pytestmark = pytest.mark.engine

PROMPT_TOKENS, WHOLE = 600, 512


def edited(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    """A change of one tensor in a copy of the model."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        edit(weights[name])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def negate(tensor: Any) -> None:
    tensor.neg_()


def nudge(tensor: Any) -> None:
    tensor.view(-1)[-1] *= 1.01


def rotated(tensor: Any) -> None:
    tensor.copy_(tensor.roll(1, 0))


def unchanged(folder: Path) -> None:
    pass


def rope(**parameters: object) -> dict[str, object]:
    return {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **parameters}}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
# What is another in the second engine, and whether it may use what the first one has stored.
PAIRS: dict[str, tuple[Callable[[Path], None], dict[str, Any], bool]] = {
    "nothing": (unchanged, {}, True),
    "seed of the engine": (unchanged, {"seed": 5}, True),
    "longest prompt": (unchanged, {"max_model_len": 1024}, True),
    "adapters are possible": (unchanged, {"enable_lora": True, "max_lora_rank": 8}, True),
    "steps of other sizes": (unchanged, {"max_num_batched_tokens": 256, "max_num_seqs": 4}, True),
    "one layer's keys": (edited("model.layers.1.self_attn.k_proj.weight", negate), {}, False),
    "two heads' order": (edited("model.layers.0.self_attn.v_proj.weight", rotated), {}, False),
    "one weight of a norm": (edited("model.layers.0.input_layernorm.weight", nudge), {}, False),
    "one weight of an embedding": (edited("model.embed_tokens.weight", nudge), {}, False),
    "data type": (unchanged, {"dtype": "bfloat16"}, False),
    "base of the positions": (unchanged, rope(rope_theta=20000.0), False),
    "scaled positions": (unchanged, rope(**YARN), False),
    "epsilon of norms": (unchanged, {"hf_overrides": {"rms_norm_eps": 1e-3}}, False),
    "block size": (unchanged, {"block_size": 64}, False),
    "random weights": (unchanged, {"load_format": "dummy"}, False),
}


def test_engines_that_differ_in_one_thing_share_only_what_is_the_same(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=2)
    engines: list[dict[str, Any]] = [{"name": "first", "folder": str(model), "options": {}}]
    for number, (name, (change, options, _)) in enumerate(PAIRS.items()):
        copy = tmp_path / f"copy-{number}"  # another path, in any case
        shutil.copytree(model, copy)
        change(copy)
        engines.append({"name": name, "folder": str(copy), "options": options})
    found = asked_in_turn(tmp_path, engines)
    assert found.pop("first") == 0
    assert found == {name: WHOLE if shares else 0 for name, (_, _, shares) in PAIRS.items()}


def test_an_adapter_is_known_by_what_was_loaded(tmp_path: Path) -> None:
    """Of the same name and at the same path, in engines that were started one after the other."""
    model = make_tiny_model(tmp_path / "model", layers=2)
    folders = {"one": tmp_path / "a", "two": tmp_path / "b"}
    for seed, folder in enumerate(folders.values()):
        make_tiny_adapter(folder, model, seed=seed)
    named = tmp_path / "first"
    options = {"enable_lora": True, "max_lora_rank": 8}
    turns = [("cold", "one"), ("again", "one"), ("another", "two"), ("the first one again", "one"), ("none", None)]
    engines = [
        {
            "name": name,
            "folder": str(model),
            "options": options,
            "adapter": [str(folders[which]), str(named)] if which else None,
        }
        for name, which in turns
    ]
    found = asked_in_turn(tmp_path, engines)
    assert found == {"cold": 0, "again": WHOLE, "another": 0, "the first one again": WHOLE, "none": 0}


def test_answers_stay_right_while_weights_and_adapters_change(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chat.changes", "--requests", "60", "--change-share", "0.25"]
    report = tmp_path / "report.json"
    ended = subprocess.run(
        [*command, "--dir", str(tmp_path), "--json", str(report)], capture_output=True, text=True, timeout=900
    )
    print(ended.stdout, ended.stderr[-2000:])
    found = json.loads(report.read_text())
    assert ended.returncode == 0
    assert (found["requests"], found["differing"], found["faults"]) == (60, 0, [])
    assert found["cached_requests"] > 20
    assert found["fetched_chunks"] > 0
    assert len(found["changes"]) > 3


def asked_in_turn(folder: Path, engines: list[dict[str, Any]]) -> dict[str, int]:
    """How many of the prompt's tokens each engine found in the store."""
    orders, answers = folder / "orders.json", folder / "answers.json"
    orders.write_text(json.dumps(engines))
    command = [sys.executable, "-m", "tests.engine.test_identity", str(folder), str(orders), str(answers)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, int] = json.loads(answers.read_text())
    print(found)
    return found


def main(folder: Path, orders: Path, answers: Path) -> None:
    import os
    import time

    from benchmarks.chat import changes
    from benchmarks.chat.__main__ import Options, target_running, transfer_config
    from graphs.services import free_port
    from kvstore.errors import validated

    os.environ.update(changes.ENVIRONMENT)
    address = f"127.0.0.1:{free_port()}"
    values = {"model": "any", "dir": folder, "dram": 64 << 20, "capacity": 1 << 30}
    chat = validated(Options, values)
    store = folder / "store"
    store.mkdir()
    found = {}
    with target_running(chat, "store", store, address, folder / "target.log"):
        for order in json.loads(orders.read_text()):
            transfer: Any = transfer_config(chat, "store", address, folder)
            tier = transfer["kv_connector_extra_config"]["secondary_tiers"][0]
            tier |= {"deadline_ms": 60_000, "lookup_ms": 60_000}
            adapter = None
            if order.get("adapter"):
                source, adapter_folder = order["adapter"]
                shutil.copytree(source, adapter_folder, dirs_exist_ok=True)
                adapter = "first"
            engine = changes.Engine(Path(order["folder"]), transfer, **order["options"])
            engine.adapters = folder
            prompt = [(number * number) % 200 + 5 for number in range(PROMPT_TOKENS)]
            _, found[order["name"]] = engine.ask(prompt, adapter)
            until = time.monotonic() + 30
            while engine.stored() < WHOLE // changes.BLOCK_TOKENS and time.monotonic() < until:
                time.sleep(0.1)
            engine.stop()
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
