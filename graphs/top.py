"""`kvtier top`: where the tokens come from, how workers and targets do, and what is wrong, on a terminal.

observer.py looks and makes text of what it sees; top_app.py puts that on a screen, and `--once` prints it.
"""

import argparse
import asyncio
import sys

from components.router.view.access import TOKEN_HELP
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

HELP = """Look at a running cluster: arrows choose a decision and enter shows its candidates, tab goes to the next
table, p pauses, + and - change how often to look, q quits.

  kvtier top --url http://127.0.0.1:8300
"""


def as_text(frame: Frame) -> str:
    """One frame for scripts, and for whoever has no terminal."""
    parts = [*headlines(frame), *alarm_lines(frame)]
    decisions = [decision_row(one) for one in frame.decisions[:10]]
    for titles, rows in ((WORKERS, worker_rows(frame)), (TARGETS, target_rows(frame)), (DECISIONS, decisions)):
        parts += ["", words.table([titles, *rows])] if rows else []
    return "\n".join(parts)


async def _once(options: Options) -> str:
    """Counts of targets are per second, so it looks twice. Raises UnavailableError if there is nothing to be seen."""
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
    parser.add_argument("--store", help="targets, host:port with commas between, beside those that the router knows")
    parser.add_argument("--namespace", help="the targets' --namespace; default 'default'")
    parser.add_argument("--every", metavar="SECONDS", help="how often to look; default 1")
    parser.add_argument("--once", action="store_true", help="print one frame as text")
    parser.add_argument("--page-token-file", help=TOKEN_HELP)
    options = validated(Options, vars(parser.parse_args(argv)))
    messages.checked_namespace(options.namespace)
    options.targets()
    if options.once:
        print(asyncio.run(_once(options)))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("once", None, "--once where there is no terminal")
    from graphs.top_app import TopApp  # with it comes the terminal's library, which --once does without

    TopApp(options).run()
