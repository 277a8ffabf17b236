"""Namespaces as clients meet them: greetings, the namespaces file, and a target process that reads it again."""

import asyncio
import os
import pickle
import random
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from crc32c import crc32c

from benchmarks.store.tenants import CHANGE_MAX, NAMES, Site, Tenants, flood, running
from benchmarks.store.tenants import item as tenant_item
from benchmarks.store.tenants import key as tenant_key
from graphs.services import free_port
from kvstore import credentials
from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import Residency
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.net import tenants, transport, wire
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome, ProtocolError
from tests.commands import run
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon
from tests.kvstore.test_target_process import Process

SECRETS = {name: f"a secret of {name}, long enough" for name in ("a", "b", "c")}
QUOTAS = {"a": 8 * MIB, "b": 8 * MIB}


# ---- nobody sees another's, and nobody's flood is another's loss


def test_random_operations_never_cross(tmp_path: Path, seed: int) -> None:
    result = Tenants(tmp_path, seed).run(2000)
    assert (result.crossed, result.lost_restarts, result.over_quota_bytes) == (0, 0, 0)
    assert result.hits > 400
    assert all(result.evicted.values())


def test_namespaces_on_one_shelf_are_caught(tmp_path: Path, seed: int) -> None:
    """The control: the same operations where a target serves all of them from one place."""
    assert Tenants(tmp_path, seed, mixed=True).run(300).crossed > 100


def test_a_flood_is_nobody_elses_loss(tmp_path: Path, seed: int) -> None:
    result = flood(tmp_path, seed, 400)
    assert result.alone > 0.4
    assert result.change <= CHANGE_MAX
    assert result.flooded_without_quotas < 0.5 * result.alone  # the control


# ---- greetings


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A target of the namespaces a and b, with SECRETS."""
    folder = tmp_path / "site"
    folder.mkdir()
    one = Site(folder, QUOTAS, {name: Credential(SECRETS[name].encode()) for name in QUOTAS})
    yield one
    one.close()


def address(site: Site) -> str:
    (target,) = site.clients["a"]._membership.targets()
    return target


def client(where: str, namespace: str, secret: str | None) -> StoreClient:
    return StoreClient(
        StaticMembership([where]),
        namespace=namespace,
        credential=None if secret is None else Credential(secret.encode()),
    )


def outcome_for(where: str, namespace: str, secret: str | None) -> Outcome:
    store = client(where, namespace, secret)
    (outcome,) = store.put([item(1, 10_000)], soon())
    store.close()
    return outcome


@pytest.mark.parametrize(
    ("namespace", "secret", "outcome"),
    [
        ("a", SECRETS["a"], Outcome.STORED),
        ("b", SECRETS["b"], Outcome.STORED),
        ("a", SECRETS["b"], Outcome.UNREACHABLE),
        ("b", SECRETS["a"], Outcome.UNREACHABLE),
        ("a", None, Outcome.UNREACHABLE),
        ("c", SECRETS["c"], Outcome.UNREACHABLE),
    ],
)
def test_the_credential_decides(site: Site, namespace: str, secret: str | None, outcome: Outcome) -> None:
    assert outcome_for(address(site), namespace, secret) is outcome


def say(stream: Stream, header: Header, control: msgspec.Struct) -> tuple[Op, bytes]:
    stream.send([wire.encode(header, control)], soon())
    answer = stream.receive_header(soon())
    return answer.op, bytes(stream.receive_control(answer, soon()))


def greet(where: str, namespace: str, proof: bytes | None, nonce: bytes = bytes(32)) -> tuple[Op, bytes]:
    """The answer to a greeting; with no proof, to the first frame."""
    stream = transport.connect(where, soon())
    try:
        op, control = say(stream, Header(Op.HELLO), wire.Hello(namespace, "test", "elsewhere", "", nonce))
        if op is Op.CHALLENGE and proof is not None:
            return say(stream, Header(Op.PROVE), wire.Prove(proof))
        return op, control
    finally:
        stream.close()


def test_a_wrong_credential_and_an_unknown_namespace_get_one_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[int] = []
    sign = Credential.sign
    monkeypatch.setattr(Credential, "sign", lambda self, fields: signed.append(len(fields)) or sign(self, fields))
    answers = set()
    for namespace in ("a", "b", "c", "x" * 256, ""):
        for proof in (b"", bytes(32), b"short"):
            for nonce in (bytes(32), b""):
                answers.add(greet(address(site), namespace, proof, nonce))
    assert len(answers) == 1
    assert next(iter(answers))[0] is Op.ERROR
    assert signed == [8] * 30  # the same work for each
    assert site.lobby.refused == 30


def test_a_proof_is_good_once_and_for_one_namespace(site: Site) -> None:
    """A greeting that was heard, sent again; and a proof of one's own namespace for another."""
    credential = Credential(SECRETS["a"].encode())
    heard: list[bytes] = []
    for namespace in ("a", "b"):
        stream = transport.connect(address(site), soon())
        hello = wire.Hello("a", "test", "elsewhere", "", bytes(32))
        _, raw = say(stream, Header(Op.HELLO), msgspec.structs.replace(hello, namespace=namespace))
        challenge = wire.decode_control(raw, wire.Challenge)
        proof = credential.sign(wire.transcript(hello, challenge))
        op, _ = say(stream, Header(Op.PROVE), wire.Prove(proof))
        assert op is (Op.WELCOME if namespace == "a" else Op.ERROR)
        heard.append(proof)
        stream.close()
    assert {greet(address(site), "a", proof)[0] for proof in heard} == {Op.ERROR}


