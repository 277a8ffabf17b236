"""The router's page in a browser, over a real cluster with traffic."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from graphs.trial import Trial
from tests.browser import chromium, looking, needs_chromium

pytestmark = [pytest.mark.engine, needs_chromium, pytest.mark.asyncio(loop_scope="session")]

SOURCES = ("computed", "store", "DRAM", "HBM")  # as the page names them


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as one:
        yield one


async def state(trial: Trial) -> Any:
    async with trial.http.get(f"{trial.page_url}state") as reply:
        return await reply.json()


async def totals(page: Page) -> list[int]:
    """Tokens since the start, by source."""
    rows = page.locator("#tokens-table tbody tr")
    return [int((await rows.nth(i).locator("td").nth(2).inner_text()).replace(",", "")) for i in range(len(SOURCES))]


async def test_numbers_equal_the_metrics_and_bars_the_price(trial: Trial, browser: Browser) -> None:
    for turn in range(3):
        await trial.say_next(f"Numbers, turn {turn}: what else is there to say about a shared store? " * 8)
    await trial.until_idle()
    values = await trial.metrics("Router-0")
    counted = [int(values["kvtier_router_prompt_tokens_total", name.lower()]) for name in SOURCES]
    finished = int(values["kvtier_router_outcomes_total", "finished"])

    async def told() -> bool:
        return bool((await state(trial))["outcomes"]["finished"] == finished)

    await trial.until(told, "the page has heard of the last prompt", 20)
    async with looking(browser, trial.page_url) as page:
        assert await totals(page) == counted
        assert sum(counted) > 0
        row = page.locator("#rows tr").first
        await row.click()
        name = await row.get_attribute("data-id")
        await expect(page.locator("#detail h2")).to_contain_text(str(name))
        async with trial.http.get(f"{trial.page_url}decisions/{name}") as reply:
            decision = await reply.json()
        assert decision["outcome"] == "finished"
        assert 0 < decision["output_tokens"] <= 32
        assert decision["tpot_seconds"] > 0
        prices = {one["worker"]: one["price_seconds"] for one in decision["candidates"]}
        for line in await page.locator("#detail .prices tbody tr").all():
            cells = await line.locator("td.number").evaluate_all("cells => cells.map(cell => +cell.dataset.seconds)")
            assert sum(cells[:-1]) == pytest.approx(cells[-1])
            assert cells[-1] == pytest.approx(prices.pop(str(await line.get_attribute("data-worker"))))
        assert not prices
        assert await page.locator("#workers tbody tr").count() == len(trial.workers)
        await expect(page.locator("#targets")).to_contain_text(trial.store_address)


async def test_the_page_outlives_the_router(trial: Trial, browser: Browser) -> None:
    async with looking(browser, trial.page_url) as page:
        await trial.kill("Router-0")
        await expect(page.locator("#link")).to_contain_text("does not answer")
        await trial.restart("Router-0")

        async def answers() -> bool:
            return bool((await trial.ask([{"role": "user", "content": "Is there a router?"}], max_tokens=2)).text)

        await trial.until(answers, "the frontend has found the new router", 60)

        async def told() -> bool:
            now = await state(trial)
            return bool(now["decisions"] > 0 and now["open"] == 0)

        await trial.until(told, "the page has heard of it", 20)
        decided = (await state(trial))["decisions"]
        await expect(page.locator("#link")).to_contain_text("prompts/s")
        await expect(page.locator("#readings")).to_contain_text(f"{decided} so far")
        await expect(page.locator("#rows tr")).to_have_count(decided)
