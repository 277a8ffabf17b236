"""Show a cache hit: send the same new prompt twice, and print the sources of its tokens.

    kvtier try --frontend http://127.0.0.1:8000 --url http://127.0.0.1:8300

Sends chats to the frontend and reads the decisions from the router's page (`--page`). Finds them by prompt length, so
prompts of other clients with the same length at the same time can be mistaken for these.
"""

import argparse
import asyncio
import secrets
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from components.router.records import Decision
from components.router.view.access import TOKEN_HELP, bearer, page_token, unknown
from components.router.view.state import SOURCES
from kvstore.errors import UnavailableError
from kvstore.text import clean, shown
from kvstore.tools import words

_WORDS = 400  # more than a few blocks, whatever the tokenizer
_ANSWER_TOKENS = 8
_EVENTS_SECONDS = 0.5  # delay of the workers' KV events
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
        for name in ("new", "the same again"):
            began = time.time()
            await _asked(session, "frontend", f"{frontend}/v1/chat/completions", body)
            found = await _asked(session, "router", f"{page}/decisions?limit=1", headers=bearer(token))
            latest = [one for one in msgspec.convert(clean(found), list[Decision]) if one.time >= began - 1]
            if not latest:
                raise UnavailableError(
                    f"router: {page} has no decision for this prompt: is it the router of {frontend}?"
                )
            rows.append(_row(name, latest[0]))
            await asyncio.sleep(_EVENTS_SECONDS)
    return words.table(rows)


def _row(name: str, decision: Decision) -> list[str]:
    tokens = next(one.tokens for one in decision.candidates if one.worker == decision.chosen)
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
    print(asyncio.run(tried(options.frontend.rstrip("/"), options.url.rstrip("/"), token)))
