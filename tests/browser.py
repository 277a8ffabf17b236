"""Chromium for tests of the router's page, from Debian (docker/install_test_programs.sh)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

CHROMIUM = Path("/usr/bin/chromium")
expect.set_options(timeout=60_000)  # on a machine that is busy with other things
needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"no {CHROMIUM}: run docker/install_test_programs.sh as root on Debian"
)
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=_ARGUMENTS, ignore_default_args=["--hide-scrollbars"]
        )
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def looking(browser: Browser, url: str, **options: object) -> AsyncIterator[Page]:
    """A page with the data drawn. Fails if it logs an error, or asks anybody but `url` for anything."""
    wrong: list[str] = []
    context = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    page = await context.new_page()
    page.set_default_timeout(60_000)
    origin = url.split("?")[0].rstrip("/")
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if _is_fault(said) else None)
    page.on("request", lambda asked: None if asked.url.startswith(origin) else wrong.append(asked.url))
    try:
        await page.goto(url)
        await page.locator("#readings dd").first.wait_for()
        yield page
    finally:
        await context.close()
    assert wrong == []


def _is_fault(said: ConsoleMessage) -> bool:
    """An error but that of a router that is away, or does not keep a decision any more."""
    return said.type == "error" and "Failed to load resource" not in said.text
