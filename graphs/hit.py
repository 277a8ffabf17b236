"""Show cache hits: send a new prompt, the same again, and the same to another worker, and print the tokens' sources.

    kvtier try --frontend http://127.0.0.1:8000 --url http://127.0.0.1:8300

The second is a hit in the worker's HBM, the third, which needs a second worker, one in the store. Sends chats to the
frontend and reads the decisions from the router's page (`--page`): prompts that other clients send at the same time can
be mistaken for these.
"""

import argparse
import asyncio
import contextlib
import secrets
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from components.router.records import Decision
from components.router.view.access import TOKEN_HELP, bearer, checked_url, page_token, unknown
from components.router.view.state import SOURCES
from kvstore.errors import UnavailableError
from kvstore.text import clean, shown
from kvstore.tools import words

_WORDS = 400  # more than a few blocks, whatever the tokenizer
_ANSWER_TOKENS = 8
_EVENTS_SECONDS = 0.5  # delay of the workers' KV events
_STORED_SECONDS_MAX = 10.0  # delay of puts and of the targets' events, on a busy machine
_TIMEOUT = aiohttp.ClientTimeout(total=120)


async def tried(frontend: str, page: str, token: str | None) -> str:
    """The text to print. Raises UnavailableError, which names the service that does not answer."""
    rows = [["prompt", "tokens", *SOURCES, "first token"]]
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        state = await _asked(session, "router", f"{page}/state", headers=bearer(token))
        message = " ".join([secrets.token_hex(8), *(f"word {number}" for number in range(_WORDS // 2))])
        body = {
            "model": state["model"],
            "messages": [{"role": "user", "content": message}],
            "max_tokens": _ANSWER_TOKENS,
        }
        first = await _decided(session, frontend, page, token, body)
        await asyncio.sleep(_EVENTS_SECONDS)
        again = await _decided(session, frontend, page, token, body)
        rows += [_row("new", first), _row("the same again", again)]
        if (other := _other_worker(again)) is not None:
            await _until_stored(session, f"{page}/explain", token, body["messages"])
            body["nvext"] = {"prefill_worker_id": other}
            rows.append(_row("the same, another worker", await _decided(session, frontend, page, token, body)))
    return words.table(rows)


async def _decided(
    session: aiohttp.ClientSession, frontend: str, page: str, token: str | None, body: dict[str, Any]
) -> Decision:
    """Send a prompt. The router's decision for it."""
    began = time.time()
    await _asked(session, "frontend", f"{frontend}/v1/chat/completions", body)
    found = await _asked(session, "router", f"{page}/decisions?limit=1", headers=bearer(token))
    latest = [one for one in msgspec.convert(clean(found), list[Decision]) if one.time >= began - 1]
    if not latest:
        raise UnavailableError(f"router: {page} has no decision for this prompt: is it the router of {frontend}?")
    return latest[0]


async def _until_stored(session: aiohttp.ClientSession, explain: str, token: str | None, messages: object) -> None:
    """Wait until the router would have a worker load some of the prompt from the store, up to a limit."""
    deadline = time.monotonic() + _STORED_SECONDS_MAX
    while time.monotonic() < deadline:
        await asyncio.sleep(_EVENTS_SECONDS)
        with contextlib.suppress(UnavailableError):  # a router without the model's files explains no text
            found = await _asked(session, "router", explain, {"messages": messages}, bearer(token))
            priced = msgspec.convert(clean(found), Decision).candidates
            if any(one.tokens.get("store") for one in priced):
                return


def _other_worker(decision: Decision) -> int | None:
    """A worker that was not chosen: it has the prompt neither in HBM nor in DRAM."""
    if decision.prefilled is not None:  # it would have to be a prefill worker, which this decision does not name
        return None
    others = (one.worker.partition(".")[0] for one in decision.candidates)
    chosen = decision.chosen.partition(".")[0]
    return next((int(worker, 16) for worker in others if worker != chosen), None)


def _row(name: str, decision: Decision) -> list[str]:
    tokens = decision.on_chosen().tokens
    ttft = "-" if decision.ttft_seconds is None else f"{1000 * decision.ttft_seconds:.1f} ms"
    return [name, f"{decision.prompt_tokens:,}", *(f"{tokens.get(source, 0):,}" for source in SOURCES), ttft]


async def _asked(
    session: aiohttp.ClientSession,
    who: str,
    url: str,
    body: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Any:
    try:
        async with session.request("POST" if body else "GET", url, json=body, headers=headers) as reply:
            text = await reply.text()
            if who == "router" and reply.status == 401:
                raise UnavailableError(f"{who}: {url}: {unknown((headers or {}).get('Authorization'))}")
            if reply.status != 200:
                raise UnavailableError(f"{who}: {url}: {reply.status}: {shown(text.strip())}")
            return msgspec.json.decode(text)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        said = shown(error) or type(error).__name__
        raise UnavailableError(f"{who}: no answer at {url} ({said}): set --frontend and --url") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier try", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frontend", default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--url", default="http://127.0.0.1:8300", help="the router's page; default %(default)s")
    parser.add_argument("--page-token-file", type=Path, help=TOKEN_HELP)
    options = parser.parse_args(argv)
    token = page_token(options.page_token_file)
    frontend, page = checked_url("frontend", options.frontend), checked_url("url", options.url)
    print(asyncio.run(tried(frontend, page, token)))
