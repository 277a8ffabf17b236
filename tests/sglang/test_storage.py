"""The backend inside SGLang's own HiCache controller and host pools, against a real target."""

import argparse
import json
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed")

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.server_args import ServerArgs

from components.sglang.storage import KvtierStorage
from kvstore.net import wire
from kvstore.net.carrier import MEMORY
from kvstore.net.client import Item
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome
from kvstore.seal import TRAILER_BYTES, read_keys
from tests.conftest import MIB, FullDisk, RunningTarget, soon
from tests.kvstore.test_client import Impostor, value
from tests.kvstore.test_target_process import ROOT
from tests.sglang.hicache import Cache, refusal, same

Make = Callable[..., Cache]
Start = Callable[..., RunningTarget]


@pytest.mark.parametrize("interface", [1, 0], ids=["zero-copy", "copied"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("kind", ["MHA", "MLA"])
def test_another_engine_finds_the_pages_bit_by_bit(
    cache: Make, start_target: Start, kind: str, layout: str, interface: int
) -> None:
    store = start_target().address
    writer = cache(store, kind=kind, layout=layout, interface_v1=interface)
    key, content = writer.key(20), writer.content(20)
    assert writer.write(key, content) == 20 * writer.page_tokens
    reader = cache(store, kind=kind, layout=layout, interface_v1=interface)
    assert same(reader.read(key), content)
    assert same(reader.read(reader.key(20, seed=2)), [])


def test_pages_come_out_of_the_memory_of_a_target_on_this_host(cache: Make, start_target: Start) -> None:
    target = start_target(unix=True, carrier=MEMORY, buffer_bytes=64 * MIB)
    made = cache(target.address, carrier=MEMORY)
    content = made.content(4)
    made.write(made.key(4), content)
    lent = target.lent()
    assert same(made.read(made.key(4)), content)
    assert len(lent) == 2 * 4


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_keys_and_values_of_different_widths(cache: Make, start_target: Start, layout: str) -> None:
    """SGLang cannot copy such pages."""
    store, kind = start_target().address, "MHA with other values"
    writer, reader = (cache(store, kind=kind, layout=layout) for _ in range(2))
    for seed, buffer in enumerate((writer.pool.k_buffer, writer.pool.v_buffer)):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
    indices = torch.arange(writer.pool.size)
    keys = [str(number) for number in range(writer.pool.page_num)]
    assert all(writer.backend.batch_set_v1(keys, indices))
    assert all(reader.backend.batch_get_v1(keys, indices))
    assert torch.equal(reader.pool.k_buffer, writer.pool.k_buffer)
    assert torch.equal(reader.pool.v_buffer, writer.pool.v_buffer)
    assert "with interface_v1 set" in refusal(store, kind=kind, layout=layout, interface_v1=0)


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float16},
        {"page_tokens": 8},
        {"layout": "page_first_direct"},
        {"kind": "MLA"},
        {"interface_v1": 0},
        {"namespace": "another"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_lies_otherwise_in_memory_is_not_found(cache: Make, start_target: Start, other: dict[str, Any]) -> None:
    store = start_target().address
    writer = cache(store)
    writer.write(writer.key(4), writer.content(4))
    reader = cache(store, **other)
    assert reader.read(reader.key(4)) == []


@pytest.mark.parametrize("other", [{"cache_salt": "b"}, {"extra_key": "a"}, {}], ids=str)
def test_a_salted_page_is_found_with_its_salt_alone(cache: Make, start_target: Start, other: dict[str, str]) -> None:
    made = cache(start_target().address)
    content = made.content(4)
    made.write(made.key(4, cache_salt="a"), content)
    assert made.read(made.key(4, **other)) == []
    assert same(made.read(made.key(4, cache_salt="a")), content)


def test_what_a_model_with_one_other_weight_wrote_is_not_found(cache: Make, start_target: Start, runner: Any) -> None:
    store = start_target().address
    writer = cache(store)
    writer.write(writer.key(4), writer.content(4))
    weight = runner.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        before = weight[3, 5].clone()
        weight[3, 5] += 1
        reader = cache(store)
        weight[3, 5] = before
    assert reader.read(reader.key(4)) == []
    assert len(cache(store).read(reader.key(4))) == 4


class Rank:
    """The backend of one rank of several, called as a controller does."""

    def __init__(self, like: Cache, rank: int, mla: bool):
        config = HiCacheStorageConfig(
            tp_rank=rank,
            tp_size=2,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=mla,
            enable_storage_metrics=True,
            is_page_first_layout=True,
            model_name=None,
            extra_config=dict(like.settings),
        )
        self.backend = KvtierStorage(config)
        self.backend.register_mem_pool_host(like.pool)


@pytest.mark.parametrize("kind", ["MHA", "MLA"])
def test_ranks_share_the_pages_of_mla_alone(cache: Make, start_target: Start, kind: str) -> None:
    made = cache(start_target().address, kind=kind)
    one, two = (Rank(made, rank, kind == "MLA").backend for rank in range(2))
    pages = torch.arange(2 * made.page_tokens)
    assert one.batch_set_v1(["a", "b"], pages) == [True, True]
    assert one.batch_get_v1(["a", "c", "b"], torch.arange(3 * made.page_tokens)) == [True, False, True]
    assert two.batch_exists(["a", "b", "c"]) == (2 if kind == "MLA" else 0)
    stats = one.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs, one.get_stats().backup_pgs) == ([2], [2], [])
    one.close()
    two.close()


# ---- a store that fails, or lies


def test_without_its_target_an_engine_goes_on_and_finds_its_pages_again_later(
    cache: Make, start_target: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.net.client.BACKOFF_SECONDS", (0.1, 0.1))
    target = start_target()
    made = cache(target.address)
    key, content = made.key(4), made.content(4)
    made.write(key, content)
    target.stop()
    begun = time.monotonic()
    assert made.read(key) == []
    assert made.write(made.key(4, seed=2), content) == 0
    assert time.monotonic() - begun < 5.0
    monkeypatch.setattr("tests.conftest.free_port", lambda: target.address.rpartition(":")[2])
    start_target()
    deadline = time.monotonic() + 20.0
    while not made.read(key):
        assert time.monotonic() < deadline
    assert same(made.read(key), content)


def test_a_target_that_does_not_answer_costs_one_deadline_and_is_left_alone_then(cache: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = cache(f"127.0.0.1:{silent.getsockname()[1]}", deadline_ms=1000)
        begun = time.monotonic()
        assert made.read(made.key(4)) == []
        took = time.monotonic() - begun
        assert made.backend.batch_exists(["a"]) == 0
        again = time.monotonic() - begun - took
    assert 0.9 < took < 5.0
    assert again < 0.9


def test_a_target_that_stalls_in_a_page_costs_one_deadline(cache: Make) -> None:
    def stalls(stream: Stream, header: Header, control: bytes) -> None:
        if header.op is Op.EXISTS:
            hits = wire.Outcomes([Outcome.HIT] * len(wire.decode_control(control, wire.Exists).keys))
            stream.send([wire.encode(Header(Op.FOUND, header.request), hits)], soon())
            return
        sizes = made.backend._sizes
        stream.send(value(header, bytes(sizes[0])), soon())
        stream.send([part[: sizes[1] // 2] for part in value(header, bytes(sizes[1]), number=1)], soon())

    made = cache(Impostor(stalls).address, deadline_ms=1000)
    begun = time.monotonic()
    assert made.read(made.key(4)) == []
    assert 0.9 < time.monotonic() - begun < 5.0


def test_what_a_full_disk_refuses_is_a_miss_and_the_rest_stays(cache: Make, start_target: Start) -> None:
    disk = FullDisk()
    made = cache(start_target(files=disk).address)
    content, other = made.content(4), made.content(4, seed=2)
    made.write(made.key(4), content)
    disk.full = True
    assert made.write(made.key(4, seed=2), other) == 0
    assert made.read(made.key(4, seed=2)) == []
    assert same(made.read(made.key(4)), content)
    disk.full = False
    assert made.write(made.key(4, seed=2), other) == 4 * made.page_tokens
    assert same(made.read(made.key(4, seed=2)), other)


def planted(made: Cache, target: RunningTarget, values: Sequence[bytes], seal_key: Any = None) -> None:
    """Put values where those of the page "a" would lie, as whoever has the target can."""
    names = made.backend._names(["a"])
    names = [seal_key.name(name) if seal_key else name for name in names]
    store = target.client()
    items = [Item(name, memoryview(value), 0, 7, 1) for name, value in zip(names, values, strict=True)]
    assert set(store.put(items, soon())) == {Outcome.STORED}
    store.close()


def test_a_value_of_another_length_is_a_miss(cache: Make, start_target: Start) -> None:
    target = start_target()
    made = cache(target.address)
    sizes = made.backend._sizes
    planted(made, target, [bytes(sizes[0]), bytes(sizes[1] - 1)])
    assert made.backend.batch_exists(["a"]) == 1
    assert made.backend.batch_get_v1(["a"], torch.arange(made.page_tokens)) == [False]


@pytest.mark.parametrize("mode", ["mac", "encrypt"])
def test_with_a_seal_what_others_planted_is_a_miss(cache: Make, start_target: Start, tmp_path: Path, mode: str) -> None:
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for number, file in enumerate(files, 1):
        file.write_text(json.dumps([{"id": number, "key": f"{number:02x}" * 32}]))
        file.chmod(0o600)
    target = start_target()
    made = cache(target.address, seal_key=str(files[0]), seal=mode)
    key, content = made.key(4), made.content(4)
    made.write(key, content)
    assert same(made.read(key), content)
    other = cache(target.address, seal_key=str(files[1]), seal=mode)
    assert other.read(key) == []
    planted(made, target, [bytes(size + TRAILER_BYTES) for size in made.backend._sizes], read_keys(files[0])[0])
    assert made.backend.batch_exists(["a"]) == 1
    assert made.backend.batch_get_v1(["a"], torch.arange(made.page_tokens)) == [False]


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"store": ""}, "store: missing, expected host:port"),
        ({"store": "nowhere"}, "store: 'nowhere' given, expected host:port"),
        ({"deadline_ms": 0}, "deadline-ms: '0' given"),
        ({"deadline_ms": 60_000}, "deadline-ms: '60000' given"),
        ({"namespace": "a b"}, "namespace: 'a b' given"),
        ({"seal": "mac"}, "seal-key: missing, required by seal mac, expected a file of keys"),
        ({"sotre": "host:1"}, "sotre: unknown, expected one of"),
        ({"tp_lcm_size": 2}, "tp_lcm_size: '2' conflicts with this backend, expected none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named(runner: Any, settings: dict[str, object], said: str) -> None:
    assert said in refusal(**{"store": "127.0.0.1:1", **settings})


def test_the_page_of_configuration_works_as_written(cache: Make, start_target: Start) -> None:
    """The engine's command from docs/sglang.md, as SGLang reads it; its target's address changed."""
    page = (ROOT / "docs/sglang.md").read_text().replace("\\\n", " ")
    (command,) = (block for block in page.split("\n\n") if block.startswith("    python -m sglang.launch_server"))
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    chosen = parser.parse_args(shlex.split(command)[3:])
    assert (chosen.enable_hierarchical_cache, chosen.hicache_storage_backend) == (True, "dynamic")
    extra = json.loads(chosen.hicache_storage_backend_extra_config)
    extra["store"] = start_target().address
    made = cache(layout=chosen.hicache_mem_layout, page_tokens=chosen.page_size, **extra)
    content = made.content(4)
    made.write(made.key(4), content)
    assert same(made.read(made.key(4)), content)


def test_other_pools_than_that_of_kv_are_refused(cache: Make) -> None:
    made = cache("127.0.0.1:1")
    with pytest.raises(Exception, match="host pool: 'mamba' given, expected only kv"):
        made.backend.register_mem_host_pool_v2(made.pool, PoolName.MAMBA.value)
