"""Several namespaces on one target: nobody sees, starves or evicts another's values, whatever is restarted."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from crc32c import crc32c

from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.device import Device
from kvstore.disk.files import Files
from kvstore.disk.log import Log, Value
from kvstore.disk.shelf import Rack, Shelf
from kvstore.disk.space import StoppedStore, Superblock
from kvstore.errors import ConfigError
from kvstore.tools.scrub import Scrub
from tests.conftest import MIB, append, key, payload, read
from tests.kvstore.test_key_versions import OLD, STORE, old_segment

SEGMENT = MIB
LENGTH = 100_000


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def make_log(folder: Path, namespace: str, slots: int = 8) -> Log:
    return Log(folder, slots * SEGMENT, namespace=namespace, segment_bytes=SEGMENT)


def make_rack(paths: Path | list[Path], quotas: Mapping[str, int], slots: int = 24) -> Rack:
    """Quotas are in segments."""
    paths = [paths] if isinstance(paths, Path) else paths
    rack = Rack(
        paths, slots * SEGMENT, {name: count * SEGMENT for name, count in quotas.items()}, segment_bytes=SEGMENT
    )
    rack.begin()
    return rack


def store(shelf: Shelf, number: int, content: bytes) -> bool:
    buffer = aligned(len(content))
    buffer.payload[:] = content
    return shelf.of(key(number)).append([Value(key(number), buffer, crc32c(content), number + 1, 7, 2)])[0]


def load(shelf: Shelf, number: int, length: int = LENGTH) -> bytes | None:
    buffer = aligned(length)
    (found,) = shelf.of(key(number)).read([key(number)], [buffer])
    return bytes(buffer.payload) if found is not None and found.intact else None


def content_of(name: str, number: int) -> bytes:
    """Another one for each namespace, under the same key."""
    return hashlib.sha256(f"{name} {number}".encode()).digest() * (LENGTH // 32)


LONG = len(content_of("a", 0))


# ---- a directory belongs to the namespace it was written with


@pytest.mark.parametrize("in_directory", [True, False])
def test_a_store_of_another_namespace_is_refused_and_not_touched(tmp_path: Path, in_directory: bool) -> None:
    place = tmp_path / "store"
    if in_directory:
        place.mkdir()
    else:
        with place.open("wb") as file:
            file.truncate(9 * SEGMENT)
    log = make_log(place, "old", 9)
    assert all(append(log, number) for number in range(60))
    log.close()
    before = contents(place if in_directory else tmp_path)
    for slots in (9, 4):  # also where a smaller capacity would delete segments
        with pytest.raises(ConfigError, match="namespace: 'new' given, expected 'old', whose values are in"):
            make_log(place, "new", slots)
    assert contents(place if in_directory else tmp_path) == before
    again = make_log(place, "old", 9)  # the control
    assert sum(read(again, number) == payload(number) for number in range(60)) == len(again) > 40
    again.close()


def old_store(folder: Path, *, named: str = "default") -> Path:
    """A directory of release 0.1 with sealed and open segments; its superblock names no namespace."""
    folder.mkdir()
    block = {"version": 1, "store": STORE, "segment_bytes": SEGMENT, "epoch": 3}
    (folder / "store.json").write_text(json.dumps(block))
    for slot, numbers in enumerate((range(9), range(9, 18), range(18, 22))):
        content = old_segment(slot, slot + 1, numbers, sealed=slot < 2)
        if named != "default":
            content = renamed(content, named)
        (folder / f"segment-{slot:06d}.kvt").write_bytes(content)
    return folder


def renamed(content: bytes, name: str) -> bytes:
    """A segment with its records' namespace changed."""
    changed = bytearray(content)
    size = record.PAGE_BYTES
    for start in range(size, len(content), size):
        if content[start : start + 8] == b"KVTIERRC":
            head = content[start : start + 32] + record.namespace_id(name).to_bytes(8, "little")
            head += content[start + 40 : start + 88]
            changed[start : start + 92] = head + crc32c(head).to_bytes(4, "little")
    return bytes(changed)


def test_an_old_store_belongs_to_whom_its_records_name(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "old")
    before = contents(folder)
    with pytest.raises(ConfigError, match="namespace: 'other' given, expected the one whose values are in"):
        make_log(folder, "other", 12)
    assert {name: digest for name, digest in contents(folder).items() if name != "LOCK"} == before
    log = make_log(folder, "default", 12)
    assert all(read(log, number) == payload(number) for number in OLD)
    log.close()
    assert msgspec.json.decode((folder / "store.json").read_bytes(), type=Superblock).namespace == "default"


