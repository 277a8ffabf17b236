"""What operators run: stat, verify and bench, on real targets and stores."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from graphs import cli
from graphs.services import free_port
from kvstore.disk.files import Files
from kvstore.disk.log import Log
from kvstore.disk.record import PAGE_BYTES, Entry
from kvstore.disk.space import StoppedStore
from kvstore.errors import ConfigError
from kvstore.text import in_units
from kvstore.tools import bench, words
from kvstore.tools.bench import MODELS, Model
from kvstore.tools.speeds import Speed, measure
from tests import commands
from tests.commands import Ended
from tests.conftest import MIB, RunningTarget, append, item, key, read, soon

ROOT = Path(__file__).parents[2]
SEGMENT = MIB
CHUNKS = 30  # three segments and a piece


@pytest.fixture
def run() -> Callable[..., Ended]:
    return partial(commands.run, "kvstore")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m kvstore` with some arguments; all are gone at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        # A shell's background job ignores SIGINT, and would hand that on.
        command_line = ["env", "--default-signal=INT", sys.executable, "-m", "kvstore", *arguments]
        started.append(subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def filled(place: Path, *, capacity: int = 8 * SEGMENT, chunks: int = CHUNKS) -> list[Entry]:
    """Make a store with some chunks, and stop it; its entries."""
    log = Log(place, capacity, segment_bytes=SEGMENT)
    for number in range(chunks):
        assert append(log, number)
    entries = log.entries()
    log.close()
    return entries


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's content and time of change."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- verify


@pytest.mark.parametrize("device", [False, True])
def test_a_sound_store_is_sound_and_is_not_touched(tmp_path: Path, run: Callable[..., Ended], device: bool) -> None:
    place = tmp_path / "store"
    if device:
        place.write_bytes(bytes(9 * SEGMENT))
    else:
        place.mkdir()
    filled(place, capacity=9 * SEGMENT)
    before = fingerprint(tmp_path)
    ended = run("verify", "--dir", place)
    assert (ended.code, ended.complained) == (0, "")
    assert f"sound: 4 segments, {CHUNKS} chunks, 0 superseded, 0 cut off" in ended.said
    assert fingerprint(tmp_path) == before
    log = Log(place, 9 * SEGMENT, segment_bytes=SEGMENT)
    assert (log.epoch, len(log)) == (2, CHUNKS)
    log.close()


def test_space_adds_up(tmp_path: Path, run: Callable[..., Ended]) -> None:
    filled(tmp_path)
    *reports, last = run("verify", "--dir", tmp_path, "--json").lines
    for report in reports:
        footer = 2 * PAGE_BYTES
        space = report["live_bytes"] + report["dead_bytes"] + report["free_bytes"]
        assert space + PAGE_BYTES + footer == SEGMENT
        assert report["live_bytes"] == report["live"] * (100_000 // PAGE_BYTES + 2) * PAGE_BYTES
    assert last["total"]["live"] == CHUNKS


@pytest.mark.parametrize(
    ("page", "byte", "what", "device"),
    [
        ("record", PAGE_BYTES + 5000, "payload", False),
        ("record", PAGE_BYTES + 5000, "payload", True),
        ("record", 41, "record header", False),
        ("record", 2, "record header", True),
        ("header", 3, "segment header", False),
        ("header", 17, "segment header", True),
        ("trailer", 3, "footer", False),
        ("trailer", 17, "footer", True),
        ("trailer", 33, "footer", False),
        ("table", 100, "footer's entries", False),
    ],
)
def test_a_flipped_byte_is_found_where_it_is(
    tmp_path: Path, run: Callable[..., Ended], page: str, byte: int, what: str, device: bool
) -> None:
    place = tmp_path / "store"
    if device:
        place.write_bytes(bytes(9 * SEGMENT))
    else:
        place.mkdir()
    entry = filled(place, capacity=9 * SEGMENT)[4]  # of the first segment
    pages = {
        "record": entry.page,
        "header": 0,
        "trailer": SEGMENT // PAGE_BYTES - 1,
        "table": SEGMENT // PAGE_BYTES - 2,
    }
    file = place if device else place / "segment-000000.kvt"
    offset = pages[page] * PAGE_BYTES + (MIB if device else 0)
    flip(file, offset + byte)
    before = fingerprint(tmp_path)
    ended = run("verify", "--dir", place, "--json")
    assert ended.code == 1
    reports = {report["segment"]: report for report in ended.lines[:-1]}
    (flaw,) = reports[0]["corrupt"]
    of_record = page == "record"
    assert flaw == {
        "what": what,
        "page": pages[page],
        "file": str(file),
        "offset": offset,
        "key": entry.key.hex() if of_record else "",
    }
    assert reports[0]["state"] == ("scanned" if what.startswith("footer") else "sealed")
    assert ended.lines[-1]["total"]["live"] == CHUNKS - of_record
    assert fingerprint(tmp_path) == before
    said = run("verify", "--dir", place).said
    assert f"corrupt: {what}" in said
    assert f"page {pages[page]}, {file} at byte {offset}" in said


def test_what_is_left_of_a_segment_is_told(tmp_path: Path, run: Callable[..., Ended]) -> None:
    filled(tmp_path)
    flip(tmp_path / "segment-000001.kvt", 5)
    flip(tmp_path / "segment-000001.kvt", SEGMENT - PAGE_BYTES + 40)
    os.truncate(tmp_path / "segment-000002.kvt", SEGMENT // 2)
    ended = run("verify", "--dir", tmp_path, "--json")
    found = {report["segment"]: (report["state"], report["live"]) for report in ended.lines[:-1]}
    assert ended.code == 1
    assert found == {0: ("sealed", 9), 1: ("lost", 0), 2: ("scanned", 4), 3: ("sealed", 3)}
    log = Log(tmp_path, 8 * SEGMENT, segment_bytes=SEGMENT)
    assert len(log) == 16  # what a start finds, too
    log.close()


def test_a_chunk_that_was_written_again_is_superseded(tmp_path: Path, run: Callable[..., Ended]) -> None:
    log = Log(tmp_path, 8 * SEGMENT, segment_bytes=SEGMENT)
    for number in range(20):
        append(log, number)
    entry = log.find(key(3))
    assert entry is not None
    flip(tmp_path / "segment-000000.kvt", entry.payload_offset)
    assert read(log, 3) == b""  # found corrupt, forgotten,
    assert append(log, 3)  # and stored again
    sound = log.find(key(4))
    assert sound is not None
    log._unpublish(sound)
    assert append(log, 4)
    log.close()
    *_, last = run("verify", "--dir", tmp_path, "--json").lines
    total = last["total"]
    assert (total["live"], total["superseded"], total["corrupt"]) == (20, 1, 1)
    assert total["dead_bytes"] == 2 * (100_000 // PAGE_BYTES + 2) * PAGE_BYTES


class Crashed(NamedTuple):
    folder: Path
    open_segment: Path
    entries: list[Entry]  # of that segment


@pytest.fixture
def crashed(tmp_path: Path) -> Crashed:
    """A store as kill -9 leaves it, all of its slots used before."""
    (tmp_path / "store").mkdir()
    log = Log(tmp_path / "store", 4 * SEGMENT, segment_bytes=SEGMENT)
    for number in range(70):
        assert append(log, number)
    copy = tmp_path / "crashed"
    shutil.copytree(tmp_path / "store", copy)
    (head,) = log._heads.values()
    entries = [entry for _, entry in log._live(head)]
    assert len(entries) > 5
    log.close()
    return Crashed(copy, copy / f"segment-{head.slot:06d}.kvt", entries)


def the_open(ended: Ended) -> Any:
    """The report of the segment that was open."""
    (report,) = [report for report in ended.lines[:-1] if report["state"] == "open"]
    return report


def test_an_open_segment_is_scanned(crashed: Crashed, run: Callable[..., Ended]) -> None:
    folder, _, entries = crashed
    before = fingerprint(folder)
    ended = run("verify", "--dir", folder, "--json")
    assert ended.code == 0
    assert {report["state"] for report in ended.lines[:-1]} == {"open", "sealed", "empty"}
    assert the_open(ended)["live"] == len(entries)
    assert fingerprint(folder) == before


@pytest.mark.parametrize("byte", [41, PAGE_BYTES + 41])
def test_the_end_of_an_open_segment_may_be_cut_off(crashed: Crashed, run: Callable[..., Ended], byte: int) -> None:
    folder, open_segment, entries = crashed
    flip(open_segment, entries[-1].page * PAGE_BYTES + byte)
    ended = run("verify", "--dir", folder, "--json")
    assert ended.code == 0
    assert [flaw["page"] for flaw in the_open(ended)["cut_off"]] == [entries[-1].page]
    flip(open_segment, entries[2].page * PAGE_BYTES + byte)
    ended = run("verify", "--dir", folder, "--json")
    assert ended.code == 1
    assert [flaw["page"] for flaw in the_open(ended)["corrupt"]] == [entries[2].page]
    assert the_open(ended)["live"] == len(entries) - 2


def test_a_page_that_cannot_be_read_costs_a_scan_one_chunk(
    crashed: Crashed, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, open_segment, entries = crashed
    bad = entries[1].page + 1
    whole_read = Files.read

    def read(self: Files, fd: int, into: Sequence[memoryview], offset: int) -> None:
        end = offset + sum(map(len, into))
        if Path(f"/proc/self/fd/{fd}").readlink() == open_segment and offset <= bad * PAGE_BYTES < end:
            raise OSError(errno.EIO, "injected")
        whole_read(self, fd, into, offset)

    monkeypatch.setattr(Files, "read", read)
    found = the_open(run("verify", "--dir", folder, "--json"))
    assert found["live"] == len(entries) - 1
    assert [(flaw["what"], flaw["page"]) for flaw in found["corrupt"]] == [
        ("cannot be read (injected)", bad),
        ("payload", entries[1].page),
    ]


def test_chunks_of_another_namespace_are_told(tmp_path: Path, run: Callable[..., Ended]) -> None:
    filled(tmp_path, chunks=3)
    assert run("verify", "--dir", tmp_path, "--namespace", "default").code == 0
    ended = run("verify", "--dir", tmp_path, "--namespace", "other")
    assert ended.code == 1
    assert ended.said.count("corrupt: record header of chunk") == 3


def test_several_stores_are_told_together(tmp_path: Path, run: Callable[..., Ended]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        filled(tmp_path / name, chunks=5)
    ended = run("verify", "--dir", tmp_path / "a", "--dir", tmp_path / "b")
    assert "sound: 2 segments, 10 chunks" in ended.said


def test_a_store_in_use_is_refused_and_one_looked_at_is_kept(tmp_path: Path, run: Callable[..., Ended]) -> None:
    log = Log(tmp_path, 8 * SEGMENT, segment_bytes=SEGMENT)
    ended = run("verify", "--dir", tmp_path)
    assert (ended.code, ended.said, ended.complained.count("\n")) == (2, "", 1)
    assert "expected a stopped store: a target is using this one" in ended.complained
    log.close()
    store = StoppedStore(tmp_path, Files())
    assert run("verify", "--dir", tmp_path).code == 0  # two may look
    with pytest.raises(ConfigError, match="no other target is using"):
        Log(tmp_path, 8 * SEGMENT, segment_bytes=SEGMENT)
    store.close()
    Log(tmp_path, 8 * SEGMENT, segment_bytes=SEGMENT).close()


# ---- stat


@pytest.fixture
def busy(start_target: Callable[..., RunningTarget]) -> RunningTarget:
    """A target that has stored three chunks and served two."""
    target = start_target()
    client = target.client()
    client.put([item(number) for number in range(3)], soon())
    client.get([key(1), key(2), key(9)], [memoryview(bytearray(100_000)) for _ in range(3)], soon())
    client.close()
    return target


def test_stat_shows_a_target(busy: RunningTarget, run: Callable[..., Ended]) -> None:
    ended = run("stat", busy.address)
    assert (ended.code, ended.complained) == (0, "")
    shown = {line[:26].strip(): line[26:].split() for line in ended.said.splitlines()[2:] if line}
    assert shown["chunks"] == ["3"]
    assert shown["received"] == ["293.0", "KiB"]
    assert shown["device hits"] == ["2"]
    assert shown["get hit"] == ["2"]
    assert shown["get miss"] == ["1"]
    assert shown["put stored"] == ["3"]
    assert shown["corrupt chunks"] == ["0"]
    assert "get late" not in shown
    assert float(shown["write amplification"][0]) > 1


def test_stat_tells_who_does_not_answer(busy: RunningTarget, run: Callable[..., Ended]) -> None:
    dead = f"127.0.0.1:{free_port()}"
    ended = run("stat", busy.address, "--namespace", "other")
    assert ended.code == 1
    assert "the target says: namespace 'other' is not served here" in ended.said
    ended = run("stat", f"{dead},{busy.address}")
    assert ended.code == 1
    assert f"{dead} does not answer: connection refused" in ended.said
    assert "put stored" in ended.said
    ended = run("stat", dead, "--json")
    assert ended.code == 1
    assert ended.lines[0]["targets"][dead] == {"error": "connection refused"}


def test_stat_watches(busy: RunningTarget, start: Callable[..., subprocess.Popen[str]]) -> None:
    arguments = ["stat", busy.address, "--watch", "0.2", "--json"]
    watching = start(*arguments)
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())["targets"][busy.address]
    busy.client().put([item(number) for number in range(10, 12)], soon())
    # What is received and what is stored of a put may be counted in two looks, some 0.2 s apart.
    rates = {"put_stored": 0.0, "received_bytes": 0.0}
    while not all(rates.values()):
        look = json.loads(watching.stdout.readline())["targets"][busy.address]
        for name in rates:
            rates[name] += look["per_second"].get(name, 0.0)
    assert (first["entries"], look["entries"]) == (3, 5)
    assert "per_second" not in first
    assert look["operations"]["put"]["stored"] - first["operations"]["put"]["stored"] == 2
    assert look["received_bytes"] - first["received_bytes"] == 200_000
    watching.send_signal(signal.SIGINT)
    assert watching.wait(10) == 130


def test_the_console_script_passes_commands_on(
    busy: RunningTarget, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvtier"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["store", "stat", busy.address])
    assert ended.value.code == 0
    assert "put stored" in capsys.readouterr().out


def test_a_process_is_seen_while_it_runs_and_verified_afterwards(
    tmp_path: Path, run: Callable[..., Ended], start: Callable[..., subprocess.Popen[str]]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = [
        "--dir",
        str(tmp_path),
        "--capacity",
        "64MiB",
        "--segment-size",
        "4MiB",
        "--listen",
        address,
        "--nats",
        "",
    ]
    target = start(*options)
    assert target.stdout is not None
    assert "ready" in target.stdout.readline()
    target.send_signal(signal.SIGHUP)  # as `systemctl reload` does; there is nothing to read again
    assert run("bench", "--store", address, "--size", "64KiB", "--seconds", "0.05").code == 0
    (look,) = run("stat", address, "--json").lines
    chunks = look["targets"][address]["entries"]
    assert chunks == look["targets"][address]["operations"]["put"]["stored"]
    refused = run("verify", "--dir", tmp_path)
    assert (refused.code, refused.said, refused.complained.count("\n")) == (2, "", 1)
    target.kill()
    target.wait()
    ended = run("verify", "--dir", tmp_path)
    assert ended.code == 0
    assert f"{chunks} chunks" in ended.said


# ---- bench


def test_bench_measures_and_leaves_nothing(tmp_path: Path, run: Callable[..., Ended]) -> None:
    ended = run("bench", "--dir", tmp_path, "--seconds", "0.05", "--size", "64KiB", "--json")
    assert (ended.code, list(tmp_path.iterdir())) == (0, [])
    (result,) = ended.lines
    names = [speed["name"] for speed in result["speeds"]]
    assert names == ["device write", "device read", "TCP on loopback", "UNIX socket"]
    assert all(len(speed["runs"]) == 5 and min(speed["runs"]) > 0 for speed in result["speeds"])
    assert [verdict["model"] for verdict in result["verdicts"]] == [model.name for model in MODELS]


def test_bench_measures_a_running_target(busy: RunningTarget, run: Callable[..., Ended]) -> None:
    arguments = ["--seconds", "0.05", "--size", "64KiB", "--bytes-per-token", "160KiB", "--tokens-per-second", "12000"]
    ended = run("bench", "--store", busy.address, *arguments)
    assert ended.code == 0
    assert "A short benchmark: chunks of 64.0 KiB, 5 runs of 0.01 s each" in ended.said
    assert "store put" in ended.said
    assert "The bottleneck is: store get" in ended.said
    assert "your model" in ended.said
    assert "Llama" not in ended.said
    ended = run("bench", "--store", busy.address, "--size", "8MiB", "--seconds", "0.05")  # more than a segment holds
    assert (ended.code, ended.complained.count("\n")) == (2, 1)
    assert "put refused" in ended.complained


GB = 1e9


@pytest.mark.parametrize(
    ("fed", "model", "tokens", "workers", "says"),
    [
        (5.373952 * GB, MODELS[0], 41_000, 1.0, "this target feeds 1.0 workers at prefill speed"),
        (2.916352 * GB, MODELS[1], 8_900, 1.0, "this target feeds 1.0 workers at prefill speed"),
        (1.458176 * GB, MODELS[2], 8_900, 1.0, "this target feeds 1.0 workers at prefill speed"),
        (7.0 * GB, MODELS[1], 21_362, 2.4, "this target feeds 2.4 workers at prefill speed"),
        (5.8 * GB, MODELS[1], 17_700, 1.99, "this target feeds 1.9 workers at prefill speed"),
        (
            1.2 * GB,
            MODELS[1],
            3_662,
            0.411,
            "loading takes 2.4 times as long as computing; 3 such targets feed one worker, 2 with an FP8 KV cache",
        ),
        (
            1.0 * GB,
            MODELS[2],
            6_104,
            0.686,
            "loading takes 1.5 times as long as computing; 2 such targets feed one worker",
        ),
        (500.0, Model("mine", 100, 10), 5, 0.5, "2 such targets feed one worker, 1 with an FP8 KV cache"),
    ],
)
def test_the_verdict_is_arithmetic(fed: float, model: Model, tokens: float, workers: float, says: str) -> None:
    verdict = bench.verdict(fed, model)
    assert verdict.fed_tokens_per_second == pytest.approx(tokens, rel=0.001)
    assert verdict.fed_workers == pytest.approx(workers, rel=0.01)
    assert verdict.advice.endswith(says)


def test_what_is_read_and_sent_bounds_what_is_fed() -> None:
    names = {"device write": 1.0, "device read": 4.0, "TCP on loopback": 3.0, "UNIX socket": 2.0}
    measured = [Speed(name, [speed] * 5, 1) for name, speed in names.items()]
    assert bench.slowest(measured).name == "TCP on loopback"
    assert bench.slowest([*measured[:2], Speed("store get", [9.0, 3.5, 1.0], 1)]).name == "store get"


def test_a_measurement_may_be_bounded_in_bytes() -> None:
    moved: list[int] = []

    def step(_: int) -> int:
        moved.append(100)
        return 100

    speed = measure("x", step, 2, 60.0, run_bytes_max=600)
    assert len(speed.runs) == 5
    assert sum(moved) == 5 * 600


# ---- bad input, words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stat", "nonsense"], "address: 'nonsense' given, expected host:port"),
        (["stat", "127.0.0.1:9", "--watch", "0"], "watch: '0' given, expected more than 0"),
        (["stat", "127.0.0.1:9", "--namespace", "a b"], "namespace: 'a b' given, expected 1 to 64 letters"),
        (["stat", "etcd://127.0.0.1:9"], "etcd: no server answers at 127.0.0.1:9"),
        (["verify", "--dir", "/nowhere"], "dir: '/nowhere' given, expected a directory or a device that holds a store"),
        (["verify", "--dir", "."], "expected a directory or a device that holds a store"),
        (["verify", "--dir", __file__], "expected a directory or a device that holds a store"),
        (["verify", "--dir", ".", "--namespace", "a/b"], "namespace: 'a/b' given, expected 1 to 64 letters"),
        (["bench"], "dir: missing, expected a directory on the device to measure, or --store with a target"),
        (["bench", "--dir", "/nowhere"], "dir: '/nowhere' given, expected a directory that exists"),
        (["bench", "--dir", ".", "--size", "1G"], "size: '1G' given, expected at most 67108864"),
        (["bench", "--dir", ".", "--size", "big"], "size: 'big' given, expected a size such as 500G"),
        (["bench", "--dir", ".", "--seconds", "0"], "seconds: '0' given, expected more than 0"),
        (["bench", "--dir", ".", "--bytes-per-token", "1K"], "tokens-per-second: missing, required by --bytes"),
        (["bench", "--dir", ".", "--tokens-per-second", "9"], "bytes-per-token: missing, required by --tokens"),
        (["bench", "--store", "nonsense"], "store: 'nonsense' given, expected host:port"),
        (["bench", "--store", "127.0.0.1:9"], "store: no target of namespace 'default' answers at 127.0.0.1:9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(run: Callable[..., Ended], arguments: list[str], says: str) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.said, ended.complained.count("\n")) == (2, "", 1), ended.complained
    assert says in ended.complained


def test_a_store_of_another_format_is_refused(tmp_path: Path, run: Callable[..., Ended]) -> None:
    filled(tmp_path, chunks=1)
    block = json.loads((tmp_path / "store.json").read_bytes())
    (tmp_path / "store.json").write_text(json.dumps({**block, "version": 99}))
    assert "expected a store of format 1, this one has 99" in run("verify", "--dir", tmp_path).complained
    (tmp_path / "store.json").write_text(json.dumps({**block, "segment_bytes": 0}))
    assert "expected a store of whole pages" in run("verify", "--dir", tmp_path).complained
    (tmp_path / "store.json").write_text("{")
    assert "expected a store whose store.json is readable" in run("verify", "--dir", tmp_path).complained


def test_words() -> None:
    assert (in_units(5 << 30), words.speed(1.25e9)) == ("5.0 GiB", "1.2 GB/s")
    assert [words.age(seconds) for seconds in (3.0, 300, 7200, 10 * 86400)] == [
        "3.0 s",
        "5.0 min",
        "2.0 h",
        "10.0 days",
    ]
    assert words.table([["", "a"], ["wide", "123"]]) == "        a\nwide  123"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """As in `dynamo serve ... --dry-run | head -1`."""
    code = "from kvstore.errors import run_command; run_command('kvstore', lambda: print('a line\\n' * 100_000))"
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', code])} | head -n 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "a line\n", "")
