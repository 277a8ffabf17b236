"""What README.md, docs/start.md and docs/vllm.md show: commands are taken by the programs that they name, and the
manifest is one."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from components.router.__main__ import parse as parse_router
from components.worker.__main__ import parse as parse_worker
from kvstore.__main__ import parse as parse_store
from tests.graphs import manifests

ROOT = Path(__file__).parents[2]
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "docker" / "vllm.yaml").read_text()))
PAGE = "\n\n".join((ROOT / name).read_text() for name in ("README.md", "docs/start.md", "docs/vllm.md"))


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which kvtier runs, and vllm prints what it is told, one argument a line."""
    for name, line in {
        "kvtier": f'exec {sys.executable} -m graphs.cli "$@"',
        "vllm": r'printf "%s\0" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def told(script: str, programs: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
    """What vllm is told, and the tier in it."""
    ended = subprocess.run(
        ["bash", "-ec", script], env=programs, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    arguments = ended.stdout.split("\0")[:-1]
    extra = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    return arguments, extra


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (one for one in DOCUMENTS if one["kind"] == kind)
    return found


def test_the_manifest_hangs_together(programs: dict[str, str]) -> None:
    for document in DOCUMENTS:
        manifests.read(document)
    stores, engines = of_kind("StatefulSet"), of_kind("Deployment")
    (store,) = stores["spec"]["template"]["spec"]["containers"]
    options = parse_store(store["args"])
    assert options.nats == ""
    (claim,) = stores["spec"]["volumeClaimTemplates"]
    assert options.capacity < quantity(claim["spec"]["resources"]["requests"]["storage"])
    assert options.hot < quantity(store["resources"]["requests"]["memory"])

    pod = engines["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    arguments, extra = told(engine["args"][0], programs)
    assert arguments[0] == "serve"
    name, port = stores["spec"]["serviceName"], options.listen.rpartition(":")[2]
    replicas = range(stores["spec"]["replicas"])
    (tier,) = extra["secondary_tiers"]
    assert tier["store"].split(",") == [f"{name}-{number}.{name}:{port}" for number in replicas]
    assert extra["cpu_bytes_to_use"] < quantity(pod["volumes"][0]["emptyDir"]["sizeLimit"])
    (token,) = engine["env"]  # the model's licence is accepted on the hub
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hf-token-secret", "key": "HF_TOKEN", "optional": True}
    ports = {one["name"]: one["containerPort"] for one in engine["ports"]}
    assert arguments[arguments.index("--port") + 1] == str(ports["http"])


def quantity(text: str) -> int:
    return TypeAdapter(ByteSize).validate_python(f"{text}B")


def blocks(page: str) -> list[str]:
    """The indented blocks of a page, as they would be pasted."""
    found = re.findall(r"(?m)^\n((?:    .+\n|\n)+)", page)
    return [re.sub(r"(?m)^    ", "", one).strip() for one in found]


def commands(name: str) -> list[str]:
    joined = [block.replace("\\\n", " ") for block in blocks(PAGE)]
    return [line for block in joined for line in block.splitlines() if re.match(rf"\s*{name} ", line)]


def test_every_engine_of_the_pages_gets_the_tier(programs: dict[str, str]) -> None:
    found = commands("vllm serve")
    assert len(found) >= 2
    for command in found:
        arguments, extra = told(command, {**programs, "MODEL": "owner/model"})
        assert arguments[0] == "serve"
        assert extra["secondary_tiers"][0]["nats"] == ""


def test_every_store_of_the_pages_is_a_target() -> None:
    found = [shlex.split(command, comments=True)[2:] for command in commands("kvtier store")]
    targets = [arguments for arguments in found if arguments[0].startswith("-")]
    assert targets
    for arguments in targets:
        assert parse_store(arguments).nats == ""


@pytest.mark.parametrize(
    ("program", "parse"),
    [("kvstore", parse_store), ("components.worker", parse_worker), ("components.router", parse_router)],
)
def test_every_part_of_a_cluster_takes_its_arguments(program: str, parse: Callable[[list[str]], object]) -> None:
    found = [shlex.split(command, comments=True)[3:] for command in commands(f"python -m {re.escape(program)}")]
    assert found
    for arguments in found:
        parse(arguments)
