"""The health check of containers: what it takes for healthy, and what it costs."""

import asyncio
import subprocess
import sys
from collections.abc import Callable

from aiohttp import web

from graphs.services import free_port
from kvstore.healthy import is_healthy
from tests.conftest import RunningTarget


async def test_an_answer_without_the_text_or_with_an_error_is_ill() -> None:
    async def health(request: web.Request) -> web.Response:
        return web.Response(text='{"generate":"ready"}', status=503 if request.path == "/starting" else 200)

    application = web.Application()
    application.router.add_get("/{any}", health)
    runner = web.AppRunner(application)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        for path, text, expected in [
            ("/health", '"generate":"ready"', True),
            ("/health", "other", False),
            ("/starting", "ready", False),
        ]:
            assert await asyncio.to_thread(is_healthy, f"127.0.0.1:{port}", path, text) is expected
    finally:
        await runner.cleanup()


def test_the_command_asks_a_target_and_imports_nothing_heavy(start_target: Callable[..., RunningTarget]) -> None:
    target = start_target()
    command = [sys.executable, "-X", "importtime", "-m", "kvstore.healthy"]
    well = subprocess.run([*command, target.address], capture_output=True, text=True, timeout=20, check=False)
    assert well.returncode == 0
    assert not {"numpy", "msgspec", "ssl", "asyncio"} & {
        line.split("|")[-1].strip() for line in well.stderr.splitlines()
    }
    ill = subprocess.run([*command, f"127.0.0.1:{free_port()}"], capture_output=True, timeout=20, check=False)
    assert ill.returncode == 1