def test_nothing_is_served_before_the_proof(site: Site) -> None:
    for header, control in (
        (Header(Op.GET), wire.Get([key(1)], [1], 100)),
        (Header(Op.STAT), wire.Exists([])),
        (Header(Op.PROVE), wire.Prove(bytes(32))),
    ):
        stream = transport.connect(address(site), soon())
        assert say(stream, header, control)[0] is Op.ERROR
        stream.close()
        stream = transport.connect(address(site), soon())
        assert say(stream, Header(Op.HELLO), wire.Hello("a", "t", "e", "", bytes(32)))[0] is Op.CHALLENGE
        if header.op is not Op.PROVE:
            assert say(stream, header, control)[0] is Op.ERROR
        stream.close()


class Impostor:
    """Listens, and answers greetings without knowing a credential."""

    def __init__(self, *answers: tuple[Op, msgspec.Struct]):
        self._listener = transport.listen("127.0.0.1:0")
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard: list[Op] = []
        self._answers = answers
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        stream = Stream(self._listener.accept()[0])
        for op, control in self._answers:
            header = stream.receive_header(soon())
            stream.receive_control(header, soon())
            self.heard.append(header.op)
            stream.send([wire.encode(Header(op), control)], soon())
        try:
            self.heard.append(stream.receive_header(soon()).op)
        except OSError:
            self.heard.append(Op.ERROR)  # nothing more came


WELCOME = wire.Welcome("127.0.0.1:1", 1, MIB, "")


@pytest.mark.parametrize(
    "answers",
    [
        [(Op.WELCOME, WELCOME)],
        [(Op.CHALLENGE, wire.Challenge(bytes(32))), (Op.WELCOME, WELCOME)],
        [
            (Op.CHALLENGE, wire.Challenge(bytes(32))),
            (Op.WELCOME, msgspec.structs.replace(WELCOME, proof=Credential.random().sign([]))),
        ],
    ],
)
def test_a_client_with_a_credential_believes_no_target_without(answers: list[tuple[Op, msgspec.Struct]]) -> None:
    impostor = Impostor(*answers)
    assert outcome_for(impostor.address, "a", SECRETS["a"]) is Outcome.UNREACHABLE
    eventually(lambda: len(impostor.heard) == len(answers) + 1)
    assert impostor.heard[-1] is Op.ERROR  # no request ever


