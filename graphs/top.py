"""`kvtier top`: a terminal view of token sources, workers, targets and alarms.

observer.py fetches the data and formats it; top_app.py shows it on a screen, and `--once` prints it.
"""

import argparse
import asyncio
import sys

from components.router.view.access import TOKEN_HELP, checked_url
from graphs.observer import (
    DECISIONS,
    TARGETS,
    WORKERS,
    Frame,
    Observer,
    Options,
    alarm_lines,
    decision_row,
    headlines,
    target_rows,
    worker_rows,
)
from kvstore.bus import messages
from kvstore.errors import ConfigError, UnavailableError, validated
from kvstore.tools import words

HELP = """Watch a running cluster. Keys: arrows choose a decision, enter shows its candidates, tab goes to the next
table, p pauses, + and - change the interval, q quits.

  kvtier top --url http://127.0.0.1:8300
"""


def as_text(frame: Frame) -> str:
    """One frame as text, for scripts and without a terminal."""
    parts = [*headlines(frame), *alarm_lines(frame)]
    decisions = [decision_row(one) for one in frame.decisions[:10]]
    for titles, rows in ((WORKERS, worker_rows(frame)), (TARGETS, target_rows(frame)), (DECISIONS, decisions)):
        parts += ["", words.table([titles, *rows])] if rows else []
    return "\n".join(parts)


async def _once(options: Options) -> str:
    """One frame as text. Takes two snapshots, because targets' counts are rates. Raises UnavailableError if neither
    router nor targets answer."""
    async with Observer(options) as observer:
        await observer.look()
        await asyncio.sleep(options.every)
        frame = await observer.look()
    if frame.trouble and not frame.look.answers:
        raise UnavailableError(f"router: {frame.trouble}: start it with --page, or name its address with --url")
    return as_text(frame)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier top", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="the router's page; default http://127.0.0.1:8300")
    parser.add_argument("--store", help="further targets that the router does not know, host:port separated by commas")
    parser.add_argument("--namespace", help="the targets' --namespace; default 'default'")
    parser.add_argument("--every", metavar="SECONDS", help="interval; default 1")
    parser.add_argument("--once", action="store_true", help="print one frame as text")
    parser.add_argument("--page-token-file", help=TOKEN_HELP)
    options = validated(Options, vars(parser.parse_args(argv)))
    messages.checked_namespace(options.namespace)
    checked_url("url", options.url)
    options.targets()
    if options.once:
        print(asyncio.run(_once(options)))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError.missing("once", "--once where there is no terminal")
    from graphs.top_app import TopApp  # imports the terminal library, which --once does not need

    TopApp(options).run()
