"""Seals: what opens is what was sealed, under its key and length, with a key that is in the file; nothing else does."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from components.worker import __main__ as worker
from kvstore import private, seal
from kvstore.errors import ConfigError
from kvstore.net import wire
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome
from kvstore.rarely import Rarely
from kvstore.seal import TRAILER_BYTES, Mode, Reason, Seal, SealFile, SealKey, read_keys
from tests.commands import run
from tests.conftest import RunningTarget, item, key, payload, soon
from tests.kvstore.test_client import LENGTH, Impostor, rooms

MODES = pytest.mark.parametrize("mode", list(Mode))
ONE, TWO = SealKey(1, bytes([1]) * 32), SealKey(2, bytes([2]) * 32)
NAME = ONE.name(key(1))


def sealed(content: bytes, mode: Mode, name: bytes = NAME, by: SealKey = ONE) -> tuple[bytearray, bytearray]:
    stored, trailer = by.seal(name, memoryview(content), mode)
    return bytearray(stored), bytearray(trailer)


def opened(stored: bytearray, trailer: bytes | bytearray, name: bytes = NAME, by: SealKey = ONE) -> Reason | None:
    return by.open(name, memoryview(stored), trailer)


@MODES
@given(content=st.binary(max_size=3000), pieces=st.integers(1, 5000))
def test_what_was_sealed_opens(mode: Mode, content: bytes, pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seal, "_PIECE_BYTES", pieces)
        stored, trailer = sealed(content, mode)
        assert len(trailer) == TRAILER_BYTES
        assert (bytes(stored) == content) or mode is Mode.ENCRYPT
        assert opened(stored, trailer) is None
        assert bytes(stored) == content


@MODES
def test_a_bit_of_content_or_trailer_tells(mode: Mode) -> None:
    stored, trailer = sealed(payload(1, 40), mode)
    expected = {0: Reason.UNSEALED, 4: Reason.FORMAT, 8: Reason.OTHER_KEY}  # by the byte of the trailer
    for number in range(8 * (len(stored) + TRAILER_BYTES)):
        broken = bytearray(bytes(stored) + bytes(trailer))
        broken[number // 8] ^= 1 << number % 8
        reason = opened(broken[: len(stored)], broken[len(stored) :])
        place = number // 8 - len(stored)
        if place in expected:
            assert reason is not None
        else:
            assert reason in (Reason.ALTERED, *expected.values())
    broken = bytearray(trailer)
    broken[6] ^= 1  # zero bytes are bound, too
    assert opened(stored, broken) is Reason.ALTERED


@MODES
def test_another_key_length_or_seal_key_does_not_open(mode: Mode) -> None:
    content = payload(1, 1000)
    stored, trailer = sealed(content, mode)
    assert opened(bytearray(stored), trailer, ONE.name(key(2))) is Reason.ALTERED
    assert opened(stored[:-1], trailer) is Reason.ALTERED
    assert opened(stored + bytes(1), trailer) is Reason.ALTERED
    assert opened(bytearray(stored), trailer, by=TWO) is Reason.OTHER_KEY
    assert opened(bytearray(stored), trailer, by=SealKey(1, bytes([9]) * 32)) is Reason.ALTERED
    assert opened(bytearray(stored), trailer[:-1]) is Reason.LENGTH
    assert opened(bytearray(content), bytes(TRAILER_BYTES)) is Reason.UNSEALED
    other = bytearray(trailer)
    other[5] = 3 - mode  # mac for encrypt, encrypt for mac
    assert opened(bytearray(stored), other) is Reason.ALTERED


def test_encryption_hides_content_and_never_repeats() -> None:
    content = bytes(4096)
    seen = {(bytes(stored), bytes(trailer)) for stored, trailer in (sealed(content, Mode.ENCRYPT) for _ in range(100))}
    assert len({stored for stored, _ in seen}) == len({trailer for _, trailer in seen}) == 100
    assert all(bytes(8) not in stored for stored, _ in seen)


def test_a_secret_is_in_no_repr_and_no_pickle() -> None:
    for shown in (repr(ONE), str(ONE), repr(Seal([ONE, TWO]))):
        assert "1" in shown
        assert ONE._secret.hex() not in shown
        assert repr(ONE._secret) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(ONE)


def test_names_differ_by_seal_key_and_from_those_without() -> None:
    names = {key(1), ONE.name(key(1)), TWO.name(key(1)), SealKey(1, bytes([9]) * 32).name(key(1)), ONE.name(key(2))}
    assert len(names) == 5
    assert {len(name) for name in names} == {16}


# ---- the file

SECRETS = {1: "01" * 32, 2: "02" * 32, 3: "03" * 32}


def write(path: Path, content: object, permissions: int = 0o600) -> Path:
    path.unlink(missing_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(permissions)
    return path


def listed(*ids: int) -> list[dict[str, object]]:
    return [{"id": id, "key": SECRETS[id]} for id in ids]


@pytest.mark.parametrize("content", [listed(2, 1), f"- {{id: 2, key: '{SECRETS[2]}'}}\n- id: 1\n  key: '{SECRETS[1]}'"])
def test_keys_are_read_in_order(tmp_path: Path, content: object) -> None:
    keys = read_keys(write(tmp_path / "keys", content))
    assert [one.id for one in keys] == [2, 1]
    assert keys[1].name(key(1)) == ONE.name(key(1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "a list of 1 to 16 keys"),
        ({"id": 1, "key": SECRETS[1]}, "a list of 1 to 16 keys"),
        (listed(1) * 17, "a list of 1 to 16 keys"),
        (listed(1, 1), "keys: seal-key.2.id: '1' is a duplicate of seal-key.1.id, expected it once"),
        ([{"id": 0, "key": SECRETS[1]}], "a whole number from 1 to 4294967295 as id of key number 1"),
        ([{"id": True, "key": SECRETS[1]}], "a whole number"),
        ([{"id": 1 << 32, "key": SECRETS[1]}], "a whole number"),
        ([*listed(1), {"id": 2, "key": SECRETS[1][:-2]}], "64 hexadecimal digits, quoted, as key number 2"),
        ([{"id": 2, "key": "00" * 32}], "64 hexadecimal digits"),
        ([{"id": 2, "key": int("12" * 32)}], "64 hexadecimal digits"),
        ([{"id": 1, "key": SECRETS[1], "secret": SECRETS[2]}], "only the fields id and key in key number 1"),
        ([SECRETS[1]], "id and key"),
        (f"- id: 1\n  key: '{SECRETS[1]}\n- x", "YAML or JSON"),
        (f"- id: 1\n  {SECRETS[1]}: [\n", "YAML or JSON; line 3"),
        (f"{SECRETS[1]}\x00", "YAML or JSON"),
        ("x" * (64 << 10) + "y", "a regular file of at most 65536 bytes"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_its_secrets(
    tmp_path: Path, content: object, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read_keys(write(tmp_path / "keys", content))
    assert expected in str(refused.value)
    assert not any(secret[:8] in str(refused.value) for secret in SECRETS.values())
    assert refused.value.__context__ is None or refused.value.__suppress_context__


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, permissions: int) -> None:
    path = write(tmp_path / "keys", listed(1), permissions)
    with pytest.raises(ConfigError, match=f"only its owner can read, not with mode {permissions:04o}"):
        read_keys(path)
    path.chmod(0o400)
    assert read_keys(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("owner", "group", "permissions", "is_read"),
    [
        (0, 1000, 0o440, True),  # as Kubernetes mounts a secret in a pod with fsGroup 1000
        (0, 1001, 0o440, False),
        (0, 1000, 0o444, False),
        (0, 1000, 0o460, False),
        (1000, 1000, 0o440, False),
    ],
)
def test_root_may_lend_a_file_to_the_group(
    tmp_path: Path, owner: int, group: int, permissions: int, is_read: bool
) -> None:
    path = write(tmp_path / "keys", listed(1), permissions)
    os.chown(path, owner, group)
    descriptor = os.open(path, os.O_RDONLY)  # the folders above it are root's alone
    if (child := os.fork()) == 0:
        try:
            os.setgroups([1000])
            os.setresuid(1000, 1000, 1000)
            facts = os.fstat(descriptor)
            os._exit(0 if private.is_private(facts) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if is_read else 1)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="a regular file"):
            read_keys(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", listed(1))
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="not of user 12345"):
        read_keys(path)


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(seal, "RELOAD_SECONDS", 0)
    path = write(tmp_path / "keys", listed(1))
    ring = SealFile(path)
    assert [one.id for one in ring.keys] == [1]
    write(path, listed(2, 1))
    assert [one.id for one in ring.keys] == [2, 1]
    for broken in (lambda: write(path, f"oops {SECRETS[3]}"), path.unlink, lambda: write(path, listed(3), 0o644)):
        caplog.clear()
        broken()
        assert [one.id for one in ring.keys] == [one.id for one in ring.keys] == [2, 1]
        assert caplog.text.count("keeping the old seal keys") == 1
        assert SECRETS[3] not in caplog.text
    path.chmod(0o600)
    assert [one.id for one in ring.keys] == [3]


# ---- the client


@pytest.fixture
def connect() -> Callable[..., StoreClient]:
    clients = []

    def connect(target: RunningTarget | Impostor, *keys: SealKey, mode: Mode = Mode.MAC) -> StoreClient:
        client = StoreClient(StaticMembership([target.address]), seal=Seal(keys, mode) if keys else None)
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()


def read(client: StoreClient, count: int, length: int = LENGTH) -> tuple[list[Outcome], list[bytes]]:
    into = rooms(count, length)
    outcomes = client.get([key(n) for n in range(count)], into, soon())
    return outcomes, [bytes(one) for one in into]


@MODES
@pytest.mark.parametrize("unix", [False, True])
def test_sealed_values_come_back(start_target, connect, mode: Mode, unix: bool) -> None:
    target = start_target(unix=unix)
    client = connect(target, ONE, mode=mode)
    assert set(client.put([item(n) for n in range(20)], soon())) == {Outcome.STORED}
    outcomes, values = read(client, 25)
    assert outcomes == [Outcome.HIT] * 20 + [Outcome.MISS] * 5
    assert values[:20] == [payload(n) for n in range(20)]
    assert client.exists([key(n) for n in range(25)], soon()) == outcomes
    assert client.locate([key(1), key(21)], soon()) == [target.address, None]
    held = bytes(target.log.path.joinpath("segment-000000.kvt").read_bytes())
    assert (payload(1)[:64] in held) is (mode is Mode.MAC)


def test_workers_of_other_seals_never_meet(start_target, connect) -> None:
    """Nothing is rejected: they do not even ask for each other's values."""
    target = start_target()
    groups = [connect(target), connect(target, ONE), connect(target, SealKey(1, bytes([9]) * 32))]
    for number, client in enumerate(groups):
        assert read(client, 1)[0] == [Outcome.MISS]
        assert client.exists([key(0)], soon()) == [Outcome.MISS]
        assert client.put([Item(key(0), memoryview(bytes([number]) * LENGTH), 0, 7, 1)], soon()) == [Outcome.STORED]
    for number, client in enumerate(groups):
        assert read(client, 1) == ([Outcome.HIT], [bytes([number]) * LENGTH])
        assert client._seal is None or not client._seal.rejected


