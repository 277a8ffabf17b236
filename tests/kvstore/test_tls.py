"""TLS between clients and targets: who gets a connection, what is seen on the way, and certificates that change."""

import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from benchmarks.store.authority import Authority
from benchmarks.store.tenants import Site
from components.worker import __main__ as worker
from graphs.services import free_port
from kvstore import certificates
from kvstore.certificates import Files
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.healthy import is_healthy
from kvstore.net import tls, transport, wire
from kvstore.net.client import StoreClient
from kvstore.net.membership import Registration, StaticMembership, open_membership
from kvstore.net.tls import ClientTls, ServerTls
from kvstore.net.wire import Header, Op, Outcome
from tests.commands import run
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon
from tests.kvstore.test_target_process import Process

PROMPT_SECONDS = 4.0  # what is refused at once is refused within this, on a busy machine
Start = Callable[..., RunningTarget]


class Certificates(NamedTuple):
    """As options: of a target, and of a client. `other` is another authority's, that nobody believes."""

    target: Files
    client: Files
    other: Files
    authority: Authority


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    authority = Authority(tmp_path)
    return Certificates(
        authority.issue("target"), authority.issue("client"), Authority(tmp_path, "other").issue("stranger"), authority
    )


def store(address: str, files: Files | None, **options: object) -> StoreClient:
    client_tls = None if files is None else ClientTls(files)
    return StoreClient(StaticMembership([address]), tls=client_tls, **options)  # type: ignore[arg-type]


def outcome(address: str, files: Files | None, **options: object) -> Outcome:
    client = store(address, files, **options)
    (answer,) = client.put([item(1, 10_000)], soon())
    client.close()
    return answer


def believes(files: Files) -> Files:
    """The same authority, and no certificate."""
    return Files(ca=files.ca)


# ---- what goes over it


