"""What a start may change and what it must leave alone: a start that is refused has changed nothing."""

import hashlib
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import memory
from kvstore.__main__ import main, parse
from kvstore.disk.device import Device, default_segment_bytes
from kvstore.disk.log import Log
from kvstore.disk.shelf import Shelf
from kvstore.errors import ConfigError, UnavailableError
from tests.conftest import MIB, append, key, read

SMALL = 100 * MIB
LARGE = 300 * MIB


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 20 segments of 4 MiB, all full."""
    directory = tmp_path_factory.mktemp("full")
    log = Log(directory, 80 * MIB, segment_bytes=4 * MIB)
    for number in range(1000):
        append(log, number)
    log.close()
    return directory


@pytest.fixture
def folder(full: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(full, tmp_path / "store")


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is."""
    holder = socket.create_server(("127.0.0.1", 0))
    yield holder.getsockname()[1]
    holder.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--capacity", "16MiB", "--segment-size", "8MiB"], "segment-size"),
        (["--capacity", "6MiB"], "capacity"),
        (["--capacity", "900TiB"], "capacity"),
        (["--capacity", "16MiB", "--metrics-port", "TAKEN"], "metrics-port"),
        (["--capacity", "16MiB", "--listen", "127.0.0.1:TAKEN"], "listen"),
        (["--capacity", "16MiB", "--etcd", "127.0.0.1:TAKEN"], "etcd"),
        (["--capacity", "16MiB", "--nats", "nats://127.0.0.1:TAKEN/x y"], "nats"),
        (["--capacity", "16MiB", "--namespace", "another"], "namespace"),
        (["--capacity", "16MiB", "--hot", "900TiB"], "hot"),
        (["--capacity", "16MiB", "--connections", "2000000000"], "connections: .* expected at most .* open files"),
        (["--capacity", "16MiB", "--namespaces", "MANY"], "connections: '2000000000' given"),
        (["--capacity", "16MiB", "--unix-socket", "/nowhere/target.sock"], "unix-socket"),
        (["--capacity", "16MiB", "--namespaces", "NAMES", "--unix-socket", "/nowhere/target.sock"], "unix-socket"),
    ],
    ids=lambda one: one[-2] if isinstance(one, list) else one,
)
def test_a_refused_start_changes_nothing(folder: Path, taken: int, arguments: list[str], expected: str) -> None:
    before = content(folder)
    options = ["--dir", str(folder), "--listen", "127.0.0.1:0", "--nats", "", "--unix-socket", ""]
    credential, names = folder.parent / "credential", folder.parent / "names.yaml"
    credential.write_text("0123456789abcdef0123456789abcdef")
    credential.chmod(0o600)
    names.write_text(f"namespaces: [{{name: default, quota: 8MiB, credential-file: {credential}}}]")
    many = folder.parent / "many.yaml"
    many.write_text(names.read_text().replace("quota:", "connections: 2000000000, quota:"))
    replaced = {"TAKEN": str(taken), "NAMES": str(names), "MANY": str(many)}
    given = [re.sub("[A-Z]{4,}", lambda word: replaced[word[0]], one) for one in arguments]
    with pytest.raises((ConfigError, UnavailableError), match=expected):
        main([*options, *given])
    assert content(folder) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--listen", "0.0.0.0:7600"], "advertise: missing, required by --listen"),
        (["--listen", "0:7600"], "advertise: missing, required by --listen"),
        (["--listen", "/run/target.sock", "--nats", ""], "listen: '/run/target.sock' given, expected host:port"),
        (["--listen", "[::]:0", "--nats", "", "--etcd", "etcd:2379"], "advertise: missing, required by --listen"),
        (["--listen", "0.0.0.0:7600", "--advertise", "0.0.0.0:7600"], "advertise: '0.0.0.0:7600' given"),
        (["--listen", "0.0.0.0:7600", "--advertise", "store-0:0"], "advertise: 'store-0:0' given"),
        (["--listen", "0.0.0.0:7600", "--advertise", "store-0"], "advertise: 'store-0' given, expected host:port"),
    ],
)
def test_what_nobody_can_reach_is_not_announced(arguments: list[str], expected: str) -> None:
    store = ["--dir", "/nvme0", "--capacity", "10G"]
    with pytest.raises(ConfigError, match=expected):
        parse([*store, *arguments])
    assert parse([*store, "--listen", "0.0.0.0:7600", "--nats", ""])  # known by the workers' own lists alone