def test_a_welcome_cannot_be_changed_on_its_way() -> None:
    credential, hello, challenge = Credential.random(), wire.Hello("a", "c", "b"), wire.Challenge(bytes(32))
    proof = credential.sign(wire.transcript(hello, challenge, WELCOME))
    assert credential.signed(proof, wire.transcript(hello, challenge, WELCOME))
    for change in ({"unix_path": "/tmp/evil"}, {"target": "other:1"}, {"epoch": 2}, {"value_bytes_max": 1}):
        changed = msgspec.structs.replace(WELCOME, **change)
        assert not credential.signed(proof, wire.transcript(hello, challenge, changed))
    assert not credential.signed(proof, wire.transcript(hello, challenge))  # nor sent back as a client's


def test_a_client_with_a_credential_does_not_use_a_target_without(start_target: Callable[..., RunningTarget]) -> None:
    target = start_target()
    assert outcome_for(target.address, "default", SECRETS["a"]) is Outcome.UNREACHABLE
    assert outcome_for(target.address, "default", None) is Outcome.STORED  # the control


def test_a_unix_socket_of_another_target_is_not_used(start_target: Callable[..., RunningTarget]) -> None:
    """A path that was taken over: somebody else greets there."""
    one, other = start_target("one", unix=True), start_target("other", unix=True)
    assert outcome_for(one.address, "default", None) is Outcome.STORED
    other.client().put([item(5)], soon())
    path = one.target._unix_path
    Path(path).unlink()
    Path(other.target._unix_path).rename(path)
    store = one.client()
    room = memoryview(bytearray(100_000))
    assert store.get([key(5)], [room], soon()) == [Outcome.MISS]
    assert store.get([key(1)], [room[:10_000]], soon()) == [Outcome.HIT]
    assert bytes(room[:10_000]) == payload(1, 10_000)
    store.close()


def test_connections_are_each_namespaces_own(site: Site) -> None:
    site.lobby.members["a"].target.connections_max = 3
    assert site.clients["b"].put([item(1)], soon()) == [Outcome.STORED]
    kept = [client(address(site), "a", SECRETS["a"]) for _ in range(3)]
    assert all(store.exists([key(1)], soon()) == [Outcome.MISS] for store in kept)
    assert outcome_for(address(site), "a", SECRETS["a"]) is Outcome.UNREACHABLE
    assert outcome_for(address(site), "b", SECRETS["b"]) is Outcome.STORED
    for store in kept:
        store.close()
    eventually(lambda: outcome_for(address(site), "a", SECRETS["a"]) is Outcome.STORED)


def test_connections_that_say_nothing_keep_nobody_out(site: Site) -> None:
    host, port = transport.split_address(address(site))
    idle = [socket.create_connection((host, port)) for _ in range(300)]
    assert outcome_for(address(site), "a", SECRETS["a"]) is Outcome.STORED
    for sock in idle:
        sock.close()


def test_rights(site: Site) -> None:
    target, store = site.lobby.members["a"].target, site.clients["a"]
    room = memoryview(bytearray(100_000))
    assert store.put([item(1)], soon()) == [Outcome.STORED]
    target.writable = False
    assert store.put([item(1), item(2)], soon()) == [Outcome.REFUSED] * 2
    assert store.get([key(1), key(2)], [room, memoryview(bytearray(100_000))], soon()) == [Outcome.HIT, Outcome.MISS]
    target.readable, target.writable = False, True
    assert store.put([item(3)], soon()) == [Outcome.STORED]
    assert store.get([key(1), key(9)], [room, room], soon()) == [Outcome.REFUSED] * 2
    assert store.exists([key(1), key(9)], soon()) == [Outcome.REFUSED] * 2


def test_memory_is_each_namespaces_own(tmp_path: Path) -> None:
    """Hot values, and buffers that clients do not take."""
    with running(tmp_path, QUOTAS | {"c": 8 * MIB}) as site:
        pools = {name: member.target.pool for name, member in site.lobby.members.items()}
        assert len({id(pool.arena) for pool in pools.values()}) == 3


# ---- credentials