class Tap:
    """Passes connections on to a target, and keeps what it sees of both directions."""

    def __init__(self, target: str):
        self.seen = bytearray()
        self._target = target
        self._listener = transport.listen("127.0.0.1:0")
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one = self._listener.accept()[0]
                other = socket.create_connection(transport.split_address(self._target))
                for source, sink in ((one, other), (other, one)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(1 << 16):
                self.seen += received
                sink.sendall(received)
        sink.close()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("encrypted", [True, False])
def test_nothing_is_seen_on_the_way(start_target: Start, made: Certificates, encrypted: bool) -> None:
    running = start_target(tls=ServerTls(made.target) if encrypted else None)
    tap = Tap(running.address)
    client = store(tap.address, made.client if encrypted else None)
    lengths = {1: 1, 2: 16 << 10, 3: 3 * MIB - 7, 4: 200_000}
    assert client.put([item(n, length) for n, length in lengths.items()], soon()) == [Outcome.STORED] * 4
    rooms = [memoryview(bytearray(length)) for length in lengths.values()]
    assert client.get([key(n) for n in lengths], rooms, soon()) == [Outcome.HIT] * 4
    assert [bytes(room) for room in rooms] == [payload(n, length) for n, length in lengths.items()]
    assert client.exists([key(1), key(9)], soon()) == [Outcome.HIT, Outcome.MISS]
    assert client.stat(soon())[tap.address].entries == 4
    client.close()
    tap.close()
    assert len(tap.seen) > 6 * MIB
    opening = wire.MAGIC + bytes([wire.VERSION, Op.HELLO, 0, 0])
    assert (opening in tap.seen, key(3) in tap.seen, payload(3)[:64] in tap.seen) == (not encrypted,) * 3


def test_both_directions_move_at_once(start_target: Start, made: Certificates) -> None:
    """One connection, of which one thread sends puts and gets while another one takes the values."""
    running = start_target(tls=ServerTls(made.target), hot_bytes=8 * MIB)
    client = store(running.address, made.client)
    assert client.put([item(1, MIB)], soon()) == [Outcome.STORED]
    stream = client._line(running.address)._free.pop()
    rounds, sent = 60, payload(2, MIB)
    description = wire.PutItem(key(2), MIB, 0, 1, 7, 1)  # with another checksum: it is read, and not kept

    def ask() -> None:
        for number in range(rounds):
            get = wire.encode(Header(Op.GET, 2 * number), wire.Get([key(1)], [MIB], 10_000))
            put = wire.encode(Header(Op.PUT, 2 * number + 1, data_bytes=MIB), wire.Put([description]))
            stream.send([get, put, sent], soon())

    asking = threading.Thread(target=ask)
    asking.start()
    hits, refused, room = 0, 0, memoryview(bytearray(MIB))
    while hits + refused < 2 * rounds:
        header = stream.receive_header(soon())
        if header.op is Op.VALUE:
            stream.receive(room, soon())
            hits += bytes(room) == payload(1, MIB)
        else:
            answer = wire.decode_control(stream.receive_control(header, soon()), wire.Outcomes)
            refused += answer.outcomes == [Outcome.CORRUPT]
    asking.join()
    assert (hits, refused) == (rounds, rounds)
    stream.close()
    client.close()


def test_a_client_on_the_same_host_goes_on_to_the_unix_socket(start_target: Start, made: Certificates) -> None:
    """Only after the greeting over TLS, which a client that speaks without never gets."""
    running = start_target(unix=True, tls=ServerTls(made.target))
    client = store(running.address, made.client)
    assert client.put([item(1)], soon()) == [Outcome.STORED]
    assert client._line(running.address)._near is not None
    client.close()
    assert outcome(running.address, None) is Outcome.UNREACHABLE


def test_keys_that_are_used_up_are_replaced(
    start_target: Start, made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_target(tls=ServerTls(made.target))
    client = store(running.address, made.client)
    connected: list[str] = []
    connect = ClientTls.connect
    monkeypatch.setattr(ClientTls, "connect", lambda *given: connected.append(given[1]) or connect(*given))
    for limit, connections in ((1 << 24, 1), (4, 4)):
        monkeypatch.setattr(tls, "RECORDS_MAX", limit)
        for _ in range(3):
            assert client.put([item(1)], soon()) == [Outcome.STORED]
        assert len(connected) == connections
    client.close()


# ---- who gets a connection


class Refusal(NamedTuple):
    """What each side is given, and what each one's log says of it. None: no TLS."""

    target: Callable[[Certificates], Files | None]
    client: Callable[[Certificates], Files | None]
    client_says: str
    target_says: str


def mutual(made: Certificates) -> Files:
    return made.target


def one_sided(made: Certificates) -> Files:
    return made.target._replace(ca="")


REFUSALS = {
    "another authority": Refusal(
        one_sided,
        lambda made: believes(made.other),
        "TLS: the target's certificate is not valid for --store-tls-ca: unable to get local issuer certificate",
        "TLS: the client does not accept the certificate of --tls-cert for its --store-tls-ca: tlsv1 alert unknown ca",
    ),
    "another host": Refusal(
        lambda made: made.authority.issue("elsewhere", ["127.0.0.2", "localhost"])._replace(ca=""),
        lambda made: believes(made.client),
        "IP address mismatch, certificate is not valid for '127.0.0.1'",
        "alert bad certificate",
    ),
    "a client without a certificate": Refusal(
        mutual,
        lambda made: believes(made.client),
        "TLS: the target does not accept the certificate of --store-tls-cert for its --tls-client-ca: tlsv13 alert "
        "certificate required",
        "TLS: the client has no certificate: give it --store-tls-cert and --store-tls-key",
    ),
    "a client of another authority": Refusal(
        mutual,
        lambda made: made.other._replace(ca=made.client.ca),
        "for its --tls-client-ca: tlsv1 alert unknown ca",
        "TLS: the client's certificate is not valid for --tls-client-ca: unable to get local issuer certificate",
    ),
    "a client without TLS": Refusal(
        one_sided,
        lambda made: None,
        "the target says: this target requires TLS: give the client --store-tls-ca",
        "this target requires TLS: give the client --store-tls-ca",
    ),
    "a target without TLS": Refusal(
        lambda made: None,
        lambda made: believes(made.client),
        "the target does not use TLS: give it --tls-cert and --tls-key",
        "the client uses TLS, this target does not: give the target --tls-cert and --tls-key",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_who_is_refused_is_told_why(
    start_target: Start, made: Certificates, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    refusal = REFUSALS[name]
    target_files, client_files = refusal.target(made), refusal.client(made)
    running = start_target(tls=None if target_files is None else ServerTls(target_files))
    began = time.monotonic()
    assert outcome(running.address, client_files) is Outcome.UNREACHABLE
    assert time.monotonic() - began < PROMPT_SECONDS
    eventually(lambda: refusal.target_says in caplog.text)
    (said,) = [one.getMessage() for one in caplog.records if one.name == "kvstore.net.client"]
    assert refusal.client_says in said
    assert len([one for one in caplog.records if one.levelno >= logging.WARNING]) == 2
    assert running.target.status().operations == {}
    # The control: with what is right for the same target.
    right = None if target_files is None else made.client
    if name == "another host":
        right = None
        running = start_target("control", tls=None)
    assert outcome(running.address, right) is Outcome.STORED


@pytest.mark.parametrize("whose", ["target", "client"])
def test_an_expired_certificate_is_refused(
    start_target: Start, made: Certificates, caplog: pytest.LogCaptureFixture, whose: str
) -> None:
    """It was valid when it was read."""
    seconds, issued = 5.0, time.monotonic()
    short = made.authority.issue("short", valid=timedelta(seconds=seconds))
    running = start_target(tls=ServerTls(short if whose == "target" else made.target))
    client = store(running.address, made.client if whose == "target" else short)
    assert client.put([item(1)], soon()) == [Outcome.STORED]
    line = client._line(running.address)
    line._drop([line._free.pop()])
    time.sleep(max(0.0, issued + seconds + 0.1 - time.monotonic()))
    assert client.put([item(2)], soon()) == [Outcome.UNREACHABLE]
    eventually(lambda: "certificate has expired" in caplog.text)
    client.close()


def test_who_registers_without_a_certificate_gets_no_connection(
    start_target: Start, made: Certificates, etcd_address: str
) -> None:
    """Targets that etcd names: one has a certificate of the clients' authority, one of another, one none."""
    good, rogue, plain = (
        start_target("good", tls=ServerTls(made.target)),
        start_target("rogue", tls=ServerTls(made.other._replace(ca=""))),
        start_target("plain"),
    )
    registered = [Registration(etcd_address, "tls", one.address) for one in (good, rogue, plain)]
    client = StoreClient(open_membership(f"etcd://{etcd_address}", "tls"), tls=ClientTls(made.client))
    items = [item(number, 1000) for number in range(60)]
    outcomes = client.put(items, soon())
    placed = client.locate([one.key for one in items], soon())
    assert set(outcomes) == {Outcome.STORED, Outcome.UNREACHABLE}
    assert set(placed) == {good.address, None}
    assert not any(one.target.status().operations for one in (rogue, plain))
    client.close()
    for one in registered:
        one.close()


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("registered", ["nonsense", ".host:1", f"{'x' * 64}:1", "nul\0:1"])
def test_an_address_that_is_none_is_unreachable(made: Certificates, registered: str, encrypted: bool) -> None:
    membership = StaticMembership(["127.0.0.1:1"])
    membership._addresses = (registered,)  # as etcd may name it
    client = StoreClient(membership, tls=ClientTls(made.client) if encrypted else None)
    assert client.put([item(1)], soon()) == [Outcome.UNREACHABLE]
    client.close()


# ---- handshakes that are not finished


@pytest.mark.parametrize("answer", [b"", b"\x16\x03\x03\x00\x7a\x02\x00\x00"])  # nothing; the start of a ServerHello
def test_a_handshake_that_is_not_answered_ends_by_the_deadline(made: Certificates, answer: bytes) -> None:
    with transport.listen("127.0.0.1:0") as listener:
        client = store(f"127.0.0.1:{listener.getsockname()[1]}", made.client)
        outcomes: list[Outcome] = []
        room, began = memoryview(bytearray(100)), time.monotonic()
        calling = threading.Thread(target=lambda: outcomes.extend(client.get([key(1)], [room], began + 0.3)))
        calling.start()
        with listener.accept()[0] as sock:
            sock.sendall(answer)
            calling.join(PROMPT_SECONDS)
        assert outcomes == [Outcome.LATE]
        client.close()


def test_closing_a_client_ends_its_handshake(made: Certificates) -> None:
    with transport.listen("127.0.0.1:0") as listener:
        client = store(f"127.0.0.1:{listener.getsockname()[1]}", made.client)
        outcomes: list[Outcome] = []
        calling = threading.Thread(target=lambda: outcomes.extend(client.put([item(1)], soon(60))))
        calling.start()
        with listener.accept()[0] as sock:
            assert sock.recv(1) == b"\x16"
            client.close()
            calling.join(PROMPT_SECONDS)
        assert outcomes == [Outcome.UNREACHABLE]


@pytest.fixture(params=["target", "lobby"])
def serving(
    request: pytest.FixtureRequest, start_target: Start, made: Certificates, tmp_path: Path
) -> Iterator[tuple[ServerTls, str, dict[str, object]]]:
    """TLS, the address that it is served at, and what a client has to know."""
    server = ServerTls(made.target)
    if request.param == "target":
        yield server, start_target(tls=server, connections_max=4).address, {}
        return
    folder, credential = tmp_path / "site", Credential.random()
    folder.mkdir()
    site = Site(folder, {"a": 16 * MIB}, {"a": credential})
    site.lobby._tls = server
    (address,) = site.clients["a"]._membership.targets()
    yield server, address, {"namespace": "a", "credential": credential}
    site.close()


def test_a_flood_of_handshakes_keeps_nobody_out(
    serving: tuple[ServerTls, str, dict[str, object]], made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address, options = serving
    monkeypatch.setattr(tls, "HANDSHAKES_MAX", 8)
    silent = []
    for number in range(40):
        sock = socket.create_connection(transport.split_address(address))
        sock.sendall(b"\x16\x03\x01\x02\x00"[: number % 6])
        silent.append(sock)
        if number % 10 == 9:
            assert outcome(address, made.client, **options) is Outcome.STORED
    assert 0 < len(server._shaking) <= 8
    eventually(lambda: sum(thread.name == "kvtier-tls" for thread in threading.enumerate()) <= 8)
    for sock in silent:
        sock.close()
    eventually(lambda: not server._shaking)


def test_a_client_that_drips_is_closed_in_time(
    start_target: Start, made: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.5)
    running = start_target(tls=ServerTls(made.target))
    began = time.monotonic()
    with socket.create_connection(transport.split_address(running.address)) as sock, contextlib.suppress(OSError):
        sock.sendall(b"\x16\x03\x01\x40\x00")
        while time.monotonic() < began + 10:
            sock.sendall(b"\x01")
            time.sleep(0.05)
    assert 0.4 < time.monotonic() - began < PROMPT_SECONDS
    assert "closing a connection: TLS: no handshake within 0.5 s" in caplog.text


def test_a_probe_is_no_refusal(start_target: Start, made: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    server = ServerTls(made.target)
    running = start_target(tls=server)
    assert is_healthy(running.address)
    assert outcome(running.address, made.client) is Outcome.STORED
    eventually(lambda: not server._shaking)
    assert (server.refused, caplog.text) == (0, "")


# ---- certificates that change


def copy(source: str, target: str) -> None:
    """Replaces the file by another one, as a rotation does."""
    beside = Path(target + ".new")
    beside.touch(0o600)
    beside.write_bytes(Path(source).read_bytes())
    beside.replace(target)


def served_certificate(address: str) -> str:
    return ssl.get_server_certificate(transport.split_address(address))


def test_a_target_takes_new_certificates_under_traffic(tmp_path: Path, made: Certificates) -> None:
    """On SIGHUP. Connections stay, and gets go on; a file that makes no sense changes nothing."""
    folder = tmp_path / "store"
    folder.mkdir()
    process = Process(
        *("--dir", str(folder), "--capacity", "64MiB", "--segment-size", "4MiB", "--nats", "", "--unix-socket", ""),
        *("--listen", f"127.0.0.1:{(port := free_port())}", "--tls-cert", made.target.cert, "--tls-key"),
        *(made.target.key, "--metrics-port", str(metrics_port := free_port()), "--buffers", "32MiB"),
    ).ready()
    address = f"127.0.0.1:{port}"
    first = served_certificate(address)
    clients = [store(address, believes(made.client)) for _ in range(2)]
    assert clients[0].put([item(1)], soon()) == [Outcome.STORED]
    outcomes: set[Outcome] = set()
    rounds, stopping = [0], threading.Event()

    def read() -> None:
        """One client keeps its connection, the other one takes a new one each time."""
        room = memoryview(bytearray(100_000))
        while not stopping.is_set():
            for client in clients:
                outcomes.update(client.get([key(1)], [room], soon()))
            line = clients[1]._line(address)
            line._drop([line._free.pop()])
            rounds[0] += 1

    def turn(certificate: Callable[[str], bool]) -> None:
        before = rounds[0]
        process.process.send_signal(signal.SIGHUP)
        eventually(lambda: rounds[0] > before + 20 and certificate(served_certificate(address)))

    reading = threading.Thread(target=read)
    reading.start()
    kept = clients[0]._line(address)
    eventually(lambda: rounds[0] > 5)
    try:
        copy(made.authority.issue("again").cert, made.target.cert)  # whose key is not there yet
        turn(lambda served: served == first)
        copy(str(tmp_path / "again.key"), made.target.key)
        turn(lambda served: served == Path(made.target.cert).read_text() != first)
        second = served_certificate(address)
        Path(made.target.key).write_text("nonsense")
        turn(lambda served: served == second)
    finally:
        stopping.set()
        reading.join()
    assert outcomes == {Outcome.HIT}
    assert len(kept._free) == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
        assert "kvtier_target_certificate_expiry_timestamp_seconds 1." in answer.read().decode()
    for client in clients:
        client.close()
    said = process.end(signal.SIGTERM)
    assert process.process.returncode == 0
    assert said.count("keeping the old TLS certificates: tls-key: ") == 2
    assert "expected the private key of the first certificate in" in said
    assert said.count("TLS: certificate") == 2


def test_a_client_takes_new_certificates_without_a_restart(
    start_target: Start, made: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "RELOAD_SECONDS", 0.0)
    running = start_target(tls=ServerTls(made.target))
    stranger = made.other._replace(ca=made.client.ca)
    client = store(running.address, stranger)
    assert client.put([item(1)], soon()) == [Outcome.UNREACHABLE]
    copy(made.client.cert, stranger.cert)  # whose key is not there yet
    eventually(lambda: client.put([item(1)], soon()) and "keeping the old TLS certificates" in caplog.text)
    copy(made.client.key, stranger.key)
    eventually(lambda: client.put([item(1)], soon()) == [Outcome.STORED])
    client.close()


# ---- options


@pytest.mark.parametrize("names", [certificates.SERVER, certificates.CLIENT], ids=["target", "client"])
def test_wrong_files_are_named(made: Certificates, tmp_path: Path, names: certificates.Names) -> None:
    cert, key, ca = made.target
    readable, locked, absent = tmp_path / "readable.key", tmp_path / "locked.key", str(tmp_path / "absent")
    readable.write_text(Path(key).read_text())
    readable.chmod(0o644)
    ended = made.authority.issue("ended", valid=timedelta(seconds=-60))
    locked.touch(0o600)
    encrypted = load_pem_private_key(Path(key).read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
    )
    locked.write_bytes(encrypted)
    for files, name, expected in (
        (Files(cert, str(readable), ca), names.key, "a file that only its owner can read, not with mode 0644"),
        (Files(cert, "", ca), names.key, ", required by --"),
        (Files("", key, ca), names.cert, ", required by --"),
        (Files(cert, made.client.key, ca), names.key, f"the private key of the first certificate in {cert}"),
        (Files(cert, str(locked), ca), names.key, "a private key in PEM, without a passphrase"),
        (Files(cert, ended.key, key), names.ca, "certificates in PEM"),
        (Files(absent, key, ca), names.cert, "a file that can be read (No such file or directory)"),
        (Files(ended.cert, ended.key, ca), names.cert, "a certificate that is valid now, not from"),
    ):
        with pytest.raises(ConfigError) as raised:
            (tls.open_server if names is certificates.SERVER else tls.open_client)(files)
        assert str(raised.value).startswith(f"{name}: ")
        assert expected in str(raised.value)
        assert "PRIVATE" not in str(raised.value)
    assert tls.open_server(Files()) is tls.open_client(Files()) is None


def test_a_target_with_a_wrong_file_changes_nothing(made: Certificates, tmp_path: Path) -> None:
    options = ["--dir", str(tmp_path / "store"), "--capacity", "64MiB", "--nats", "", "--tls-cert", made.target.cert]
    ended = run("kvstore", *options)
    said = "kvstore: error: tls-key: missing, required by --tls-cert, expected a file\n"
    assert (ended.code, ended.complained) == (2, said)
    assert not (tmp_path / "store").exists()


def test_no_carrier_goes_around_it(made: Certificates) -> None:
    expected = "carrier: 'nixl' conflicts with --{}, expected one of the two: a carrier moves values without TLS"
    for opened, option in ((tls.open_server, "tls-cert"), (tls.open_client, "store-tls-ca")):
        with pytest.raises(ConfigError, match=expected.format(option)):
            opened(made.target, "nixl")
        assert opened(Files(), "nixl") is None


def test_stat_says_why_a_target_does_not_answer(start_target: Start, made: Certificates) -> None:
    running = start_target(tls=ServerTls(made.target))
    given = ["--store-tls-ca", made.client.ca, "--store-tls-cert", made.client.cert, "--store-tls-key", made.client.key]
    for options, code, expected in (
        (given, 0, "1"),
        ([], 1, "this target requires TLS: give the client --store-tls-ca"),
        (given[:2], 1, "the target does not accept the certificate of --store-tls-cert"),
    ):
        ended = run("kvstore", "stat", running.address, *options)
        assert ended.code == code, ended.complained
        assert expected in " ".join(ended.said.split())


def test_a_worker_passes_the_paths_on(made: Certificates, capsys: pytest.CaptureFixture[str]) -> None:
    ca, cert, key = made.client.ca, made.client.cert, made.client.key
    given = ["--store-tls-ca", ca, "--store-tls-cert", cert, "--store-tls-key", key]
    worker.main(["--model", "owner/model", "--store", "a:1", "--print", *given])
    assert f'"store_tls_ca": "{ca}", "store_tls_cert": "{cert}", "store_tls_key": "{key}"' in capsys.readouterr().out
