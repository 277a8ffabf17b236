"""How NATS and etcd are reached: who is let in, what is refused, and that no password is shown."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store.authority import Authority
from graphs.services import free_port
from kvstore.bus.broker import checked_urls, connect_options
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.certificates import Files
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net.etcd import Etcd
from kvstore.net.membership import Registration, open_membership
from kvstore.text import masked, masked_variable
from tests.commands import run
from tests.conftest import start_server, stop_server

PASSWORD = "s3cret-of-the-test"
ROOT = Path(__file__).parents[2]
Nats = Callable[..., str]


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Nats]:
    """Starts a server with such a configuration. Returns its host:port."""
    with ExitStack() as stack:

        def start(configuration: str = "") -> str:
            port = free_port()
            path = tmp_path / f"{port}.conf"
            path.write_text(f"listen: 127.0.0.1:{port}\n{configuration}")
            stack.callback(stop_server, start_server("nats-server", ["--config", str(path)], port))
            return f"127.0.0.1:{port}"

        yield start


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls_block(files: Files, *, verify: bool = False) -> str:
    paths = f"cert_file: '{files.cert}', key_file: '{files.key}', ca_file: '{files.ca}'"
    return f"tls {{ {paths}, verify: {str(verify).lower()} }}"


async def reaches(url: str) -> None:
    line = await Bus.connect(url, "test")
    assert line.connected
    await line.close()


def test_urls() -> None:
    for urls in ("", "nats://a:4222", "tls://a:4222, nats://[::1]:4222", "a:4222", "a"):
        assert checked_urls("nats", urls) == urls


@pytest.mark.parametrize("urls", ["http://a:4222", "nats://a:port", "nats://", "nats://a:4222/path", "nats://a:0"])
def test_what_is_no_url_is_named(urls: str) -> None:
    with pytest.raises(ConfigError, match="expected nats://host:port or tls://host:port"):
        checked_urls("nats", urls)


@pytest.mark.parametrize("url", [f"nats://me:{PASSWORD}@a:4222", f"nats://{PASSWORD}@a", f"b,me:{PASSWORD}@a:4222"])
def test_a_password_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="NATS_AUTH_USERNAME") as error:
        checked_urls("nats", url)
    assert PASSWORD not in str(error.value)


@pytest.mark.parametrize("urls", ["", " , "])
def test_no_url_at_all_is_an_error_where_a_bus_is_needed(urls: str) -> None:
    """nats-py would look for a server for ever, and no other task would get a turn."""
    with pytest.raises(ConfigError, match="expected nats://host:port"):
        connect_options(urls)


async def test_a_server_that_is_gone_is_not_missed_where_there_is_another(nats: Nats) -> None:
    await reaches(f"nats://127.0.0.1:{free_port()},nats://{nats()}")


@pytest.mark.parametrize(
    ("configuration", "environment"),
    [
        (f"user: me, password: {PASSWORD}", {"NATS_AUTH_USERNAME": "me", "NATS_AUTH_PASSWORD": PASSWORD}),
        (f"token: {PASSWORD}", {"NATS_AUTH_TOKEN": PASSWORD}),
        ("users: [{nkey: PUBLIC}]", {"NATS_AUTH_NKEY": "SEED"}),
    ],
)
async def test_nats_lets_in_who_has_the_secret(
    nats: Nats, monkeypatch: pytest.MonkeyPatch, configuration: str, environment: dict[str, str]
) -> None:
    import nkeys

    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    url = "nats://" + nats(f"authorization {{ {configuration.replace('PUBLIC', public)} }}")
    with pytest.raises(UnavailableError, match=r"lets nobody in without other credentials.*see NATS_AUTH_USERNAME"):
        await reaches(url)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("SEED", bytes(seed).decode()))
    await reaches(url)
    other = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("SEED", bytes(other).decode()).replace(PASSWORD, PASSWORD[::-1]))
    with pytest.raises(UnavailableError, match="lets nobody in") as error:
        await reaches(url)
    assert PASSWORD[::-1] not in str(error.value)


async def test_permissions_keep_a_worker_from_speaking_for_a_target(
    nats: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/security.md."""
    page = (ROOT / "docs/security.md").read_text()
    example = page.split("```nats\n")[1].split("```")[0]
    for name in ("TARGET", "WORKER", "ROUTER"):
        example = example.replace(f"${name}_PASSWORD", f"{PASSWORD}-{name}")
    url = f"nats://{nats(example)}"

    async def connected(name: str) -> Bus:
        monkeypatch.setenv("NATS_AUTH_USERNAME", name)
        monkeypatch.setenv("NATS_AUTH_PASSWORD", f"{PASSWORD}-{name.upper()}")
        return await Bus.connect(url, name)

    router, worker, target = await connected("router"), await connected("worker"), await connected("target")
    heard: list[str] = []

    async def hear(report: WorkerReport) -> None:
        heard.append(report.worker)

    for subject in ("kvtier.default.residency.*", "kvtier.default.speed.worker.*"):
        await router.subscribe(subject, WorkerReport, hear)
    await router._client.flush()
    residency, speed = "kvtier.default.residency.t", "kvtier.default.speed.worker.w"
    for line, name in ((worker, "worker"), (target, "target")):
        for subject in (residency, speed):
            await line.publish(subject, report_of(f"{name} to {subject}"))
        await line._client.flush()
    for line, subject in ((worker, speed), (target, residency)):  # what was let through before came before this
        await line.publish(subject, report_of("last"))
    async with asyncio.timeout(20):
        while heard.count("last") < 2:
            await asyncio.sleep(0.02)
    assert sorted(set(heard)) == ["last", f"target to {residency}", f"worker to {speed}"]
    for line in (router, worker, target):
        await line.close()