def test_a_credential_is_shown_nowhere() -> None:
    credential = Credential(SECRETS["a"].encode())
    for shown in (repr(credential), str(credential), f"{credential}", repr([credential])):
        assert "hidden" in shown
        assert "secret" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(credential)


def test_where_a_clients_credential_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "credential"
    path.write_text(SECRETS["a"] + "\n")
    path.chmod(0o600)
    assert credentials.load(path, {}) == Credential(SECRETS["a"].encode())
    assert credentials.load(None, {"KVTIER_CREDENTIAL": SECRETS["b"]}) == Credential(SECRETS["b"].encode())
    assert credentials.load(path, {"KVTIER_CREDENTIAL": SECRETS["b"]}) == Credential(SECRETS["a"].encode())
    assert credentials.load(None, {}) is None
    path.write_text("tooshort")
    for given in ((path, {}), (None, {"KVTIER_CREDENTIAL": "tooshort"})):
        with pytest.raises(ConfigError, match="expected a secret of 16 to 4096 bytes") as caught:
            credentials.load(*given)
        assert "tooshort" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"credential-file: .* given, expected a file that can be read"):
        credentials.load(tmp_path / "nowhere", {})


# ---- the file


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def names_file(folder: Path, quotas: dict[str, str], **secrets: str) -> Path:
    """A namespaces file with the credentials in files beside it."""
    lines = ["namespaces:"]
    for name, quota in quotas.items():
        (folder / f"{name}.credential").write_text(secrets.get(name, SECRETS[name]) + "\n")
        lines += [f"- name: {name}", f"  credential-file: {name}.credential", f"  quota: {quota}"]
    return write(folder / "namespaces.yaml", "\n".join(lines) + "\n")


def test_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(SECRETS["a"])
    path = write(
        tmp_path / "names.yaml",
        f"""
namespaces:
- {{name: a, credential-file: one, quota: 2TiB}}
- {{name: b, credential-env: B, quota: 1000000, access: read, connections: 7}}
- {{name: c, credential: "{SECRETS["c"]}", quota: 1G}}
""",
    )
    grants = tenants.load(path, {"B": SECRETS["b"]})
    assert grants.quotas == {"a": 2 << 40, "b": 1_000_000, "c": 10**9}
    assert [credential == Credential(SECRETS[name].encode()) for name, (_, credential) in grants.items()] == [True] * 3
    assert (grants["b"][0].access, grants["b"][0].connections, grants["a"][0].access) == ("read", 7, "read-write")
    assert "secret" not in repr(grants)


