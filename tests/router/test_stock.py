"""The router in front of real Dynamo workers, without an engine: whichever way prompts end, nothing stays booked."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.bus.plan import FIELD, HINT_TYPE, make_plan, read_plan
from tests.router.stock_late import FLOOR_SECONDS
from tests.router.stock_worker import CONTEXT_TOKENS, DIE, FAIL_AT_ONCE, FINISH, HUNG, LONG, REFUSE, SILENT, STUCK

ENDPOINT = "dynamo.backend.generate"
WORKERS = 3


def planes(nats_url: str, folder: Path) -> dict[str, str]:
    """Dynamo's, on this machine, without anything but NATS."""
    return {
        **os.environ,
        "NATS_SERVER": nats_url,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "nats",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_LOG": "off",
    }


def test_under_churn_nothing_stays_booked_here_or_in_dynamos_books(nats_url: str, tmp_path: Path, seed: int) -> None:
    """Prompts that are answered, that fail and that are left, each before and after the first token; a worker dies."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    environment = planes(nats_url, tmp_path)
    worker = [sys.executable, "-m", "tests.router.stock_worker", str(model), ENDPOINT]
    churn = [sys.executable, "-m", "tests.router.stock_churn", ENDPOINT, str(WORKERS), str(seed)]
    workers = [subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL) for _ in range(WORKERS)]
    try:
        ran = subprocess.run(churn, env=environment, capture_output=True, text=True, timeout=200)
    finally:
        for one in workers:
            one.kill()
            one.wait()
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["during"]["dynamo requests"] > 0
    assert told["during"]["dynamo blocks"] > 0
    assert not any(told["after"].values()), told["after"]
    assert set(told["outcomes"]) == {"finished", "failed", "cancelled"}


def test_with_half_of_the_workers_failing_every_prompt_has_its_first_token_in_time(
    nats_url: str, tmp_path: Path
) -> None:
    """Two of four hang, stop, begin nothing, are slow or cut off. Prompts that have no token go elsewhere, once; those
    that have one end with an error; all workers serve again when they can."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    environment = planes(nats_url, tmp_path)
    worker = [sys.executable, "-m", "tests.router.stock_worker", str(model), ENDPOINT]
    workers = [subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL) for _ in range(4)]
    late = [sys.executable, "-m", "tests.router.stock_late", ENDPOINT, str(tmp_path / "discovery")]
    try:
        pids = [str(one.pid) for one in workers]
        ran = subprocess.run([*late, *pids], env=environment, capture_output=True, text=True, timeout=300)
    finally:
        for one in workers:
            one.kill()
            one.wait()
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert not any(told.pop("booked").values())
    assert len(told) == 6
    for fault, found in told.items():
        assert found["first"] < 4 * FLOOR_SECONDS + 2, fault  # the longest that a worker that is alive may take
        assert found["tokens"] == [["[0, 1, 2, 3]", 24]], fault
        assert (found["missed"]["first_token"] > 0) == (fault != "slow"), fault
        assert found["missed"]["request"] == 0, fault
    assert told["hung while they answer"]["begun"] == ["", "", "Late", "Late"]
    assert told["half dead"]["begun"] == [""] * 4


@asynccontextmanager
async def running(
    commands: Sequence[list[str]], environment: dict[str, str], log: Path | None = None, **for_the_router: str
) -> AsyncIterator[aiohttp.ClientSession]:
    """Python processes, and a session to talk to them for 90 s. The router's standard error goes to `log`."""
    started = []
    with (log or Path(os.devnull)).open("w") as errors:
        for command in commands:
            router = "components.router" in command
            env = {**environment, **(for_the_router if router else {})}
            to = errors if router else subprocess.DEVNULL
            started.append(subprocess.Popen([sys.executable, *command], env=env, stderr=to))
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(90):
            yield session
    finally:
        for one in started:
            one.kill()
            one.wait()


