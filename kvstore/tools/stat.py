"""`python -m kvstore stat`: the status of running targets."""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from pydantic import Field

from kvstore import credentials
from kvstore.credentials import Credential
from kvstore.errors import validated
from kvstore.net import tls, transport
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.tls import ClientTls
from kvstore.net.wire import Outcome, Status
from kvstore.text import clean, in_units
from kvstore.tools import words
from kvstore.tools.targets import TargetOptions, add_target_arguments, open_targets

HELP = """Show the content of targets and their counts since their start. With --watch repeatedly; from the second time
on, counts are rates per second. The exit code is 1 if a target does not answer.

chunks by key version  shown if a target holds chunks whose keys another release made. v1: releases before 0.2; workers
                       of this release do not ask for those, and eviction removes them

  python -m kvstore stat 10.0.0.7:7600,10.0.0.8:7600 --watch 5
"""

# Timeout. A target answers from memory, so a slower one has a problem and must not hide the others.
_PATIENCE_SECONDS = 3.0
_COLUMNS_MAX = 5  # of a table; further targets get another table below

_GROWING = (
    "received_bytes",
    "sent_bytes",
    "accepted_bytes",
    "rewritten_bytes",
    "device_written_bytes",
    "hot_hits",
    "device_hits",
    "evicted_entries",
    "corrupt_entries",
    "failed_writes",
)


class Options(TargetOptions):
    watch: float | None = Field(None, gt=0)
    as_json: bool = False


class Look(NamedTuple):
    """A snapshot at `seconds` of the monotonic clock: for each target its status, or the reason why there is none."""

    seconds: float
    answers: Mapping[str, Status | str]


def main(argv: list[str]) -> int:
    options = _parse(argv)
    logging.basicConfig(level=logging.ERROR)  # the table shows why a target does not answer
    targets = open_targets(options)
    credential, client_tls = credentials.load(options.credential_file), tls.open_client(options.tls_files)
    before: Look | None = None
    try:
        while True:
            look = take_look(targets.targets(), options.namespace, credential, client_tls)
            print(_as_json(look, before) if options.as_json else _as_tables(look, before), flush=True)
            if options.watch is None:
                return 1 if any(isinstance(answer, str) for answer in look.answers.values()) or not look.answers else 0
            before = look
            time.sleep(max(0.0, look.seconds + options.watch - time.monotonic()))
    finally:
        targets.close()


def _parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore stat", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_target_arguments(parser)
    parser.add_argument("--watch", metavar="SECONDS", help="repeat at this interval, until interrupted")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object a line, for each snapshot")
    return validated(Options, vars(parser.parse_args(argv)))