GOOD = f"quota: 1G, credential: '{SECRETS['a']}'"
ZERO = GOOD.replace("1G", "0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a YAML file with a list of namespaces, under `namespaces:`"),
        ("namespaces: []", "namespaces: '0' given, expected 1 to 256 namespaces"),
        ("namespaces: 7", "expected a YAML file with a list"),
        (f"namespaces: [{{name: a, {GOOD}}}]\nother: 1", "and nothing beside it"),
        (f"namespaces:\n- {{name: a, {GOOD}\n- x", "this is not YAML: see line"),
        ("namespaces: [&secret {a: *secret-secret}]", "this is not YAML: see line 1"),
        ("namespaces: [secret-secret-secret]", "namespaces.0: 'str' given, expected a mapping"),
        (f"namespaces: [{{name: a b, {GOOD}}}]", "namespaces.0.name: 'a b' given, expected 1 to 64 letters"),
        (f"namespaces: [{{name: 7, {GOOD}}}]", "namespaces.0.name: '7' given, expected a text, in quotes"),
        (f"namespaces: [{{{GOOD}}}]", "namespaces.0.name: missing, expected a value"),
        (
            f"namespaces: [{{name: a, {GOOD}}}, {{name: a, {GOOD}}}]",
            "namespaces.1.name: 'a' is a duplicate of namespaces.0.name",
        ),
        (
            "namespaces: [{name: a, credential: 'a secret of a, long'}]",
            "namespaces.0.quota: missing, expected a",
        ),
        (f"namespaces: [{{name: a, {GOOD.replace('1G', 'lots')}}}]", "quota: 'lots' given, expected a size such as"),
        (
            f"namespaces: [{{name: a, {ZERO}}}]",
            "namespaces.0.quota: '0' given, expected more than 0",
        ),
        (
            f"namespaces: [{{name: a, {GOOD}, access: none}}]",
            "namespaces.0.access: 'none' given, expected one of read",
        ),
        (f"namespaces: [{{name: a, {GOOD}, connections: 0}}]", "namespaces.0.connections: '0' given"),
        ("namespaces: [{name: a, quota: 1G}]", "namespaces.0: missing, expected one of credential, credential-file"),
        (
            f"namespaces: [{{name: a, {GOOD}, credential-env: E}}]",
            "namespaces.0: 'credential-env' conflicts with credential, expected one",
        ),
        (f"namespaces: [{{name: a, {GOOD}, kredential: secret}}]", "namespaces.0.kredential: unknown, expected one of"),
        ("namespaces: [{name: a, quota: 1G, credential: secret}]", "namespaces.0.credential: '(hidden)' given"),
        (
            "namespaces: [{name: a, quota: 1G, credential: 123456789012345678}]",
            "'(hidden, int)' given, expected a",
        ),
        ("namespaces: [{name: a, quota: 1G, credential-env: NOWHERE}]", "credential-env: 'NOWHERE' given, expected a"),
        ("namespaces: [{name: a, quota: 1G, credential-file: nowhere}]", "expected a file that can be read (No such"),
        ("namespaces: [{name: a, quota: 1G, credential: !!python/object:os.system x}]", "this is not YAML"),
    ],
)
def test_a_bad_file_is_told_without_secrets(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tenants.load(write(tmp_path / "names.yaml", text), {})
    assert says in str(caught.value)
    assert "secret of a" not in str(caught.value)
    assert "secret-secret" not in str(caught.value)
    assert "123456789012345678" not in str(caught.value)


# ---- a process


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "store").mkdir()
    where = f"127.0.0.1:{free_port()}"
    sizes = ["--capacity", "64MiB", "--segment-size", "1MiB", "--buffers", "64MiB", "--nats", ""]
    return ["--dir", str(tmp_path / "store"), "--listen", where, *sizes]


def held(where: str, name: str, secret: str | None = None) -> set[int]:
    """Which of the first chunks a namespace has; each must be its own."""
    store = client(where, name, secret or SECRETS[name])
    rooms = [memoryview(bytearray(10_000)) for _ in range(20)]
    outcomes = store.get([key(n) for n in range(20)], rooms, soon())
    store.close()
    base = 1000 * (1 + ord(name))
    hits = {n for n, outcome in enumerate(outcomes) if outcome is Outcome.HIT}
    assert all(bytes(rooms[n]) == payload(base + n, 10_000) for n in hits)
    return hits


def put_own(where: str, name: str) -> None:
    base = 1000 * (1 + ord(name))
    store = client(where, name, SECRETS[name])
    items = [item(base + n, 10_000)._replace(key=key(n)) for n in range(20)]
    assert set(store.put(items, soon())) == {Outcome.STORED}
    store.close()


EVERY = set(range(20))