async def first_answer(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """As soon as all processes know each other."""
    while True:
        with suppress(aiohttp.ClientError):
            async with session.post(url, json=body) as reply:
                if reply.status == 200:
                    return dict(await reply.json())
        await asyncio.sleep(0.2)


async def one_answer(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(url, json=body) as reply:
        return dict(await reply.json())


async def test_a_router_of_prefill_workers_stands_between_the_stock_frontend_and_them(
    nats_url: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    port, page = free_port(), free_port()
    stock = ["-m", "tests.router.stock_worker", str(model)]
    options = [
        "--model-name=tiny",
        f"--model-path={model}",
        f"--nats={nats_url}",
        "--endpoint=prefills.prefill.generate",
        "--worker-type=prefill",
        f"--page=127.0.0.1:{page}",
    ]
    commands = [
        [*stock, "prefills.prefill.generate", "prefill", "hidden"],
        [*stock, "prefills.backend.generate", "decode", "tiny"],
        ["-m", "components.router", *options],
        ["-m", "dynamo.frontend", "--http-port", str(port)],
    ]
    body = {"model": "tiny", "prompt": list(range(40, 75)), "max_tokens": 4}
    async with running(commands, planes(nats_url, tmp_path)) as session:
        answer = await first_answer(session, f"http://127.0.0.1:{port}/v1/completions", body)
        # The decode worker answers with how many tokens the prefill worker said it had computed: token 35 is a D.
        assert answer["choices"][0]["text"].endswith("D")
        async with session.get(f"http://127.0.0.1:{page}/decisions") as reply:
            decisions = await reply.json()
        assert (decisions[0]["prompt_tokens"], decisions[0]["outcome"]) == (35, "finished")


async def test_a_router_of_prefill_and_decode_workers_chooses_both(nats_url: str, tmp_path: Path) -> None:
    """A handover; a short prompt, which is prefilled where it is decoded. A decode worker that hangs or dies costs its
    prompts time, unless they have a token; so does a prefill worker, of which no other is left."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    port = free_port()
    stock = [sys.executable, "-m", "tests.router.stock_worker", str(model)]
    options = [
        "--model-name=tiny",
        f"--model-path={model}",
        f"--nats={nats_url}",
        "--endpoint=apart.prefill.generate",
        "--worker-type=prefill",
        "--decode-endpoint=apart.decode.generate",
        "--local-prefill-tokens=20",
        "--first-token-floor-seconds=2",
        "--next-token-seconds=1",
    ]
    environment = planes(nats_url, tmp_path)
    url = f"http://127.0.0.1:{port}/v1/completions"
    told = {"nvext": {"extra_fields": ["engine_data"]}}
    long, short = ({"model": "tiny", "prompt": list(range(40, 40 + n)), "max_tokens": 4, **told} for n in (35, 20))
    commands = [["-m", "components.router", *options], ["-m", "dynamo.frontend", "--http-port", str(port)]]
    with ExitStack() as workers:

        def started(role: str, name: str) -> subprocess.Popen[bytes]:
            command = [*stock, f"apart.{role}.generate", role, name]
            worker = workers.enter_context(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
            workers.callback(worker.kill)
            return worker

        decode = [started("decode", "hidden") for _ in range(2)]
        async with running(commands, environment) as session:

            async def eight() -> list[str]:
                """What long prompts that come together end with."""
                return [text_of(one)[-1] for one in await asyncio.gather(*(ask(long) for _ in range(8)))]

            async def ask(body: dict[str, Any]) -> dict[str, Any]:
                return await one_answer(session, url, body)

            prefill = started("prefill", "hidden-prefill")
            answer = await first_answer(session, url, long)
            assert text_of(answer).endswith("D")  # token 35, of its prompt tokens
            assert of_prompt(answer, "tokens") == {"hbm": 3, "dram": 2, "store": 1, "computed": 29}
            assert of_prompt(answer, "predicted_tokens")["computed"] == 35
            assert of_prompt(answer, "ttft_seconds") > 0
            answer = await ask(short)
            assert text_of(answer).endswith("!")  # token 0: nobody prefilled it
            assert of_prompt(answer, "tokens") == {"hbm": 3, "dram": 2, "store": 1, "computed": 14}
            assert of_prompt(answer, "predicted_tokens") == {"hbm": 0, "dram": 0, "store": 0, "computed": 20}

            os.kill(decode[0].pid, HUNG)
            assert await eight() == ["D"] * 8
            stuck = {**long, "prompt": [STUCK, *long["prompt"]]}
            assert "the answer is incomplete" in (await ask(stuck))["message"]
            os.kill(decode[0].pid, signal.SIGCONT)
            decode[1].kill()
            assert await eight() == ["D"] * 8

            os.kill(prefill.pid, HUNG)
            assert await eight() == ["!"] * 8
            prefill.kill()
            assert await eight() == ["!"] * 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_router_that_is_told_to_stop_ends_its_requests_and_is_found_no_more(
    nats_url: str, tmp_path: Path, number: int
) -> None:
    """As PID 1 of a namespace, as in a container: without a handler the kernel ignores the signal."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    port = free_port()
    environment = planes(nats_url, tmp_path)
    commands = [
        ["-m", "tests.router.stock_worker", str(model), ENDPOINT, "aggregated", "hidden"],
        ["-m", "dynamo.frontend", "--http-port", str(port), "--migration-limit", "0"],
    ]
    router = [sys.executable, "-m", "components.router", "--model-name=tiny", f"--model-path={model}"]
    body = {"model": "tiny", "prompt": [LONG, *range(40, 75)], "max_tokens": 500}
    url = f"http://127.0.0.1:{port}/v1/completions"
    namespace = ["unshare", "--pid", "--fork", "--kill-child"] if os.geteuid() == 0 else []
    async with running(commands, environment) as session:
        command = [*namespace, *router, f"--nats={nats_url}"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                whole = text_of(await first_answer(session, url, body))
                asked = asyncio.create_task(one_answer(session, url, body))
                await asyncio.sleep(0.7)  # its first tokens are out
                os.kill(only_child(process.pid) if namespace else process.pid, number)
                assert text_of(await asked) == whole
                async with asyncio.timeout(10):
                    while process.poll() is None:
                        await asyncio.sleep(0.05)
                assert process.returncode == 0
            finally:
                process.kill()
        async with session.post(url, json=body) as reply:
            assert reply.status == 404  # at once, not after the ten seconds of a lease


async def test_a_router_without_workers_stops_when_it_is_told_to(nats_url: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    command = [sys.executable, "-m", "components.router", "--model-name=tiny", f"--model-path={model}"]
    environment = {**planes(nats_url, tmp_path), "DYN_LOG": "info"}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, f"--nats={nats_url}"], env=environment, stdout=file, stderr=file)
    try:
        async with asyncio.timeout(60):
            while "waiting for a worker" not in log.read_text():
                await asyncio.sleep(0.1)
        process.terminate()
        assert process.wait(10) == 0, log.read_text()
    finally:
        process.kill()


def of_prompt(answer: dict[str, Any], name: str) -> Any:
    """What a client that asks for it hears of its prompt."""
    return answer["nvext"]["engine_data"]["kvtier"][name]


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


FORGED = msgspec.to_builtins(make_plan(["evil:1"], fetch=1, deadline_ms=60_000, chunk_ms=0, decision_id="forged"))
ENGINE_ARGS = {"extra_args": {FIELD: FORGED}}
TRANSFER = {"kv_transfer_params": {FIELD: FORGED}}
ACTION = {"action_id": "1", "action_type": HINT_TYPE, "action_version": "1", "payload": FORGED}
FORGERIES: list[dict[str, Any]] = [
    {"extra_args": {"sampling_options": ENGINE_ARGS, FIELD: FORGED}},
    {"extra_args": {"vllm_tito": {"sampling_params": ENGINE_ARGS, **TRANSFER}}},
    {"vllm_tito": {"sampling_params": ENGINE_ARGS, **TRANSFER}},
    {"vllm_xargs": {FIELD: FORGED, **TRANSFER}},
    {"sampling_options": ENGINE_ARGS},
    {"sampling_params": ENGINE_ARGS},
    {"kv_hint": {"protocol_version": "1", "message_id": "1", "actions": [ACTION]}},
    {"prefill_result": {"disaggregated_params": TRANSFER}},
    {"metadata": {FIELD: "forged"}},
    {"mm_processor_kwargs": {FIELD: FORGED, "extra_args": ENGINE_ARGS}},
    {"chat_template_kwargs": {FIELD: FORGED, "extra_args": ENGINE_ARGS}},
    TRANSFER,
]


async def test_a_clients_plan_never_reaches_the_engine(nats_url: str, tmp_path: Path) -> None:
    """Wherever a request may have one. The worker shows what it got; what the frontend refuses, it did not get."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    port, system_port = free_port(), free_port()
    commands = [
        ["-m", "tests.router.stock_worker", str(model), ENDPOINT, "showing", "hidden"],
        ["-m", "components.router", "--model-name=tiny", f"--model-path={model}", f"--nats={nats_url}"],
        ["-m", "dynamo.frontend", "--http-port", str(port), "--enable-anthropic-api"],
    ]
    environment = {**planes(nats_url, tmp_path), "DYN_VLLM_ENABLE_INFERENCE_V1_GENERATE": "true"}
    messages = [{"role": "user", "content": "hello"}]
    bodies: dict[str, dict[str, Any]] = {
        "v1/completions": {"prompt": list(range(40, 75)), "max_tokens": 4000},
        "v1/chat/completions": {"messages": messages, "max_tokens": 4000},
        "v1/responses": {"input": "hello", "max_output_tokens": 4000},
        "v1/messages": {"messages": messages, "max_tokens": 4000},
    }
    forgeries = [*FORGERIES, *({"nvext": one} for one in FORGERIES)]
    decided: dict[str, list[str]] = {path: [] for path in bodies}
    url = f"http://127.0.0.1:{port}"
    async with running(commands, environment, DYN_SYSTEM_PORT=str(system_port)) as session:
        await first_answer(session, f"{url}/v1/completions", {"model": "tiny", **bodies["v1/completions"]})
        async with session.get(f"http://127.0.0.1:{system_port}/health") as reply:
            assert (reply.status, json.loads(await reply.text())["endpoints"]) == (200, {"generate": "ready"})
        for path, body in bodies.items():
            for forgery in [{}, *forgeries]:
                async with session.post(f"{url}/{path}", json={"model": "tiny", **body, **forgery}) as reply:
                    answer = await reply.json()
                if reply.status == 400 and forgery:
                    continue
                assert reply.status == 200, (path, forgery, answer)
                shown = text_of(answer)
                assert "forged" not in shown, (path, forgery)
                plan = read_plan(json.loads(shown)["extra_args"]["sampling_options"]["extra_args"])
                assert plan is not None
                decided[path].append(plan.decision_id)
        assert all(decided.values())
        # vLLM's own interface, which takes all of them: the router does not offer it.
        native = {
            "model": "tiny",
            "token_ids": [40, 41],
            "sampling_params": {"max_tokens": 9, **ENGINE_ARGS},
            **TRANSFER,
        }
        async with session.post(f"{url}/inference/v1/generate", json=native) as reply:
            assert (reply.status, (await reply.json())["error"]["message"]) == (404, "Model not found: tiny")
        async with session.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": [40]}) as reply:
            assert (reply.status, (await reply.json())["message"]) == (400, "ValueError: one token is too few")


async def test_clients_see_why_there_is_no_answer_and_the_log_has_no_traceback(nats_url: str, tmp_path: Path) -> None:
    """What the request is to blame for is 400 with the reason, from the first worker that says so; what no worker
    answers is 503, within a bound."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    port, page = free_port(), free_port()
    worker = ["-m", "tests.router.stock_worker", str(model), ENDPOINT, "aggregated", "hidden"]
    options = [
        "--model-name=tiny",
        f"--model-path={model}",
        f"--nats={nats_url}",
        f"--page=127.0.0.1:{page}",
        "--first-token-floor-seconds=0.5",
        "--first-token-max-seconds=2",
        "--next-token-seconds=1",
    ]
    commands = [
        worker,
        worker,
        ["-m", "components.router", *options],
        ["-m", "dynamo.frontend", "--http-port", str(port)],
    ]
    log = tmp_path / "router.log"
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with running(commands, planes(nats_url, tmp_path), log) as session:

        async def answer(way: int, tokens: int = 20, **more: Any) -> tuple[int, str]:
            body = {"model": "tiny", "prompt": [way, *[50] * (tokens - 1)], "max_tokens": 4, **more}
            async with session.post(url, json=body) as reply:
                return reply.status, await reply.text()

        async def decisions() -> list[dict[str, Any]]:
            async with session.get(f"http://127.0.0.1:{page}/decisions") as reply:
                return list(await reply.json())

        await first_answer(session, url, {"model": "tiny", "prompt": [FINISH], "max_tokens": 4})
        before = len(await decisions())
        status, text = await answer(FINISH, CONTEXT_TOKENS + 1)
        assert (status, json.loads(text)["details"]["limit"]) == (400, CONTEXT_TOKENS)
        status, text = await answer(FINISH, nvext={"agent_hints": {"osl": 0}})
        assert (status, "nvext.agent_hints.osl: 0 given, expected 1" in text) == (400, True)
        status, text = await answer(REFUSE)
        assert (status, json.loads(text)["message"]) == (400, "a refused parameter")
        _, text = await answer(REFUSE, stream=True)
        assert '"code":400' in text
        assert "a refused parameter" in text
        assert [one["outcome"] for one in (await decisions())[:-before]] == ["failed", "failed"]
        status, text = await answer(SILENT)
        assert (status, "within" in text) == (503, True)
        status, text = await answer(STUCK)
        assert (status, "incomplete" in text) == (503, True)
        _, text = await answer(STUCK, stream=True)
        assert "incomplete" in text
        assert (await answer(FAIL_AT_ONCE))[0] == 500
        assert (await answer(DIE))[0] == 503
        assert "Traceback" not in log.read_text()


def text_of(answer: dict[str, Any]) -> str:
    """The text of an answer of any of OpenAI's and Anthropic's interfaces."""
    if "choices" in answer:
        (choice,) = answer["choices"]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    content = answer["output"][-1]["content"] if "output" in answer else answer["content"]
    return str(content[0]["text"])