def test_keys_rotate(start_target, connect) -> None:
    target = start_target()
    old, before, both, after, new = (
        connect(target, *keys) for keys in ((ONE,), (ONE, TWO), (TWO, ONE), (TWO,), (TWO,))
    )
    old.put([item(0)], soon())
    both.put([item(1)], soon())
    for client in (before, both):
        assert read(client, 3)[0] == [Outcome.HIT, Outcome.HIT, Outcome.MISS]
        assert client.locate([key(0), key(1), key(2)], soon()) == [target.address] * 2 + [None]
        into = rooms(3)
        given = [target.address] * 3
        assert client.get([key(n) for n in range(3)], into, soon(), targets=given).count(Outcome.HIT) == 2
    assert read(old, 2)[0] == [Outcome.HIT, Outcome.MISS]
    assert read(after, 2)[0] == [Outcome.MISS, Outcome.HIT]
    # What the retired key sealed is not in the way: the chunk is stored again.
    assert after.put([item(0)], soon()) == [Outcome.STORED]
    assert read(new, 2) == ([Outcome.HIT] * 2, [payload(0), payload(1)])


def test_the_largest_value_is_less_by_a_trailer(start_target, connect) -> None:
    target = start_target()
    limit = target.log.value_bytes_max
    for client, largest in ((connect(target), limit), (connect(target, ONE), limit - TRAILER_BYTES)):
        client.exists([key(1)], soon())  # greets
        for length, outcome in ((largest + 1, Outcome.REFUSED), (largest, Outcome.STORED)):
            assert client.put([Item(key(1), memoryview(bytes(length)), 0, 7, 1)], soon(10)) == [outcome]
        assert client.get([key(1)], rooms(1, wire.VALUE_BYTES_MAX + 1), soon()) == [Outcome.MISS]