def test_a_store_grows_and_shrinks_with_its_own_segments(folder: Path) -> None:
    assert default_segment_bytes(LARGE) != 4 * MIB
    log = Log(folder, LARGE)
    assert (log.segment_bytes, log.slots) == (4 * MIB, LARGE // (4 * MIB))
    for number in range(1000, 2500):
        append(log, number)
    assert all(read(log, number) for number in (999, 1000, 2499))
    log.close()
    log = Log(folder, SMALL)
    Shelf([log]).delete_beyond()
    assert len(list(folder.glob("segment-*.kvt"))) == log.slots == SMALL // (4 * MIB)
    assert append(log, 5000)
    assert read(log, 5000)
    log.close()


def test_a_device_keeps_its_segment_size(tmp_path: Path) -> None:
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(200 * MIB)
    Log(path, 50 * MIB, segment_bytes=4 * MIB).close()
    device = Device(path, 200 * MIB, ["default"])
    assert device.segment_bytes == 4 * MIB
    device.close()


def test_files_of_others_are_left_alone_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["segment-old.kvt", "segment-1.kvt", "segment-0000700.kvt", "segment-0000001.kvt", "notes.txt"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    other = Log(foreign, 16 * MIB, segment_bytes=4 * MIB)
    append(other, 1)
    other.close()
    shutil.copy(foreign / "segment-000000.kvt", folder / "segment-000700.kvt")
    for name in names:
        (folder / name).write_text("mine")
    log = Log(folder, 16 * MIB)
    log.delete_beyond()
    assert log._device.space.used_slots() == [0, 1, 2, 3, 700]
    log.close()
    assert all((folder / name).read_text() == "mine" for name in names)
    line, beyond = [one for one in caplog.messages if "left alone" in one]
    assert all(name in line for name in names)
    assert beyond.endswith("left alone: segment-000700.kvt")
    assert not (folder / "segment-000019.kvt").exists()


GROUPS = {
    "none": ([], {}),
    "v2": (["0::/pod/box"], {"pod/memory.max": 300, "pod/box/memory.max": "max"}),
    "v2 in a container": (["0::/"], {"memory.max": 200}),
    "v1": (["4:cpu:/a", "7:memory:/box"], {"memory/box/memory.limit_in_bytes": 400}),
    "v1 unlimited": (["7:memory:/box"], {"memory/box/memory.limit_in_bytes": 9223372036854771712}),
}


@pytest.mark.parametrize(("kind", "limit"), list(zip(GROUPS, [1 << 20, 300, 200, 400, 1 << 20], strict=True)))
def test_memory_is_what_the_machine_and_the_control_groups_allow(tmp_path: Path, kind: str, limit: int) -> None:
    lines, files = GROUPS[kind]
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:        1024 kB\nMemFree:  10 kB\n")
    (proc / "self/cgroup").write_text("\n".join(lines) + "\n" if lines else "")
    for name, number in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{number}\n")
    assert memory.limit_bytes(proc, groups) == limit


def test_a_full_disk_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    log = Log(folder, 80 * MIB)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._files, "write", full)
    assert not any(append(log, number) for number in range(2000, 2050))
    assert len([one for one in caplog.messages if "No space left" in one]) == 1
    assert log.stats.failed_writes >= 50
    monkeypatch.undo()
    assert key(2000) not in log
    log.close()
