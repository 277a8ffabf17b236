"""What a real Prometheus makes of a real cluster: every query has an answer, and alerts fire for what is broken."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator

import pytest

from graphs.metrics_doc import DASHBOARDS, queries, rules
from graphs.render import scrape_config
from graphs.trial import Trial
from tests.engine.test_cluster import movers
from tests.prometheus import Prometheus, watched

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def prometheus(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    running = [(child.process, "127.0.0.1") for child in trial.supervisor.children.values()]
    one = Prometheus(tmp_path_factory.mktemp("watched") / "prometheus", scrape_config(running))
    yield one
    one.stop()


async def played(trial: Trial, about: str) -> None:
    """A conversation whose last turn comes from HBM or DRAM, and, with these emptied, from the store."""
    trial.messages.clear()
    await trial.say_next(f"Of {about}: what is there to be seen, and who looks at it? " * 8)
    await trial.say_next("And what else?")
    await trial.until_stored()
    await trial.until_idle()
    for worker in trial.workers:
        await trial.clear(worker)
    await trial.say_next("And when all is forgotten but for the store?")


async def until_firing(trial: Trial, prometheus: Prometheus, name: str) -> None:
    async def fires() -> bool:
        return name in await asyncio.to_thread(prometheus.firing)

    await trial.until(fires, f"{name} fires", 60)


async def test_every_query_and_every_rule_has_an_answer(trial: Trial, prometheus: Prometheus) -> None:
    expressions = [*queries(), *(watched(rule) for rule in rules())]
    expressions = [
        re.sub(r"\$(router|target|worker)", ".*", one.replace("$__rate_interval", "1m")) for one in expressions
    ]
    missing = [""]

    async def all_answered() -> bool:
        await played(trial, f"answers, of which {len(missing)} are missing")
        await asyncio.sleep(2)  # two scrapes
        missing[:] = [one for one in expressions if not await asyncio.to_thread(prometheus.values, one)]
        return not missing

    try:
        await trial.until(all_answered, "every query has an answer", 90)
    except TimeoutError:
        pytest.fail("no data: " + "\n".join(missing))
    names = [rule.get("record") or rule["alert"] for rule in rules()]
    assert prometheus.healthy() == names
    status = await trial.store_status()
    assert status is not None
    assert prometheus.values("kvtier_target_chunks") == [status.entries]


async def test_variables_of_dashboards_have_values(prometheus: Prometheus) -> None:
    asked = 0
    for path in DASHBOARDS.glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert match
                assert prometheus.get(f"label/{match[2]}/values", **{"match[]": match[1]}), variable["query"]
                asked += 1
    assert asked == 3


async def test_series_of_the_router_have_the_labels_of_dynamos_own(prometheus: Prometheus) -> None:
    ours = prometheus.get("query", query="kvtier_router_mirror_resyncs_total")["result"][0]["metric"]
    theirs = prometheus.get("query", query='dynamo_component_requests_total{dynamo_component="kvtier_router"}')
    for label, value in theirs["result"][0]["metric"].items():
        assert label == "__name__" or ours[label] == value
    assert ours["model"] == "tiny"


async def test_a_mover_that_is_killed_is_told(trial: Trial, prometheus: Prometheus) -> None:
    assert "KvtierMoverRestarts" not in prometheus.firing()
    for pid in movers():
        os.kill(pid, signal.SIGKILL)

    async def fires() -> bool:
        # An engine that is idle does not notice that its mover has ended, nor tell.
        for worker in trial.workers:
            await trial.ask([{"role": "user", "content": "Who carries all this?"}], max_tokens=1, worker=worker)
        return "KvtierMoverRestarts" in await asyncio.to_thread(prometheus.firing)

    await trial.until(fires, "it is told that movers were started again", 60)


async def test_a_target_that_hangs_makes_fetches_miss_their_deadline(trial: Trial, prometheus: Prometheus) -> None:
    await played(trial, "a store that hangs")
    await trial.until_stored()
    await trial.until_idle()
    for worker in trial.workers:
        await trial.clear(worker)
    store = trial.child("Store-0").running
    store.send_signal(signal.SIGSTOP)
    try:
        turn = await trial.say_next("Does anybody answer?")
        assert turn.answer.equals(await trial.reference())
    finally:
        store.send_signal(signal.SIGCONT)
    await until_firing(trial, prometheus, "KvtierFetchDeadlineMisses")


async def test_a_target_that_is_killed_is_told(trial: Trial, prometheus: Prometheus) -> None:
    await trial.kill("Store-0")
    await until_firing(trial, prometheus, "KvtierStoreDown")
    await until_firing(trial, prometheus, "KvtierResidencyStale")
    (silent,) = prometheus.firing()["KvtierResidencyStale"]
    assert silent["target"] == trial.store_address
    await trial.restart("Store-0")

    async def over() -> bool:
        return not {"KvtierStoreDown", "KvtierResidencyStale"} & set(await asyncio.to_thread(prometheus.firing))

    await trial.until(over, "both are over", 60)


async def test_a_frontend_that_is_killed_is_told(trial: Trial, prometheus: Prometheus) -> None:
    await trial.kill("Frontend-0")
    await until_firing(trial, prometheus, "KvtierProcessDown")
    assert [alert["job"] for alert in prometheus.firing()["KvtierProcessDown"]] == ["frontend"]
    await trial.restart("Frontend-0")
    await trial.until(trial._answers, "the frontend answers", 60)