def test_the_file_is_read_again_on_sighup(tmp_path: Path, arguments: list[str]) -> None:
    path = names_file(tmp_path, {"a": "20MiB", "b": "20MiB"})
    port = free_port()
    process = Process(*arguments, "--namespaces", str(path), "--metrics-port", str(port)).ready()
    where = arguments[3]
    put_own(where, "a"), put_own(where, "b")
    assert (held(where, "a"), held(where, "b")) == (EVERY, EVERY)

    names_file(tmp_path, {"a": "10MiB", "c": "30MiB"})
    process.process.send_signal(signal.SIGHUP)
    eventually(lambda: outcome_for(where, "c", SECRETS["c"]) is Outcome.STORED)
    assert outcome_for(where, "b", SECRETS["b"]) is Outcome.UNREACHABLE
    assert held(where, "a") == EVERY
    (status,) = client(where, "a", SECRETS["a"]).stat(soon()).values()
    assert status.capacity_bytes == 10 * MIB

    write(path, "namespaces:\n- {name: a, quota: nonsense, credential: 'another secret of a'}\n")
    process.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert held(where, "a") == EVERY

    fresh = "another secret of a, long enough"
    connected = client(where, "a", SECRETS["a"])
    assert connected.exists([key(1)], soon()) == [Outcome.HIT]
    names_file(tmp_path, {"a": "10MiB", "b": "10MiB", "c": "30MiB"}, a=fresh)
    process.process.send_signal(signal.SIGHUP)
    eventually(lambda: outcome_for(where, "b", SECRETS["b"]) is Outcome.STORED)
    assert held(where, "a", fresh) == EVERY
    assert connected.exists([key(1)], soon()) == [Outcome.UNREACHABLE]  # also who was connected
    assert held(where, "b") == EVERY  # it came back, and nobody had needed the space
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        metrics = answer.read().decode()
    assert 'kvtier_target_capacity_bytes{namespace="a"} 1.048576e+07' in metrics
    assert 'kvtier_target_operations_total{namespace="c",operation="put",outcome="stored"} 1.0' in metrics
    assert metrics.count("# TYPE kvtier_target_get_seconds histogram") == 1
    log = process.end(signal.SIGTERM)
    assert process.process.returncode == 0
    assert "keeping the old namespaces: namespaces.0.quota: 'nonsense' given" in log
    assert "serving the namespaces a, c" in log
    assert "Traceback" not in log
    assert "secret" not in log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_with_a_changed_file(tmp_path: Path, arguments: list[str], number: int) -> None:
    where = arguments[3]
    path = names_file(tmp_path, {"a": "20MiB", "b": "20MiB"})
    process = Process(*arguments, "--namespaces", str(path)).ready()
    put_own(where, "a"), put_own(where, "b")
    process.end(number)
    names_file(tmp_path, {"b": "20MiB", "c": "20MiB"})
    process = Process(*arguments, "--namespaces", str(path)).ready()
    assert (held(where, "b"), held(where, "c")) == (EVERY, set())
    assert outcome_for(where, "a", SECRETS["a"]) is Outcome.UNREACHABLE
    process.end(signal.SIGTERM)


def test_kills_under_load_lose_and_mix_nothing(tmp_path: Path, arguments: list[str], seed: int) -> None:
    """Three namespaces put under equal keys until the target is killed: what was acknowledged is there, and one's own.
    Quotas are small, so that segments are sealed, emptied and reused all the time."""
    where, chance = arguments[3], random.Random(seed)
    path = names_file(tmp_path, dict.fromkeys("abc", "16MiB"))
    counts = dict.fromkeys("abc", 0)
    for _ in range(2):
        process = Process(*arguments, "--namespaces", str(path)).ready()
        acked: dict[str, list[int]] = {name: [] for name in counts}

        def put(name: str, acked: list[int]) -> None:
            store = client(where, name, SECRETS[name])
            while True:
                numbers = range(counts[name], counts[name] + 8)
                items = [item(number, 20_000)._replace(payload=own(name, number)) for number in numbers]
                outcomes = store.put(items, soon())
                if Outcome.UNREACHABLE in outcomes:
                    store.close()
                    return
                counts[name] += len(items)
                acked += [number for number, one in zip(numbers, outcomes, strict=True) if one is Outcome.STORED]

        threads = [threading.Thread(target=put, args=(name, acked[name])) for name in counts]
        for thread in threads:
            thread.start()
        eventually(lambda acked=acked: min(map(len, acked.values())) > 10, 60)
        time.sleep(chance.uniform(0, 1))
        process.end(signal.SIGKILL)
        for thread in threads:
            thread.join()
        again = Process(*arguments, "--namespaces", str(path)).ready()
        for name in counts:
            store = client(where, name, SECRETS[name])
            newest = acked[name][-100:]  # of 500 that fit
            rooms = [memoryview(bytearray(20_000)) for _ in newest]
            assert len(newest) > 10
            assert set(store.get([key(number) for number in newest], rooms, soon())) == {Outcome.HIT}
            assert all(room == own(name, number) for number, room in zip(newest, rooms, strict=True))
            store.close()
        again.end(signal.SIGKILL)


