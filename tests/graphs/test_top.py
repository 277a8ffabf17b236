"""`kvtier top` against a router's page and a target: as text, driven by keys, and in a pseudo-terminal of 80 x 24."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from textual.widgets import DataTable, Static

from components.pricing.cost import Speeds
from components.router.decisions import Decisions
from components.router.speeds import LiveSpeeds
from components.router.view import explain
from components.router.view.access import page_access
from components.router.view.feed import Feed
from components.router.view.page import open_page
from components.router.workers import Workers
from graphs import hit
from graphs.observer import Frame, Observer, Options
from graphs.services import free_port
from graphs.top import as_text, main
from graphs.top_app import Detail, TopApp
from kvstore.bus.messages import Residency
from kvstore.bus.residency import Mirror
from kvstore.errors import ConfigError
from tests import commands
from tests.conftest import item, soon
from tests.router.test_page import decided

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "graphs.cli", "top"]
LINES, COLUMNS = 24, 80
SPEEDS = Speeds(0.04, 1e-4, 0.0, 25e9, 10e9, 0.002)


class Cluster:
    """A router's page without a router, two workers that it knows, and a real target."""

    def __init__(self, target: str):
        self.decisions = Decisions(16)
        self.target = target
        mirror, workers = Mirror(), Workers("dynamo.backend.generate")
        mirror.apply(Residency(target, 1, 1, 7, 1, [], [], 0), time.monotonic())
        card = {"kv_cache_block_size": 16, "display_name": "tiny", "runtime_config": {"total_kv_blocks": 100}}
        workers.set_cards({str(worker): json.dumps(card) for worker in (1, 26)})
        self.feed = Feed(self.decisions, workers, LiveSpeeds(SPEEDS), mirror, model="tiny")
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.address}"

    def decide(self, *names: str) -> None:
        for name in names:
            decided(self.decisions, name)
        self.feed.tick()


@pytest_asyncio.fixture
async def cluster(start_target: Any) -> AsyncIterator[Cluster]:
    target = start_target()
    client = target.client()
    await asyncio.to_thread(client.put, [item(1)], soon())
    client.close()
    one = Cluster(target.address)
    runner = await open_page(page_access(one.address), one.feed)
    yield one
    await runner.cleanup()


async def run(*arguments: str) -> tuple[int, str, str]:
    ended = await asyncio.to_thread(commands.run, "graphs.top", *arguments)
    return ended.code, ended.said, ended.complained


async def test_one_frame_as_text(cluster: Cluster) -> None:
    cluster.decide("d1", "d2")
    code, shown, errors = await run("--url", cluster.url, "--once", "--every", "0.5")
    assert (code, errors) == (0, "")
    tokens = cluster.feed.state.tokens
    share = tokens["store"] / sum(tokens.values())
    assert f"▒ store {share:.0%}" in shown
    workers, targets, decisions = shown.split("\n\n")[1:]
    assert [line.split()[0] for line in workers.splitlines()] == ["worker", "1", "1a"]
    row = dict(zip(targets.splitlines()[0].split(), targets.splitlines()[1].split("  "), strict=False))
    assert row["target"].strip() == cluster.target
    assert [line.split()[0] for line in decisions.splitlines()] == ["decision", "d2", "d1"]
    assert all(len(line) <= COLUMNS for line in shown.splitlines() if not line.startswith("!"))


async def test_without_a_router_targets_are_still_looked_at(cluster: Cluster) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, shown, _ = await run("--url", nowhere, "--store", f"{cluster.target},127.0.0.1:9", "--once", "--every", "0.5")
    assert code == 0
    assert f"! no router answers at {nowhere}" in shown
    assert "! Target 127.0.0.1:9 does not answer from here: connection refused." in shown
    assert cluster.target in shown.split("\n\n")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--every", "0"], "every: '0' given, expected at least 0.5"),
        (["--store", "nonsense"], "store: 'nonsense' given, expected host:port"),
        (["--url", "127.0.0.1:8300"], "url: '127.0.0.1:8300' given, expected a URL such as"),
        (["--url", "http://127.0.0.1:abc"], "url: 'http://127.0.0.1:abc' given, expected a URL such as"),
    ],
)
def test_bad_input_is_told(arguments: list[str], says: str) -> None:
    for command in (main, explain.main, hit.main) if "--url" in arguments else (main,):
        with pytest.raises(ConfigError, match=says):
            command(arguments)