def take_look(
    targets: Sequence[str], namespace: str, credential: Credential | None = None, tls: ClientTls | None = None
) -> Look:
    """Ask all targets in parallel."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        answers = pool.map(lambda target: _ask(target, namespace, credential, tls), targets)
        return Look(time.monotonic(), dict(zip(targets, answers, strict=True)))


def _ask(target: str, namespace: str, credential: Credential | None, tls: ClientTls | None) -> Status | str:
    client = StoreClient(
        StaticMembership([target]),
        namespace=namespace,
        name="kvtier-stat",
        connections_per_target=1,
        credential=credential,
        tls=tls,
    )
    try:
        answer = client.stat(time.monotonic() + _PATIENCE_SECONDS).get(target)
    finally:
        client.close()
    if answer is None:
        return _reason(target, namespace, client.failure(target))
    return msgspec.convert(clean(msgspec.to_builtins(answer)), Status)


def _reason(target: str, namespace: str, failure: str) -> str:
    try:
        transport.connect(target, time.monotonic() + _PATIENCE_SECONDS).close()
    except OSError as error:
        return (error.strerror or "no answer").lower()
    return failure or f"it accepts connections, but hangs or serves another namespace than {namespace!r} (--namespace)"


# ---- what is shown


def _counts(status: Status) -> dict[str, int]:
    """All counters of a target, by name."""
    counts: dict[str, int] = {name: getattr(status, name) for name in _GROWING}
    for operation, outcomes in status.operations.items():
        counts |= {f"{operation}_{outcome}": keys for outcome, keys in outcomes.items()}
    return counts


def _growth(status: Status, before: Status | str | None) -> tuple[dict[str, int], bool]:
    """The growth of each counter since `before`, and True. If the target has restarted since, or `before` is missing:
    the counters since its start, and False."""
    counts = _counts(status)
    if not isinstance(before, Status) or before.epoch != status.epoch:
        return counts, False
    last = _counts(before)
    return {name: count - last.get(name, 0) for name, count in counts.items()}, True


def _as_json(look: Look, before: Look | None) -> str:
    targets: dict[str, object] = {}
    for target, answer in look.answers.items():
        if isinstance(answer, str):
            targets[target] = {"error": answer}
            continue
        one = msgspec.to_builtins(answer)
        growth, rated = _growth(answer, before.answers.get(target) if before else None)
        one["write_amplification"] = _amplification(growth)
        if rated and before:
            seconds = look.seconds - before.seconds
            one["per_second"] = {name: round(count / seconds, 3) for name, count in growth.items()}
        targets[target] = one
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return msgspec.json.encode({"time": now, "targets": targets}).decode()


def _as_tables(look: Look, before: Look | None) -> str:
    seconds = look.seconds - before.seconds if before else 0.0
    columns: dict[str, dict[str, str]] = {}
    silent = []
    for target, answer in look.answers.items():
        if isinstance(answer, str):
            silent.append(f"{target} does not answer: {answer}")
        else:
            columns[target] = column(answer, before.answers.get(target) if before else None, seconds)
    names = list(columns)
    parts = [datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")]
    for first in range(0, len(names), _COLUMNS_MAX):
        some = names[first : first + _COLUMNS_MAX]
        labels = [label for label in columns[some[0]] if any(columns[name][label] for name in some)]
        rows = [[label, *(columns[name][label] or "-" for name in some)] for label in labels]
        parts.append(words.table([["", *some], *rows]))
    return "\n".join([*parts, *silent, *([] if look.answers else ["no target is registered"])]) + "\n"


def column(status: Status, before: Status | str | None, seconds: float) -> dict[str, str]:
    """A target's figures by label; "" if there is nothing to show. All targets have the same labels in the same
    order."""
    growth, rated = _growth(status, before)

    def count(name: str) -> str:
        number = growth.get(name, 0)
        return f"{number / seconds:,.1f}/s" if rated else f"{number:,}"

    def volume(name: str) -> str:
        return words.speed(growth[name] / seconds) if rated else in_units(growth[name])

    amplification = _amplification(growth)
    restarted = isinstance(before, Status) and not rated
    totals = _counts(status)
    shown = {
        "epoch": f"{status.epoch}{' (restarted)' if restarted else ''}",
        "capacity": in_units(status.capacity_bytes),
        "used by payload": f"{in_units(status.payload_bytes)} {status.payload_bytes / status.capacity_bytes:4.0%}",
        "chunks": f"{status.entries:,}",
        "chunks by key version": words.key_versions(status.key_versions),
        "connections": f"{status.connections:,}",
        "received": volume("received_bytes"),
        "sent": volume("sent_bytes"),
        "hot cache hits": count("hot_hits"),
        "device hits": count("device_hits"),
        "hot cache": f"{status.hot_entries:,} chunks, {in_units(status.hot_bytes)}" if status.hot_entries else "",
        "read queue": in_units(status.waiting_read_bytes),
        "write queue": in_units(status.waiting_write_bytes),
        "dirty": f"{in_units(status.dirty_bytes)} of {in_units(status.dirty_bytes_max)}"
        if status.dirty_bytes_max
        else "",
        "flushed": volume("accepted_bytes") if status.dirty_bytes_max else "",
        "dropped chunks": ", ".join(f"{reason} {count:,}" for reason, count in status.dropped.items() if count),
        "written to device": volume("device_written_bytes"),
        "write amplification": "" if amplification is None else f"{amplification:.2f}",
        "evicted chunks": count("evicted_entries"),
        "eviction age": words.age(status.evicted_age_seconds) if status.evicted_segments else "",
        "corrupt chunks": f"{status.corrupt_entries:,}",
        "failed writes": f"{status.failed_writes:,}",
    }
    for operation in ("get", "put"):
        for outcome in Outcome:
            name = f"{operation}_{outcome.name.lower()}"
            shown[name.replace("_", " ")] = count(name) if totals.get(name) else ""
    return shown


def _amplification(growth: Mapping[str, int]) -> float | None:
    """Bytes written to the device per byte of accepted payload."""
    accepted = growth["accepted_bytes"]
    return round(growth["device_written_bytes"] / accepted, 3) if accepted else None