def test_an_old_store_of_two_namespaces_is_nobodys(tmp_path: Path) -> None:
    """As releases before 0.2 left it that were started under another name: their footers say nothing of it."""
    folder = old_store(tmp_path / "old")
    first = folder / "segment-000000.kvt"
    first.write_bytes(renamed(first.read_bytes(), "other"))
    for name in ("default", "other"):
        with pytest.raises(ConfigError, match="another wrote them"):
            make_log(folder, name, 12)
    rack = make_rack(folder, {"default": 6, "other": 6}, 12)
    assert all(len(log) == 0 for shelf in rack.shelves.values() for log in shelf.logs)
    rack.close()


def test_an_old_store_is_taken_over_by_its_namespace_in_a_file(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "old", named="second")
    rack = make_rack(folder, {"first": 6, "second": 6}, 12)
    assert [len(rack.shelves[name].logs[0]) for name in ("first", "second")] == [0, len(OLD)]
    assert all(load(rack.shelves["second"], number) == payload(number) for number in OLD)
    rack.close()


def test_what_a_namespaces_file_was_used_for_is_not_opened_for_one(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 6, "b": 6})
    assert store(rack.shelves["b"], 1, content_of("b", 1))
    rack.close()
    before = contents(tmp_path)
    for name in ("a", "b", "c"):
        with pytest.raises(ConfigError, match=f"namespace: '{name}' given, expected --namespaces: .* a, b"):
            make_log(tmp_path, name, 24)
    assert contents(tmp_path) == before
    assert json.loads((tmp_path / "store.json").read_bytes())["version"] == 2  # releases before 0.2 refuse it


# ---- equal keys of several namespaces


def test_equal_keys_are_apart_also_after_a_crash(tmp_path: Path) -> None:
    names = {"a": 8, "b": 8, "c": 8}
    rack = make_rack(tmp_path, names)
    shelves = rack.shelves
    for number in range(30):
        for name in ("a", "b"):
            assert store(shelves[name], number, content_of(name, number))
    assert not any(key(number) in shelves["c"] for number in range(30))
    assert store(shelves["c"], 3, content_of("c", 3))
    for device in rack._devices:
        device.close()  # as a kill would: heads are not sealed
    again = make_rack(tmp_path, names)
    for name in ("a", "b"):
        assert all(load(again.shelves[name], number, LONG) == content_of(name, number) for number in range(30))
    assert [int.from_bytes(entry.key, "big") for entry in again.shelves["c"].entries()] == [3]
    assert load(again.shelves["c"], 3, LONG) == content_of("c", 3)
    again.close()


def test_who_is_over_its_quota_evicts_its_own(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"flood": 8, "calm": 16})
    flood, calm = rack.shelves["flood"], rack.shelves["calm"]
    for number in range(100):
        assert store(calm, number, content_of("calm", number))
    for number in range(1000):
        assert store(flood, number, content_of("flood", number))
        assert flood.held_bytes <= 8 * SEGMENT
    assert all(load(calm, number, LONG) == content_of("calm", number) for number in range(100))
    assert calm.stats().evicted_entries == 0 < flood.stats().evicted_entries
    assert flood.stats().payload_bytes > 5 * SEGMENT
    rack.close()


def test_two_directories_share_each_quota(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.mkdir()
    rack = make_rack(paths, {"a": 8, "b": 8}, 16)
    for number in range(200):
        store(rack.shelves["a"], number, content_of("a", number))
    assert [log.held_bytes for log in rack.shelves["a"].logs] == [4 * SEGMENT] * 2
    rack.close()
    with pytest.raises(ConfigError, match=r"namespaces\.a\.quota: '3145728' given, expected at least 4194304"):
        make_rack(paths, {"a": 3}, 16)


@pytest.mark.parametrize(
    ("quotas", "says"),
    [
        ({"a": 20, "b": 5}, "the sum of all quotas: '26214400' given, expected at most 25165824"),
        ({"a": 1}, "namespaces.a.quota: '1048576' given, expected at least 2097152"),
    ],
)
def test_quotas_that_cannot_be_are_refused(tmp_path: Path, quotas: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_rack(tmp_path, quotas)
    assert {path.name for path in tmp_path.iterdir()} <= {"LOCK"}


# ---- a file that changes


def filled(rack: Rack, name: str, count: int = 40) -> Shelf:
    shelf = rack.shelves[name]
    for number in range(count):
        assert store(shelf, number, content_of(name, number))
    return shelf


def sound(shelf: Shelf, name: str) -> int:
    """How many values there are; all of them must be the namespace's own."""
    numbers = [int.from_bytes(entry.key, "big") for entry in shelf.entries()]
    assert all(load(shelf, number, LONG) == content_of(name, number) for number in numbers)
    return len(numbers)


def test_a_namespace_that_left_comes_back_to_what_nobody_needed(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 8, "b": 8})
    filled(rack, "a"), filled(rack, "b")
    rack.close()
    rack = make_rack(tmp_path, {"a": 8, "c": 8})
    assert (sound(rack.shelves["a"], "a"), sound(rack.shelves["c"], "c")) == (40, 0)
    rack.close()
    rack = make_rack(tmp_path, {"a": 8, "b": 8, "c": 8})
    assert [sound(rack.shelves[name], name) for name in "abc"] == [40, 40, 0]
    rack.close()
    rack = make_rack(tmp_path, {"c": 24})
    for number in range(400):
        store(rack.shelves["c"], number, content_of("c", number))
    rack.close()
    rack = make_rack(tmp_path, {"a": 8, "b": 8, "c": 8})
    assert [sound(rack.shelves[name], name) for name in "ab"] == [0, 0]
    assert 0 < sound(rack.shelves["c"], "c") < 80
    rack.close()


def test_quotas_and_namespaces_change_while_it_runs(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 12, "b": 12})
    a, b = filled(rack, "a", 90), filled(rack, "b")
    rack.change({"a": 4 * SEGMENT, "b": 12 * SEGMENT, "c": 8 * SEGMENT})
    assert (a.held_bytes, b.held_bytes) == (4 * SEGMENT, 12 * SEGMENT)
    assert sound(b, "b") == 40
    assert 9 < sound(a, "a") < 40
    c = filled(rack, "c")
    rack.change({"a": 4 * SEGMENT, "c": 20 * SEGMENT})
    assert sound(c, "c") == 40
    assert not store(b, 1, content_of("b", 1))  # closed: it writes nowhere
    rack.close()