def report_of(worker: str) -> WorkerReport:
    numbers = {name: 1 for name, kind in WorkerReport.__annotations__.items() if kind in (int, float)}
    return WorkerReport(**{"worker": worker, "endpoint": "a.b.c", **numbers})  # type: ignore[arg-type]


async def test_nats_over_tls(nats: Nats, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, client = authority.issue("server"), authority.issue("client")
    url = f"tls://{nats(tls_block(server, verify=True))}"
    with pytest.raises(UnavailableError, match=r"no TLS with the server.*NATS_TLS_CA_CERT_PATH"):
        await reaches(url)
    monkeypatch.setenv("NATS_TLS_CA_CERT_PATH", client.ca)
    with pytest.raises(UnavailableError):  # it wants a certificate
        await reaches(url)
    monkeypatch.setenv("NATS_TLS_CLIENT_CERT_PATH", client.cert)
    with pytest.raises(ConfigError, match="NATS_TLS_CLIENT_KEY_PATH"):
        await reaches(url)
    monkeypatch.setenv("NATS_TLS_CLIENT_KEY_PATH", client.key)
    await reaches(url)
    await reaches(url.replace("tls://", "nats://"))
    monkeypatch.setenv("NATS_TLS_CA_CERT_PATH", str(Authority(tmp_path, "other").path))
    with pytest.raises(UnavailableError, match="no TLS with the server"):
        await reaches(url)
    monkeypatch.setenv("NATS_TLS_CA_CERT_PATH", client.ca)
    elsewhere = authority.issue("elsewhere", hosts=["10.9.9.9"])
    with pytest.raises(UnavailableError, match="no TLS with the server"):
        await reaches(f"tls://{nats(tls_block(elsewhere))}")


async def test_a_server_without_tls_is_told_nothing_where_tls_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-py would send the password to it."""
    monkeypatch.setenv("NATS_AUTH_USERNAME", "me")
    monkeypatch.setenv("NATS_AUTH_PASSWORD", PASSWORD)
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"auth_required":true}\r\n')
        heard.extend(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(UnavailableError, match="has no TLS: give it certificates, or write nats://"):
        await Bus.connect(f"tls://127.0.0.1:{port}", "test")
    assert not heard
    with contextlib.suppress(UnavailableError):
        await (await Bus.connect(f"nats://127.0.0.1:{port}", "test")).close()
    assert PASSWORD.encode() in heard  # it is what would have been sent
    server.close()


# ---- etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def start(files: Files | None = None, port: int = 0, folder: str = "etcd") -> str:
            scheme = "https" if files else "http"
            port, peers = port or free_port(), free_port()
            arguments = [
                f"--data-dir={tmp_path / folder}",
                f"--listen-client-urls={scheme}://127.0.0.1:{port}",
                f"--advertise-client-urls={scheme}://127.0.0.1:{port}",
                f"--listen-peer-urls=http://127.0.0.1:{peers}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
                f"--initial-cluster=default=http://127.0.0.1:{peers}",
            ]
            if files:
                arguments += [f"--cert-file={files.cert}", f"--key-file={files.key}"]
                arguments += [f"--trusted-ca-file={files.ca}", "--client-cert-auth"]
            stack.callback(stop_server, start_server("etcd", arguments, port))
            return f"127.0.0.1:{port}"

        yield start


def live(servers: str) -> list[str]:
    membership = open_membership(f"etcd://{servers}", "default")
    try:
        return list(membership.targets())
    finally:
        membership.close()


def test_etcd_lets_in_who_has_the_password(etcd: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    servers = etcd()

    def lock(client: Any) -> None:
        from etcd3 import etcdrpc

        auth = etcdrpc.AuthStub(client.channel)
        auth.UserAdd(etcdrpc.AuthUserAddRequest(name="root", password=PASSWORD))
        auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="root", role="root"))
        auth.AuthEnable(etcdrpc.AuthEnableRequest())

    Etcd(servers).call(lock)
    with pytest.raises(UnavailableError, match=r"rejects the credentials.*see ETCD_AUTH_USERNAME"):
        live(servers)
    monkeypatch.setenv("ETCD_AUTH_USERNAME", "root")
    with pytest.raises(ConfigError, match="ETCD_AUTH_PASSWORD"):
        live(servers)
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", PASSWORD + "x")
    with pytest.raises(UnavailableError, match="rejects the credentials") as error:
        live(servers)
    assert PASSWORD not in str(error.value)
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", PASSWORD)
    registration = Registration(servers, "default", "a:1")
    assert live(f"127.0.0.1:{free_port()},{servers}") == ["a:1"]
    # Another server, as far as tokens go, says that it does not know ours: they are fetched anew.
    registration._etcd._client.metadata = (("token", "forgotten"),)
    assert registration._etcd.call(lambda client: list(client.refresh_lease(registration._lease)))[0].TTL > 0
    registration.close()
    assert live(servers) == []


def test_etcd_over_tls(etcd: Callable[..., str], authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, client = etcd(authority.issue("server")), authority.issue("client")
    with pytest.raises(UnavailableError):
        live(servers)
    monkeypatch.setenv("ETCD_AUTH_CA", client.ca)
    monkeypatch.setenv("ETCD_AUTH_CLIENT_CERT", client.cert)
    with pytest.raises(ConfigError, match="ETCD_AUTH_CLIENT_KEY"):
        live(servers)
    monkeypatch.setenv("ETCD_AUTH_CLIENT_KEY", client.key)
    registration = Registration(servers, "default", "a:1")
    assert live(servers) == ["a:1"]
    registration.close()
    with pytest.raises(UnavailableError):  # TLS was asked for, and this one has none
        live(etcd(folder="plain"))


def test_an_etcd_server_that_is_silent_is_passed_over(etcd: Callable[..., str]) -> None:
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        servers = f"127.0.0.1:{silent.getsockname()[1]},{etcd()}"
        registration = Registration(servers, "default", "a:1")
        assert live(servers) == ["a:1"]
        registration.close()


# ---- what is shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"nats://me:{PASSWORD}@a:4222", "nats://***@a:4222"),
        (
            f"no server at http://{PASSWORD}@a/x, nats://u:{PASSWORD}@[::1]:1",
            "no server at http://***@a/x, nats://***@[::1]:1",
        ),
        (f"me:{PASSWORD}@a:4222", "***@a:4222"),
        ("write to me@a.org, or model@v2, at 12:30", "write to me@a.org, or model@v2, at 12:30"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", PASSWORD, "***"),
        ("KVTIER_CREDENTIAL", PASSWORD, "***"),
        ("NATS_AUTH_PASSWORD", PASSWORD, "***"),
        ("NATS_AUTH_CREDENTIALS_FILE", "/run/nats.creds", "/run/nats.creds"),
        ("NATS_SERVER", f"nats://me:{PASSWORD}@a:4222", "nats://***@a:4222"),
        ("HF_TOKEN", "", ""),
    ],
)
def test_secret_variables_are_hidden(name: str, value: str, expected: str) -> None:
    assert masked_variable(name, value) == expected


@pytest.mark.parametrize(
    "command",
    [
        ["kvstore", "--dir", "FOLDER", "--capacity", "1G", "--nats", f"nats://me:{PASSWORD}@127.0.0.1:9"],
        ["kvstore", "--dir", "FOLDER", "--capacity", "1G", "--nats", "", "--etcd", f"me:{PASSWORD}@127.0.0.1:9"],
        ["components.worker", "--model", "m/m", "--store", f"etcd://me:{PASSWORD}@127.0.0.1:9"],
        ["components.worker", "--model", "m/m", "--store", "a:1", "--nats", f"nats://me:{PASSWORD}@127.0.0.1:9"],
        [
            "components.router",
            "--model-name",
            "m",
            "--model-path",
            "m/m",
            "--nats",
            f"tls://{PASSWORD}@127.0.0.1:9",
        ],
        ["graphs.cli", "connector", "--store", f"etcd://me:{PASSWORD}@127.0.0.1:9"],
        ["kvstore", "stat", f"etcd://me:{PASSWORD}@127.0.0.1:9"],
        ["graphs.cli", "top", "--url", f"http://me:{PASSWORD}@127.0.0.1:9"],
        ["graphs.cli", "explain", "--url", f"http://me:{PASSWORD}@127.0.0.1:9"],
    ],
)
def test_no_command_repeats_a_password(command: list[str], tmp_path: Path) -> None:
    ended = run(*[word.replace("FOLDER", str(tmp_path)) for word in command])
    assert ended.code == 2, ended.complained
    assert PASSWORD not in ended.said + ended.complained
    assert list(tmp_path.iterdir()) == []