async def test_with_nobody_there_or_no_terminal_it_ends_with_a_line() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for arguments, says in (
        (["--url", nowhere, "--once", "--every", "0.5"], f"router: no router answers at {nowhere}"),
        ([], "once: missing, expected --once where there is no terminal"),
    ):
        code, _, errors = await run(*arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert says in errors


async def test_a_router_that_comes_back_is_seen_again(cluster: Cluster) -> None:
    cluster.decide("d1")
    address = f"127.0.0.1:{free_port()}"

    async with Observer(Options(url=f"http://{address}")) as observer:

        async def until(seen: Callable[[Frame], object]) -> Frame:
            async with asyncio.timeout(20):
                while not seen(frame := await observer.look()):
                    await asyncio.sleep(0.05)
            return frame

        assert (await observer.look()).state is None
        for _ in range(2):
            runner = await open_page(page_access(address), cluster.feed)
            frame = await until(lambda frame: not frame.trouble)
            assert [one.id for one in frame.decisions] == ["d1"]
            await runner.cleanup()
            frame = await until(lambda frame: frame.trouble)
            assert "d1" in as_text(frame)  # what was seen last


async def test_keys(cluster: Cluster) -> None:
    cluster.decide("d1", "d2", "d3")
    app = TopApp(Options(url=cluster.url, every=0.5))
    async with app.run_test(size=(COLUMNS, LINES)) as pilot:
        table = app.query_one("#decisions", DataTable)

        async def until(condition: Callable[[], object]) -> None:
            async with asyncio.timeout(20):
                while not condition():
                    await pilot.pause(0.05)

        def head() -> str:
            return str(app.query_one("#head", Static).render())

        def under_cursor() -> str | None:
            return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

        await until(lambda: table.row_count == 3)
        assert under_cursor() == "d3"
        await pilot.press("down")
        cluster.decide("d4")
        await until(lambda: table.row_count == 4)
        assert under_cursor() == "d2"  # the cursor stays with its decision
        await pilot.press("enter")
        await until(lambda: isinstance(app.screen, Detail))
        detail = str(app.screen.query_one(Static).render())
        assert "d2: 2200 tokens -> worker 1" in detail
        assert "t:1 100, t:2 37" in detail
        cluster.decide("d5")
        await until(lambda: table.row_count == 5)  # below
        await pilot.press("escape")
        await pilot.press("p")
        assert "[paused]" in head()
        cluster.decide("d6")
        await pilot.press("minus")
        assert table.row_count == 5
        await pilot.press("p")
        assert "[every 1 s]" in head()
        await until(lambda: table.row_count == 6)
        await pilot.press("plus", "plus", "plus")
        assert "[every 0.5 s]" in head()
        assert table.size.height >= 4
        await pilot.press("q")
    assert app.return_code == 0


class Screen:
    """What a terminal shows of the program's output: text goes where the cursor is, which CSI row;column H moves."""

    _PIECE = re.compile(r"\x1b\[(\d*);?(\d*)H|\x1b\[[0-9;?<>=$]*[a-zA-Z]|\x1b\][^\x07]*\x07|(\r)|(\n)|([^\x1b\r\n])")

    def __init__(self) -> None:
        self._cells = [[" "] * COLUMNS for _ in range(LINES)]
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        for match in self._PIECE.finditer(text):
            row, column, back, down, shown = match.groups()
            if row is not None:
                self._row, self._column = int(row or 1) - 1, int(column or 1) - 1
            elif back:
                self._column = 0
            elif down:
                self._row += 1
            elif shown and self._row < LINES and self._column < COLUMNS:
                self._cells[self._row][self._column] = shown
                self._column += 1

    @property
    def lines(self) -> list[str]:
        return ["".join(cells).rstrip() for cells in self._cells]


async def test_in_a_terminal_of_80_by_24(cluster: Cluster) -> None:
    cluster.decide(*(f"decision{number:02}" for number in range(20)))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "--url", cluster.url, "--every", "0.5"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    output = b""

    def read_until(*texts: str) -> list[str]:
        """The screen's lines, as soon as the texts are on it."""
        nonlocal output
        deadline = time.monotonic() + 30
        while True:
            screen = Screen()
            screen.feed(output.decode(errors="ignore"))
            if all(text in "\n".join(screen.lines) for text in texts):
                return screen.lines
            assert time.monotonic() < deadline, "\n".join(screen.lines)
            if select.select([master], [], [], 0.5)[0]:
                output += os.read(master, 1 << 16)

    try:
        lines = await asyncio.to_thread(read_until, "decision19", "q Quit")
        assert lines[0].startswith("tiny: ")
        assert "  █ hbm" in lines[2]
        text = "\n".join(lines)
        assert text.index(" worker ") < text.index(" target ") < text.index(" decision ")
        assert f" {cluster.target} " in text
        assert sum("decision" in line for line in lines) > 4
        assert "q Quit" in lines[-1]
        os.write(master, b"p")
        await asyncio.to_thread(read_until, "[paused]")
        os.write(master, b"\x1b[B\r")
        lines = await asyncio.to_thread(read_until, "= price")
        assert any("decision18: 2200 tokens" in line for line in lines)
        os.write(master, b"q")
        await asyncio.to_thread(read_until, "[paused]")
        os.write(master, b"q")
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