def own(name: str, number: int) -> memoryview:
    return memoryview(payload(1_000_000 * ord(name) + number, 20_000))


def test_a_target_restarted_under_another_namespace_does_not_start(tmp_path: Path, arguments: list[str]) -> None:
    """It served 100 of 100 chunks of the namespace before."""
    process = Process(*arguments, "--namespace", "old").ready()
    where = arguments[3]
    store = StoreClient(StaticMembership([where]), namespace="old")
    assert set(store.put([item(n) for n in range(100)], soon())) == {Outcome.STORED}
    process.end(signal.SIGTERM)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    said = Process(*arguments, "--namespace", "new").refused()
    assert said.count("\n") == 1
    assert "namespace: 'new' given, expected 'old', whose values are in" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    again = Process(*arguments, "--namespace", "old").ready()
    rooms = [memoryview(bytearray(100_000)) for _ in range(100)]
    assert set(store.get([key(n) for n in range(100)], rooms, soon())) == {Outcome.HIT}
    again.end(signal.SIGTERM)


def test_bad_starts_are_told_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    path = names_file(tmp_path, {"a": "60MiB", "b": "20MiB"})
    for more, says in (
        (["--namespaces", str(path)], "the sum of all quotas: '83886080' given, expected at most 67108864"),
        (["--namespaces", str(path), "--namespace", "a"], "namespace: 'a' conflicts with --namespaces"),
        (["--namespaces", str(tmp_path / "no")], "expected a file that can be read (No such file or directory)"),
    ):
        ended = run("kvstore", *arguments, *more)
        assert (ended.code, ended.complained.count("\n")) == (2, 1), ended.complained
        assert says in ended.complained


