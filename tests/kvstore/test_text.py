"""Names that somebody else chose do nothing to a log or a terminal, whoever shows them."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from aiohttp import web

from components.router.speeds import LiveSpeeds
from components.router.view import explain
from graphs import top
from graphs.services import free_port
from kvstore.bus.messages import Residency, TargetReport
from kvstore.bus.residency import Mirror
from kvstore.errors import ConfigError, FailedError, UnavailableError
from kvstore.net import wire
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op
from kvstore.seal import Mode, Reason, Seal, SealKey
from kvstore.text import clean, is_plain, shown
from tests.commands import run
from tests.conftest import RunningTarget, key, soon
from tests.router.test_page import SPEEDS, decided, feed_of

ESCAPES = "\x1b]0;title\x07\x1b[31mred\r\nINFO forged: line\u2028\u202etxt\u200b\x9b2J\x00\x7f"


def is_harmless(text: str) -> bool:
    return all(one.isprintable() or one == "\n" for one in text) and "\nINFO forged" not in text


def test_what_is_not_printable_is_escaped_and_what_is_long_is_cut() -> None:
    assert is_harmless(shown(ESCAPES))
    assert shown("10.0.0.1:7600 größer") == "10.0.0.1:7600 größer"
    assert shown("a\tb\n\ud800") == "a\\tb\\n\\ud800"
    assert shown("x" * 1000, 10) == "x" * 10 + "... (1000 characters)"
    assert clean({ESCAPES: [ESCAPES, 1, None, {"a": (ESCAPES,)}]}) == {
        shown(ESCAPES): [shown(ESCAPES), 1, None, {"a": [shown(ESCAPES)]}]
    }
    assert is_plain("10.0.0.1:7600", 20)
    assert not any(is_plain(name, 20) for name in ("", "x" * 21, ESCAPES, "größer", "a\n"))


@pytest.fixture
def hostile_target() -> Iterator[str]:
    """Greets with escapes, answers STAT with them, and everything else with an error full of them."""
    listener = socket.create_server(("127.0.0.1", 0))
    status = wire.Status(ESCAPES, *[1] * 6, 1.0, *[1] * 14, {ESCAPES: {ESCAPES: 1}, "get": {"hit": 1, ESCAPES: 2}})
    answers = {
        Op.HELLO: (
            Op.WELCOME,
            wire.Welcome(ESCAPES, 1, wire.VALUE_BYTES_MAX, f"/tmp/{ESCAPES[:40].replace(chr(0), '')}"),
        ),
        Op.STAT: (Op.STATUS, status),
    }

    def serve(stream: Stream) -> None:
        with contextlib.closing(stream), contextlib.suppress(OSError):
            while stream.wait_for_frame():
                header = stream.receive_header(soon())
                stream.receive_control(header, soon())
                op, message = answers.get(header.op, (Op.ERROR, wire.Failure(ESCAPES)))
                stream.send([wire.encode(Header(op, header.request), message)], soon())

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(Stream(listener.accept()[0]),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_a_client_logs_nothing_of_what_a_target_makes_it_say(
    hostile_target: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = StoreClient(StaticMembership([hostile_target]), connections_per_target=1)
    client.get([key(1)], [memoryview(bytearray(10))], soon(5))
    client.close()
    Seal([SealKey(1, bytes(32))], Mode.MAC).reject(ESCAPES, Reason.ALTERED)
    said = [record.getMessage() for record in caplog.records]
    assert any("red" in line for line in said)
    assert all(is_harmless(line) and "\n" not in line for line in said)


def test_stat_and_an_error_print_nothing_of_it(hostile_target: str) -> None:
    for command in (["stat", hostile_target], ["stat", hostile_target, "--json"], ["stat", ESCAPES.replace("\0", "")]):
        ended = run("kvstore", *command)
        assert is_harmless(ended.said + ended.complained), command
        assert ended.said or ended.code == 2


def test_a_target_logs_nothing_of_what_its_clients_send(start_target: object, caplog: pytest.LogCaptureFixture) -> None:
    target: RunningTarget = start_target()  # type: ignore[operator]
    host, port = target.address.split(":")
    for hello in (wire.Hello(ESCAPES, ESCAPES, ESCAPES), wire.Failure(ESCAPES)):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(wire.encode(Header(Op.HELLO), hello))
            sock.recv(1 << 16)
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall((ESCAPES * 10).encode())
        sock.recv(1 << 16)
    assert caplog.records
    assert all(is_harmless(record.getMessage()) for record in caplog.records)


def test_a_router_takes_no_names_but_plain_ones() -> None:
    mirror, speeds = Mirror(), LiveSpeeds(SPEEDS)
    mirror.apply(Residency(ESCAPES, 1, 1, 0, 0, [], [], 0), 0.0)
    assert not speeds.heard_target(TargetReport(ESCAPES, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0), 0.0)
    assert (mirror.ages(0.0), speeds.targets(0.0)) == ({}, {})
    assert (mirror.ignored["invalid_name"], speeds.ignored["invalid_name"]) == (1, 1)


async def test_top_and_explain_print_nothing_of_what_a_router_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The router's own answers, with every text in them made hostile."""
    from components.router.decisions import Decisions

    decisions = Decisions(16)
    decided(decisions, "d1")
    feed = feed_of(decisions)
    mirrored = msgspec.to_builtins(feed.state) | {"model": ESCAPES, "outcomes": {ESCAPES: 1}}
    lane = {"target": "127.0.0.1:1", "heard_seconds": 1.0, "chunks": 1}
    mirrored |= {"alarms": [{"id": ESCAPES, "level": "bad", "text": ESCAPES}], "targets": [lane]}
    decision = msgspec.to_builtins(decisions.history.find("d1")) | {
        "id": ESCAPES,
        "outcome": ESCAPES,
        "targets": [[ESCAPES, 1]],
    }
    row = {"id": ESCAPES, "worker": ESCAPES, "outcome": ESCAPES}

    from components.router.view.feed import Viewer

    update = msgspec.to_builtins(Viewer(feed).update())
    update |= {"state": mirrored, "decisions": [one | row for one in update["decisions"]]}

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/events":
            return web.Response(text=f"data: {json.dumps(update)}\n\n", content_type="text/event-stream")
        if request.path == "/decisions/gone":
            return web.Response(status=404, text=ESCAPES)
        return web.json_response(decision if request.path == "/decisions/d1" else [decision])

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    url = f"http://127.0.0.1:{port}"
    try:
        for command in (["d1", "--url", url], ["--url", url]):
            await asyncio.to_thread(explain.main, command)
        with pytest.raises(Exception, match="decision") as caught:
            await asyncio.to_thread(explain.main, ["gone", "--url", url])
        await asyncio.to_thread(top.main, ["--once", "--every", "0.5", "--url", url])
    finally:
        await runner.cleanup()
    printed = capsys.readouterr().out
    assert "red" in printed
    assert is_harmless(printed + str(caught.value))


def test_an_error_is_one_line_and_last_words_keep_theirs() -> None:
    said = f"it says:\n  {ESCAPES}"
    assert "\n" not in str(UnavailableError(said)) + str(ConfigError("name", "a", said))
    lines = str(FailedError("it says, at its end:\n  one\n  two \x1b[31m")).splitlines()
    assert lines == ["it says, at its end:", "  one", "  two \\x1b[31m"]
    assert is_harmless(str(UnavailableError(said)) + str(ConfigError("name", "a", said)))