@MODES
def test_a_planted_value_is_corrupt_and_counted(start_target, connect, mode: Mode) -> None:
    """Whoever knows the names can plant; with a right crc, so that the target itself finds nothing."""
    target = start_target()
    honest, stranger = connect(target, ONE, mode=mode), connect(target)
    planted = {
        0: payload(0, LENGTH + TRAILER_BYTES),
        1: payload(1) + b"".join(bytes(part) for part in TWO.seal(ONE.name(key(1)), memoryview(b""), mode)),
        2: b"".join(bytes(part) for part in ONE.seal(ONE.name(key(1)), memoryview(payload(2)), mode)),
        3: b"".join(bytes(part) for part in SealKey(1, bytes([9]) * 32).seal(ONE.name(key(3)), payload(3), mode)),
    }
    items = [Item(ONE.name(key(n)), memoryview(content), 0, 7, 1) for n, content in planted.items()]
    assert set(stranger.put(items, soon())) == {Outcome.STORED}
    assert read(honest, 5)[0] == [Outcome.CORRUPT] * 4 + [Outcome.MISS]
    assert honest._seal.rejected == {Reason.UNSEALED: 1, Reason.OTHER_KEY: 1, Reason.ALTERED: 2}


def test_an_impostor_answers_for_a_key_never_put(connect) -> None:
    """A HIT without a seal; none with one, whatever the crc says."""

    def answer(stream: Stream, header: Header, control: bytes) -> None:
        get = wire.decode_control(control, wire.Get)
        value = random.Random(1).randbytes(get.sizes[0])
        frame = wire.encode(Header(Op.VALUE, header.request, Outcome.HIT, 0, crc32c(value), 0, len(value)))
        stream.send([frame, value], soon())

    impostor = Impostor(answer)
    assert read(connect(impostor), 1)[0] == [Outcome.HIT]
    assert read(connect(impostor, ONE), 1)[0] == [Outcome.CORRUPT]


