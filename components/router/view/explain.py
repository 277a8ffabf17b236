"""Explain a routing decision, or show the decision for a new prompt:

    kvtier explain [DECISION] --url http://127.0.0.1:8300
    kvtier explain --prompt TEXT | --file FILE [--chat] | --tokens 1,2,3

Asks the router's page (`--page`). Without a decision or a prompt, lists the latest decisions. A given prompt is priced
on every worker with the current state, and not sent.
"""

import argparse
import asyncio
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from components.router.records import Decision
from components.router.view.access import TOKEN_HELP, bearer, checked_url, page_token, unknown
from components.router.view.question import Question
from kvstore.errors import ConfigError, UnavailableError
from kvstore.text import clean, shown
from kvstore.tools import words

Answer = TypeVar("Answer")
_SOURCES = ("hbm", "dram", "store", "computed")


async def explained(
    url: str, decision: str = "", limit: int = 20, question: Question | None = None, token: str | None = None
) -> str:
    """The text to print. Raises ConfigError for a decision that is not kept or a prompt that the router refuses,
    UnavailableError if no router answers."""
    path = f"/decisions/{decision}" if decision else f"/decisions?limit={limit}" if question is None else "/explain"
    asked = None if question is None else msgspec.json.encode(question)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session,
            session.request(
                "GET" if asked is None else "POST", url.rstrip("/") + path, data=asked, headers=bearer(token)
            ) as reply,
        ):
            body = await reply.read()
            told = shown(body.decode(errors="replace").strip())
            if reply.status == 401:
                raise UnavailableError(f"router: {url}: {unknown(token)}")
            if decision and reply.status == 404:
                raise ConfigError("decision", decision, f"the id of a recent decision ({told})")
            if asked is not None and reply.status in (400, 413):
                raise ConfigError("prompt", f"{len(asked)} bytes", f"a prompt that the router accepts ({told})")
            if reply.status != 200:
                raise UnavailableError(f"router: {url}: {told}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnavailableError(
            f"router: no router answers at {url} ({shown(error)}): start it with --page, or name its address with --url"
        ) from None
    if decision or question:
        return _in_full(_decoded(body, Decision))
    rows = [f"{'decision':<14}{'tokens':>8}{'worker':>18}{'fetch':>7}{'predicted s':>13}{'actual s':>10}  outcome"]
    return "\n".join(rows + [_row(one) for one in _decoded(body, list[Decision])])


def _decoded(body: bytes, kind: type[Answer]) -> Answer:
    return msgspec.convert(clean(msgspec.json.decode(body)), kind)


def _row(one: Decision) -> str:
    return (
        f"{one.id:<14}{one.prompt_tokens:>8}{one.chosen:>18}{one.fetch_chunks:>7}{one.predicted_ttft_seconds:>13.4f}"
        f"{_seconds(one.ttft_seconds):>10}  {one.outcome}"
    )


def _in_full(one: Decision) -> str:
    if one.id:
        lines = [
            f"decision {one.id}: {one.prompt_tokens} tokens -> worker {one.chosen}, {one.outcome}",
            f"first token: predicted {one.predicted_ttft_seconds:.4f} s, actual {_seconds(one.ttft_seconds)} s",
        ]
    else:
        lines = [
            f"not sent: {one.prompt_tokens} tokens would go to worker {one.chosen}",
            f"first token: predicted {one.predicted_ttft_seconds:.4f} s",
        ]
    if one.prefilled is not None:
        lines.append(f"prefilled on worker {one.prefilled.worker}: see decision {one.prefilled.id}")
    elif one.fetch_chunks:
        runs = ", ".join(f"{target} {count}" for target, count in one.targets)
        lines.append(f"fetches {one.fetch_chunks} chunks: {runs}")
    # Within 80 columns: `kvtier top` shows it, too.
    candidates = sorted(one.candidates, key=lambda candidate: candidate.price_seconds)
    names = [*_SOURCES, *(["handover"] if any("handover" in each.tokens for each in candidates) else [])]
    tokens = [[f"{each.tokens.get(name, 0):,}" for name in names] for each in candidates]
    terms = [*candidates[0].price, "= price"] if candidates else []
    prices = [[_ms(seconds) for seconds in (*each.price.values(), each.price_seconds)] for each in candidates]
    for title, heads, rows in (("tokens by source", names, tokens), ("ms by term of the price", terms, prices)):
        marks = ["<-" if each.worker == one.chosen else "" for each in candidates]
        table = [[each.worker, *row, mark] for each, row, mark in zip(candidates, rows, marks, strict=True)]
        lines += ["", title, words.table([["worker", *heads, ""], *table])]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("decision", nargs="?", default="", help="its id, from the router's log or this command's list")
    asked.add_argument("--prompt", help="a text, as in /v1/completions")
    asked.add_argument("--file", type=Path, help="a file with the text")
    asked.add_argument("--tokens", help="token ids, separated by commas")
    parser.add_argument("--chat", action="store_true", help="send the text as the first user message of a chat")
    parser.add_argument("--url", default="http://127.0.0.1:8300", help="the router's page; default %(default)s")
    parser.add_argument("--limit", type=int, default=20, help="how many to list; default 20")
    parser.add_argument("--page-token-file", type=Path, help=TOKEN_HELP)
    options = parser.parse_args(argv)
    token = page_token(options.page_token_file)
    url = checked_url("url", options.url)
    print(asyncio.run(explained(url, options.decision, options.limit, _question(options), token)))


def _question(options: argparse.Namespace) -> Question | None:
    if options.tokens is not None:
        parts = options.tokens.split(",")
        if not all(part.strip().isdecimal() and int(part) < 1 << 32 for part in parts):
            raise ConfigError("tokens", options.tokens, "token ids, such as 1,2,3")
        return Question(token_ids=[int(part) for part in parts])
    text = options.prompt
    if options.file is not None:
        try:
            text = options.file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("file", options.file, f"a file that can be read ({error})") from None
    if text is None:
        return None
    return Question(messages=[{"role": "user", "content": text}]) if options.chat else Question(prompt=text)