def test_stat_proves_the_credential(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credential").write_text(SECRETS["a"])
    stat = ["stat", address(site), "--namespace", "a"]
    for more, environ, code in (
        (["--credential-file", str(tmp_path / "credential")], {}, 0),
        ([], {"KVTIER_CREDENTIAL": SECRETS["a"]}, 0),
        ([], {"KVTIER_CREDENTIAL": SECRETS["b"]}, 1),
        ([], {}, 1),
    ):
        with monkeypatch.context() as patched:
            for name, value in environ.items():
                patched.setenv(name, value)
            ended = run("kvstore", *stat, *more)
        said = ended.said + ended.complained
        assert ended.code == code, said
        assert "secret" not in said


async def test_residency_is_announced_under_the_namespace(tmp_path: Path, arguments: list[str], nats_url: str) -> None:
    line = await Bus.connect(nats_url, "test")
    heard: dict[str, set[int]] = {"a": set(), "b": set()}

    def taking(name: str) -> Callable[[Residency], object]:
        async def take(message: Residency) -> None:
            heard[name].update(message.stored)

        return take

    for name in heard:
        await line.subscribe(messages.subject(name, "residency"), Residency, taking(name))
    path = names_file(tmp_path, {"a": "20MiB", "b": "20MiB"})
    process = await asyncio.to_thread(Process(*arguments, "--nats", nats_url, "--namespaces", str(path)).ready)
    for name in heard:
        await asyncio.to_thread(put_own, arguments[3], name)
    async with asyncio.timeout(20):
        while not all(len(hashes) == 20 for hashes in heard.values()):
            await asyncio.sleep(0.05)
    assert all({(one - 1) // 1000 - 1 for one in hashes} == {ord(name)} for name, hashes in heard.items())
    process.end(signal.SIGTERM)
    await line.close()


def test_names_and_keys_of_the_benchmark_differ() -> None:
    assert len({bytes(tenant_item(name, 1).payload) for name in NAMES}) == 3
    assert len({tenant_key(number) for number in range(1000)}) == 1000


def test_wire_bounds() -> None:
    for struct in (wire.Challenge(bytes(33)), wire.Prove(bytes(33)), wire.Hello("a", "b", "c", "", bytes(33))):
        with pytest.raises(ProtocolError):
            wire.decode_control(msgspec.msgpack.encode(struct), type(struct))


# ---- the UNIX socket


class Hijacker:
    """Listens on a target's path; greets as that target, and has every key."""

    def __init__(self, path: str, greets_as: wire.Welcome, *, silent: bool = False):
        Path(path).unlink()
        self._listener = transport.listen(path)
        self._greets_as = greets_as
        self._silent = silent
        self.asked = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            stream = Stream(self._listener.accept()[0])
            header = stream.receive_header(soon())
            stream.receive_control(header, soon())
            if self._silent:
                continue
            stream.send([wire.encode(Header(Op.WELCOME), self._greets_as)], soon())
            try:
                header = stream.receive_header(soon())
            except OSError:
                continue
            self.asked += 1
            value = bytes(100_000)
            answer = Header(Op.VALUE, header.request, Outcome.HIT, 0, crc32c(value), data_bytes=len(value))
            stream.send([wire.encode(answer), value], soon())


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("greeted_before", [False, True])
def test_a_hijacked_unix_path_is_not_believed(
    start_target: Callable[..., RunningTarget], silent: bool, greeted_before: bool
) -> None:
    """It answered for a key that was never put."""
    target = start_target(unix=True)
    store = target.client()
    if greeted_before:
        assert store.put([item(1)], soon()) == [Outcome.STORED]
        for stream in store._line(target.address)._free:
            stream.abort()
    name, epoch, path = target.address, target.log.epoch, target.target._unix_path
    hijacker = Hijacker(path, wire.Welcome(name, epoch, 4 * MIB, "", proof=bytes(32)), silent=silent)
    room = memoryview(bytearray(100_000))
    assert store.get([key(99)], [room], soon()) == [Outcome.MISS]
    assert store.put([item(1)], soon()) == [Outcome.STORED]
    assert store.get([key(1)], [room], soon()) == [Outcome.HIT]
    assert bytes(room) == payload(1)
    assert hijacker.asked == 0
    store.close()


def test_without_a_pass_the_hijacker_would_be_believed(start_target: Callable[..., RunningTarget]) -> None:
    """The control: a target of release 0.1, whose UNIX socket has nothing to prove."""
    target = start_target(unix=True)
    target.target._pass_key = lambda pass_id: b""  # type: ignore[method-assign]
    hijacker = Hijacker(target.target._unix_path, wire.Welcome(target.address, target.log.epoch, 4 * MIB, ""))
    store = target.client()
    assert store.get([key(99)], [memoryview(bytearray(100_000))], soon()) == [Outcome.HIT]
    assert hijacker.asked == 1
    store.close()


def test_a_unix_socket_is_for_its_users(start_target: Callable[..., RunningTarget], tmp_path: Path) -> None:
    other, own = os.getuid() + 1, os.getuid()
    target = start_target(unix=True)
    store = target.client()
    target.target._unix_uids = {other}
    assert store.put([item(1)], soon()) == [Outcome.STORED]  # over TCP
    assert store._line(target.address)._near is None
    store.close()
    target.target._unix_uids = {own}
    store = target.client()
    assert store.put([item(1)], soon()) == [Outcome.STORED]
    assert store._line(target.address)._near is not None
    store.close()


def test_after_a_restart_the_unix_socket_is_used_again(arguments: list[str]) -> None:
    process = Process(*arguments).ready()
    store = StoreClient(StaticMembership([arguments[3]]))
    line = store._line(arguments[3])
    for _ in range(2):
        eventually(lambda: store.put([item(1)], soon()) == [Outcome.STORED])
        assert line._near is not None
        process.end(signal.SIGKILL)
        process = Process(*arguments).ready()
    eventually(lambda: store.exists([key(1)], soon()) == [Outcome.HIT])
    process.end(signal.SIGTERM)
    store.close()