def test_a_change_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 12, "b": 12})
    filled(rack, "a")
    with pytest.raises(ConfigError, match="sum of all quotas"):
        rack.change({"a": 24 * SEGMENT, "b": 12 * SEGMENT})
    assert sound(rack.shelves["a"], "a") == 40
    rack.close()


def test_a_device_that_cannot_name_all_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "device"
    with place.open("wb") as file:
        file.truncate(9 * SEGMENT)
    many = [f"{number:064d}" for number in range(80)]
    with pytest.raises(ConfigError, match="namespaces: '80' given, expected fewer"):
        Device(place, 9 * SEGMENT, many, shared=True, segment_bytes=SEGMENT, files=Files())


def test_a_smaller_capacity_gives_space_back_at_once(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 12, "b": 12})
    assert all(store(shelf, n, content_of(name, n)) for name, shelf in rack.shelves.items() for n in range(150))
    rack.close()
    rack = make_rack(tmp_path, {"a": 4, "b": 4}, slots=8)
    rack.delete_beyond()
    assert len(list(tmp_path.glob("segment-*.kvt"))) == 8
    # A deleted file takes its space for as long as somebody has it open.
    held = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in held if str(path).startswith(f"{tmp_path}/segment-") and "(deleted)" in path.name]
    rack.close()


@pytest.mark.parametrize("slots", [2, 3, 12])
def test_a_namespace_that_shrinks_goes_on_storing(tmp_path: Path, slots: int) -> None:
    """Also if it has been writing values again, and has few segments from now on."""
    rack = make_rack(tmp_path, {"a": 24})
    a = rack.shelves["a"]
    for number in range(300):
        assert store(a, number, content_of("a", number))
        for hot in range(0, 100, 25):
            a.of(key(hot)).used(key(hot))
    assert a.stats().rewritten_bytes
    rack.change({"a": slots * SEGMENT})
    assert a.held_bytes == slots * SEGMENT
    for number in range(1000, 1100):
        assert store(a, number, content_of("a", number))
    assert 0 < sound(a, "a") <= 10 * slots
    rack.change({"a": 24 * SEGMENT})
    for number in range(2000, 2150):
        assert store(a, number, content_of("a", number))
    assert sound(a, "a") > 150
    rack.close()


def test_a_reader_keeps_its_place_when_the_namespace_goes(tmp_path: Path) -> None:
    """A slot that somebody still reads is nobody else's."""
    rack = make_rack(tmp_path, {"a": 8, "b": 16})
    a = filled(rack, "a")
    (log,) = a.logs
    read_slots = {segment.slot for segment in log._segments.values() if len(segment)}
    for slot in read_slots:
        log._segments[slot].readers += 1
    rack.change({"b": 16 * SEGMENT, "c": 8 * SEGMENT})
    (other,) = rack.shelves["c"].logs
    assert not other._held & read_slots
    assert store(rack.shelves["c"], 1, content_of("c", 1))
    rack.close()


def test_verify_checks_all_namespaces(tmp_path: Path) -> None:
    rack = make_rack(tmp_path, {"a": 8, "b": 8})
    filled(rack, "a"), filled(rack, "b")
    rack.close()
    with contextlib.closing(StoppedStore(tmp_path, Files())) as stopped, ThreadPoolExecutor(2) as pool:
        reports = list(Scrub(stopped, Files(), pool).reports())
    assert sum(report.live for report in reports) == 80
    assert not any(report.corrupt or report.superseded for report in reports)
