"""The router's page in a real browser, over real decisions that are fed here. What runs behind it in a cluster is in
tests/engine/test_page.py."""

import json
import random
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Page, expect

from components.pricing.cost import Candidate, Choice, Choices, Policy, Speeds, choose
from components.router.decisions import Decisions
from components.router.speeds import LiveSpeeds
from components.router.view.access import page_access
from components.router.view.feed import Feed
from components.router.view.page import open_page
from components.router.workers import Workers
from graphs.services import free_port
from kvstore.bus.messages import Residency, SnapshotPage, TargetReport, WorkerReport
from kvstore.bus.residency import Mirror
from tests.browser import chromium, looking, needs_chromium

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]

SPEEDS = Speeds(0.04, 1e-4, 0.0, 25e9, 5e9, 0.002)
POLICY = Policy(stall_price=0.2)
ENDPOINT = "dynamo.backend.generate"
WORKERS = [0x694D9A1C2F1A, 0x694D9A1C3F2B, 0x694D9A1C4F3C]
TARGET = "10.0.0.7:7600"


class Shown:
    """A page at a fixed address, and what it shows."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.random = random.Random(7)
        self.runner: web.AppRunner | None = None

    async def start(self, model: str = "llama") -> None:
        self.decisions = Decisions(16)
        self.workers, self.speeds, self.mirror = Workers(ENDPOINT), LiveSpeeds(SPEEDS), Mirror()
        self.connected = True
        self.seq = 0
        card = json.dumps({"display_name": "m", "kv_cache_block_size": 16, "runtime_config": {"total_kv_blocks": 99}})
        self.workers.set_cards({str(worker): card for worker in WORKERS})
        self.report()
        self.feed = Feed(
            self.decisions, self.workers, self.speeds, self.mirror, model=model, connected=lambda: self.connected
        )
        self.runner = await open_page(page_access(f"127.0.0.1:{self.port}"), self.feed)

    async def stop(self) -> None:
        assert self.runner is not None
        await self.runner.cleanup()

    def report(self, **fetched: int) -> None:
        """A heartbeat of everybody."""
        now, ms = time.monotonic(), time.time_ns() // 1_000_000
        for worker in WORKERS:
            held = {"hbm_blocks": 30_000, "hbm_blocks_max": 40_000, "dram_chunks": 50_000, "dram_chunks_max": 64_000}
            report = WorkerReport(str(worker), ENDPOINT, 7, 16, 8, 1 << 20, ms, fetched_chunks=fetched, **held)
            self.workers.heard(report, now)
        self.seq += 1
        self.mirror.apply(Residency(TARGET, 1, self.seq, 0, 0, [], [], ms), now)
        if self.seq == 1:
            self.mirror.apply_snapshot([SnapshotPage(TARGET, 1, 1, 1, 1, 7, bytes(8))])
        self.speeds.heard_target(TargetReport(TARGET, 1, 1e8, 2e8, 2e9, 0, 0, 10**12, 10**11, 3, ms), now)

    def decide(self, *, ended: bool = True) -> str:
        """One prompt, from the decision to the end of its answer."""
        tokens, (chosen, choices) = self.random.choice(PRICED)
        name = f"{self.random.getrandbits(48):012x}"
        decision = self.decisions.decided(name, tokens, chosen, choices)
        self.decisions.took({"ask": 0.0005, "locate": 0.0002, "price": 0.0003})
        if ended:
            self.decisions.first_token(decision, chosen.ttft_seconds * self.random.uniform(0.8, 1.25))
            self.decisions.answered(decision, 1, 30, 30 * 0.02)
            self.decisions.ended(name, "finished")
        return name


def priced(chance: random.Random) -> tuple[int, tuple[Choice, Choices]]:
    """A prompt's tokens, and what each worker would cost."""
    tokens = chance.randrange(400, 4000)
    held = chance.randrange(0, tokens // 16)
    candidates = [
        Candidate(
            worker,
            SPEEDS,
            hbm_blocks=held if worker == chance.choice(WORKERS) else 0,
            dram_blocks=chance.choice([0, held // 2]),
            queued_prefill_tokens=chance.choice([0, 0, 700]),
            memory_used=chance.random() / 2,
            blocks_per_chunk=8,
            chunk_bytes=1 << 20,
            located=[TARGET] * chance.randrange(0, tokens // 128 + 1),
        )
        for worker in WORKERS
    ]
    return tokens, choose(candidates, tokens, 16, POLICY)


_CHANCE = random.Random(7)
PRICED = [priced(_CHANCE) for _ in range(64)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def shown() -> AsyncIterator[Shown]:
    one = Shown()
    await one.start()
    for _ in range(40):
        one.decide()
    one.feed.tick()
    yield one
    await one.stop()


async def figures(page: Page, table: str) -> dict[str, list[str]]:
    """A table's rows by their heads."""
    rows = await page.locator(f"#{table} tbody tr").all()
    texts = [[text.strip() for text in await row.locator("th, td").all_text_contents()] for row in rows]
    return {first: others for first, *others in texts}


async def test_totals_are_those_of_the_metrics(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url) as page:
        tokens = await figures(page, "tokens-table")
        registry = shown.decisions.registry
        for source, name in {"hbm": "HBM", "dram": "DRAM", "store": "store", "computed": "computed"}.items():
            counted = registry.get_sample_value("kvtier_router_prompt_tokens_total", {"source": source})
            assert int(tokens[name][2].replace(",", "")) == counted
        await expect(page.locator("#readings")).to_contain_text("40 so far, 0 in flight")
        await expect(page.locator("#alarms p")).to_have_count(0)
        label = await page.get_attribute("#tokens-chart", "aria-label")
        assert label is not None
        assert "Now: HBM" in label
        await expect(page.locator("#tokens-chart canvas")).to_have_count(1)
        assert int((await figures(page, "ttft-table"))["with store"][3]) > 0
        assert await page.locator("#workers tbody tr").count() == 3
        assert TARGET in await page.locator("#targets").inner_text()
        assert "52.4 GB of 67.1 GB" in await page.locator("#workers").inner_text()
        await expect(page.locator("#saving")).to_contain_text("by the router's prediction: mean TTFT")
        untitled = await page.evaluate(
            """() => [...document.querySelectorAll("thead th, .readings > div")]
                .filter(one => one.textContent.trim() && !one.title).map(one => one.outerHTML)"""
        )
        assert untitled == []


async def test_figures_of_the_last_minute_stay_when_no_prompt_comes(
    shown: Shown, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = shown.feed.state.minute
    assert minute is not None
    later = time.time() + 200
    monkeypatch.setattr("components.router.view.feed.time.time", lambda: later)
    shown.feed.tick()
    assert shown.feed.state.minute == minute
    assert shown.feed.state.prediction is None  # of which alarms speak
    async with looking(browser, shown.url) as page:
        for tile in (await page.locator("#readings > div").all())[1:]:
            await expect(tile.locator("b")).to_have_text(re.compile(r"\d"))
            await expect(tile).to_contain_text("3 min ago")
        await expect(page.locator("#saving")).to_contain_text("3 min ago")


async def test_the_bars_of_a_decision_add_up_to_its_price(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url) as page:
        for _ in range(3):
            row = page.locator("#rows tr").nth(shown.random.randrange(30))
            name = await row.get_attribute("data-id")
            assert name is not None
            await row.click()
            await expect(page.locator("#detail h2")).to_contain_text(name)
            assert f"decision={name}" in page.url
            found = shown.decisions.history.find(name)
            assert found is not None
            candidates = {one.worker: one for one in found.candidates}
            most = max(one.price_seconds for one in found.candidates)
            for line in await page.locator("#detail .prices tbody tr").all():
                one = candidates.pop(str(await line.get_attribute("data-worker")))
                cells = [
                    float(str(await cell.get_attribute("data-seconds")))
                    for cell in await line.locator("td.number").all()
                ]
                assert sum(cells[:-1]) == pytest.approx(cells[-1])
                assert cells[-1] == pytest.approx(one.price_seconds)
                widths = await line.locator(".stack").first.evaluate(
                    "bar => [...bar.children].reduce((sum, part) => sum + parseFloat(part.style.width), 0)"
                )
                assert widths == pytest.approx(100 * one.price_seconds / most, rel=1e-3)
            assert not candidates
            assert f"{found.prompt_tokens:,} tokens" in await page.locator("#detail .story").inner_text()


async def test_what_came_of_a_decision_appears_when_it_is_known(shown: Shown, browser: Browser) -> None:
    name = shown.decide(ended=False)
    shown.feed.tick()
    async with looking(browser, f"{shown.url}?decision={name}") as page:
        await expect(page.locator("#detail .came")).to_contain_text("in flight")
        shown.decisions.ended(name, "cancelled")
        shown.feed.tick()
        await expect(page.locator("#detail .came")).to_contain_text("the client disconnected")
        await expect(page.locator(f"#rows tr[data-id='{name}']")).to_contain_text("cancelled")
    async with looking(browser, f"{shown.url}?decision=0123456789ab") as page:
        await expect(page.locator("#detail")).to_contain_text("no longer kept")


async def test_filters_and_pause_are_in_the_url(shown: Shown, browser: Browser) -> None:
    worker = f"{WORKERS[0]:x}"
    async with looking(browser, shown.url) as page:
        await page.select_option("#worker", worker)
        await page.select_option("#source", "store")
        await page.select_option("#span", "15")
        await page.keyboard.press("p")
        await expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
        url = page.url
    async with looking(browser, url) as page:
        assert (await page.input_value("#worker"), await page.input_value("#source")) == (worker, "store")
        assert await page.input_value("#span") == "15"
        wanted = [
            one.id
            for one in shown.decisions.history.last()
            if one.chosen == worker and next(c for c in one.candidates if c.worker == worker).tokens["store"]
        ]
        before = await page.locator("#rows tr").evaluate_all("rows => rows.map(row => row.dataset.id)")
        assert before == wanted
        for _ in range(200):
            shown.decide()
        shown.feed.tick()
        await page.wait_for_function("() => document.getElementById('link').textContent.includes('paused')")
        assert await page.locator("#rows tr").evaluate_all("rows => rows.map(row => row.dataset.id)") == before
        await page.click("#pause")
        shown.feed.tick()
        await page.wait_for_function("n => document.querySelectorAll('#rows tr').length > n", arg=len(before))


async def test_it_can_be_used_with_the_keyboard(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url) as page:
        await page.locator("#rows tr").first.wait_for()
        first = page.locator("#rows tr").first.locator("button")
        await first.focus()
        await page.keyboard.press("Enter")
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("ArrowDown")
        name = await page.locator("#rows tr").nth(2).get_attribute("data-id")
        await expect(page.locator("#detail h2")).to_contain_text(str(name))
        assert await page.evaluate("document.activeElement.closest('tr').dataset.id") == name
        shown.decide()
        shown.feed.tick()  # a new row does not take the focus
        await expect(page.locator("#rows tr").nth(3)).to_have_attribute("data-id", str(name))
        assert await page.evaluate("document.activeElement.closest('tr').dataset.id") == name
        unnamed = await page.evaluate(
            """() => [...document.querySelectorAll("button, select, [role=img], [role=region]")].filter(one =>
                !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.textContent.trim()
                  || one.labels?.length)).map(one => one.outerHTML)"""
        )
        assert unnamed == []


CONTRAST = """() => {
  const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    const color = parse(getComputedStyle(one).backgroundColor);
    return color[3] > 0 || !one.parentElement ? color : behind(one.parentElement);
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const poor = [];
  for (const one of document.querySelectorAll("body *")) {
    const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!text || !one.checkVisibility()) continue;
    const found = ratio(parse(getComputedStyle(one).color), behind(one));
    if (found < 4.5) poor.push([one.className, one.textContent.slice(0, 30), found]);
  }
  for (const part of document.querySelectorAll(".part:not(.term-delay), .swatch:not(.term-delay)")) {
    const found = ratio(parse(getComputedStyle(part).backgroundColor), behind(part.closest("section, .readings")));
    if (found < 3) poor.push([part.className, "", found]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_contrast_is_enough(shown: Shown, browser: Browser, scheme: str) -> None:
    shown.connected = False
    shown.feed.tick()
    async with looking(browser, shown.url, color_scheme=scheme, reduced_motion="reduce") as page:
        await page.locator("#rows tr").first.click()
        await page.locator("#detail .prices").wait_for()
        await expect(page.locator("#alarms")).to_contain_text("NATS is not connected")
        assert await page.evaluate(CONTRAST) == []
        assert await page.locator(".part").first.evaluate("part => getComputedStyle(part).transitionDuration") == "0s"


async def test_the_theme_follows_the_system_or_the_button(shown: Shown, browser: Browser) -> None:
    async def dark(page: Page) -> bool:
        red = await page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        return int(red) < 100

    async with looking(browser, shown.url, color_scheme="dark") as page:
        assert await dark(page)
        await page.keyboard.press("t")
        await expect(page.locator("#theme")).to_have_text("Light")
        assert not await dark(page)
        await page.reload()
        await expect(page.locator("#theme")).to_have_text("Light")
        assert not await dark(page)


async def test_it_fits_a_phone(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        await page.locator("#rows tr").first.click()
        await page.locator("#detail .prices").wait_for()
        assert await page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        small = await page.evaluate(
            """() => [...document.querySelectorAll("button, select")].filter(one => one.checkVisibility()
                && one.getBoundingClientRect().height < 24).map(one => one.outerHTML)"""
        )
        assert small == []
        bars = await page.evaluate(
            """() => [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth)
                .map(one => one.offsetHeight - one.clientHeight)"""
        )
        assert bars
        assert all(height > 0 for height in bars)  # a phone shows none of its own


async def test_it_comes_back_after_a_restart(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url) as page:
        await page.locator("#rows tr").first.wait_for()
        await shown.stop()
        await expect(page.locator("#link")).to_contain_text("does not answer")
        await shown.start("another")
        shown.decide()
        shown.feed.tick()
        await expect(page.locator("#model")).to_have_text("another")
        await expect(page.locator("#rows tr")).to_have_count(1)
        await expect(page.locator("#readings")).to_contain_text("1 so far")


async def test_a_thousand_decisions_a_second_do_not_freeze_it(shown: Shown, browser: Browser) -> None:
    """Drawn frames and clicks are counted, while seconds of a thousand decisions come as fast as they can be made."""
    async with looking(browser, shown.url) as page:
        await page.locator("#rows tr").first.wait_for()
        await page.evaluate(
            """() => { window.frames = 0; window.clicks = 0;
                const frame = () => { window.frames += 1; requestAnimationFrame(frame); }; frame();
                document.getElementById("theme").addEventListener("click", () => { window.clicks += 1; }); }"""
        )
        for second in range(1, 6):
            before = await page.evaluate("window.frames")
            for _ in range(1000):
                shown.decide()
            shown.feed.tick()
            await page.click("#theme")
            await expect(page.locator("#readings")).to_contain_text(f"{40 + 1000 * second:,} so far")
            assert await page.evaluate("window.clicks") == second
            assert await page.evaluate("window.frames") > before
        assert await page.locator("#rows tr").count() <= 60
        assert len(shown.feed.samples) <= 5 * 32 + 40
        await page.locator("#rows tr").nth(20).click()  # long gone from the last thousand
        await page.locator("#detail .prices").wait_for()


async def test_alarms_say_what_is_wrong(shown: Shown, browser: Browser) -> None:
    async with looking(browser, shown.url) as page:
        await expect(page.locator("#alarms p")).to_have_count(0)
        shown.report(hit=50)
        shown.feed.tick()
        shown.report(hit=90, late=10, corrupt=1)
        shown.feed.tick()
        alarms = page.locator("#alarms")
        await expect(alarms.locator("[data-alarm=late]")).to_contain_text("30 of 303 chunks missed their deadline")
        await expect(alarms.locator("[data-alarm=corrupt-fetch]")).to_contain_text("3 chunks arrived corrupt")
        async with aiohttp.ClientSession() as session, session.get(f"{shown.url}state") as reply:
            state: dict[str, Any] = await reply.json()
        assert {one["id"] for one in state["alarms"]} == {"late", "corrupt-fetch"}
