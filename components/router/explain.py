"""Why a prompt went where it went: `kvtier explain [DECISION] --url http://127.0.0.1:8300`.

Reads the router's page (`--page`). Without a decision, the latest ones in a line each.
"""

import argparse
import asyncio

import aiohttp
import msgspec

from components.router.decisions import Decision
from kvstore.errors import ConfigError, UnavailableError

_TERMS = ("wait", "fetch", "copy", "prefill", "gpu", "pressure")
_SOURCES = ("hbm", "dram", "store", "computed")


async def explained(url: str, decision: str, limit: int) -> str:
    """Raises ConfigError for a decision that is not kept (any more), UnavailableError if no router answers."""
    path = f"/decisions/{decision}" if decision else f"/decisions?limit={limit}"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session,
            session.get(url.rstrip("/") + path) as reply,
        ):
            body = await reply.read()
            if reply.status == 404 and decision:
                raise ConfigError("decision", decision, f"the id of a recent one ({body.decode().strip()})")
            if reply.status != 200:
                raise UnavailableError(f"router: {url}: {body.decode(errors='replace').strip()}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnavailableError(
            f"router: no router answers at {url} ({error}): start it with --page, or name its address with --url"
        ) from None
    if decision:
        return _in_full(msgspec.json.decode(body, type=Decision))
    rows = [f"{'decision':<14}{'tokens':>8}{'worker':>18}{'fetch':>7}{'predicted s':>13}{'actual s':>10}  outcome"]
    return "\n".join(rows + [_row(one) for one in msgspec.json.decode(body, type=list[Decision])])


def _row(one: Decision) -> str:
    return (
        f"{one.id:<14}{one.prompt_tokens:>8}{one.chosen:>18}{one.fetch_chunks:>7}{one.predicted_ttft_seconds:>13.4f}"
        f"{_seconds(one.ttft_seconds):>10}  {one.outcome}"
    )


def _in_full(one: Decision) -> str:
    lines = [
        f"decision {one.id}: {one.prompt_tokens} tokens -> worker {one.chosen}, {one.outcome}",
        f"first token: predicted {one.predicted_ttft_seconds:.4f} s, actual {_seconds(one.ttft_seconds)} s",
    ]
    if one.fetch_chunks:
        runs = ", ".join(f"{target} {count}" for target, count in one.targets)
        lines.append(f"fetches {one.fetch_chunks} chunks: {runs}")
    names = "".join(f"{name:>10}" for name in _SOURCES) + " |" + "".join(f"{name:>10}" for name in _TERMS)
    lines += ["", f"{'worker':>18}{names}{'= price':>10}   tokens by source | seconds by term of the price"]
    for considered in sorted(one.candidates, key=lambda candidate: candidate.price_seconds):
        tokens = "".join(f"{considered.tokens.get(name, 0):>10}" for name in _SOURCES)
        terms = "".join(f"{considered.price.get(name, 0.0):>10.4f}" for name in _TERMS)
        mark = "   <-" if considered.worker == one.chosen else ""
        lines.append(f"{considered.worker:>18}{tokens} |{terms}{considered.price_seconds:>10.4f}{mark}")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("decision", nargs="?", default="", help="its id, from the router's log or this command's list")
    parser.add_argument("--url", default="http://127.0.0.1:8300", help="the router's page; default %(default)s")
    parser.add_argument("--limit", type=int, default=20, help="how many to list; default 20")
    options = parser.parse_args(argv)
    print(asyncio.run(explained(options.url, options.decision, options.limit)))