def test_a_value_without_its_trailer_breaks_the_connection(connect) -> None:
    def answer(stream: Stream, header: Header, control: bytes) -> None:
        value = payload(0)
        frame = wire.encode(Header(Op.VALUE, header.request, Outcome.HIT, 0, crc32c(value), 0, len(value)))
        stream.send([frame, value], soon())

    client = connect(Impostor(answer), ONE)
    assert read(client, 1)[0] == [Outcome.UNREACHABLE]
    assert client._seal.rejected == {Reason.LENGTH: 1}


def test_rejections_are_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    ring = Seal([ONE])
    for _ in range(1000):
        ring.reject("there:1", Reason.ALTERED)
    assert caplog.text.count("there:1: rejected a value, its seal is invalid (altered)") == 1
    assert ring.rejected == {"altered": 1000}
    ring._complains = Rarely(0)  # a while has gone by
    ring.reject("there:1", Reason.UNSEALED)
    assert "altered 1000, unsealed 1" in caplog.text


# ---- a worker's options


def command(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    worker.main(["--model", "owner/model", "--store", "a:1", "--print", *options])
    return capsys.readouterr().out


def test_a_worker_passes_the_path_on_and_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "keys", listed(1))
    said = command(capsys, "--seal-key", str(path), "--seal", "encrypt")
    assert f'"seal_key": "{path}", "seal": "encrypt"' in said
    assert SECRETS[1] not in said
    assert '"seal_key": "", "seal": ""' in command(capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seal-key", "{path}"], "only its owner can read, not with mode 0644 (chmod 600)"),
        (["--seal", "mac"], "seal-key: missing, required by seal mac, expected a file of keys"),
        (["--seal", "other"], "seal: 'other' given, expected"),
        (["--seal-key", "{path}.not"], "a file that can be read (No such file or directory)"),
    ],
)
def test_a_worker_with_a_wrong_seal_is_refused(tmp_path: Path, options: list[str], expected: str) -> None:
    path = write(tmp_path / "keys", listed(1), 0o644)
    given = [option.format(path=path) for option in options]
    ended = run("components.worker", "--model", "owner/model", "--store", "a:1", *given)
    assert ended.code == 2
    assert expected in ended.complained
    assert ended.complained.count("\n") == 1
    assert SECRETS[1] not in ended.complained


def test_off_is_as_without_a_key(tmp_path: Path) -> None:
    assert seal.open_seal(str(tmp_path / "absent"), "off") is None
    assert seal.open_seal("", "") is None
    default = seal.open_seal(str(write(tmp_path / "keys", listed(1))), "")
    assert default is not None
    assert default.mode is Mode.MAC
