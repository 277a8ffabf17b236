"""The demo: one conversation that survives the loss of a worker and a target, a flipped bit, and leaving clients.

    python -m graphs.demo [FOLDER]        (make demo)

Every answer is compared, token by token and logprob by logprob, with a worker that has no tier. As a control, one
answer uses forged KV, which the comparison must detect. The exit code is 0 only if everything held. The report is
FOLDER/report.json.
"""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec

from graphs.trial import MODEL, Answer, Trial
from graphs.trial import Turn as Played
from kvstore.errors import run_command

# Few slots, so that clients queue; little "HBM", so that a conversation is evicted from it to DRAM.
OVERRIDES = (
    "--VllmWorker.max-num-seqs=2",
    "--VllmWorker.max-model-len=4096",
    "--VllmWorker.num-gpu-blocks-override=36",
    "--VllmWorker.deadline-ms=2000",
)
DEADLINE_SECONDS = 2.0

OPENING = (
    "We are going to talk about storage for a while, so let me begin with the whole background. "
    "A language model computes keys and values for every token that it reads, and keeps them in fast memory. "
    "That memory is small, so they are soon thrown away, and computed again when the conversation goes on. "
    "A store of flash memory beside the machines is large, and slower; but reading is cheaper than computing. "
    "The question is always what costs less at this moment: to fetch what was computed, or to compute it anew. "
    "A router that knows where everything lies, and what each way costs in seconds, can decide that for every prompt. "
    "A worker that fetches while the prompt still waits in its queue hides the time that the fetch takes. "
    "And when the store is slow, or gone, or wrong, nobody must notice anything but a little more waiting. "
    "With that said, tell me in your own words why anyone would want such a thing, and what could go wrong with it."
)


class TurnReport(msgspec.Struct):
    turn: str
    worker: str
    hbm_tokens: int
    dram_tokens: int
    store_tokens: int
    computed_tokens: int
    ttft_ms: float
    identical: bool


class Report(msgspec.Struct):
    turns: list[TurnReport]
    store_hit_tokens: int
    identical: bool
    corrupt_detected: int
    survived_target_loss: bool
    survived_disconnects: bool
    control_noticed: bool

    @property
    def passed(self) -> bool:
        return (
            self.identical
            and self.store_hit_tokens > 0
            and self.corrupt_detected > 0
            and self.survived_target_loss
            and self.survived_disconnects
            and self.control_noticed
        )


class Demo:
    def __init__(self, trial: Trial):
        self.trial = trial
        self.report = Report([], 0, True, 0, False, False, False)

    async def play(self) -> Report:
        trial = self.trial
        await self.turn("first prompt", OPENING)
        await self.turn("HBM hit", "Go on, I am listening; what would you do first, and why would you do that first?")
        served = await self.turn("HBM hit", "And if there were two machines instead of one, what would be different?")

        say("filling the HBM of that worker with other prompts, so that only its DRAM tier remembers")
        for number in range(2):
            other = [{"role": "user", "content": f"{number} other things: " + OPENING * 3}]
            await trial.ask(other, max_tokens=2, worker=served.worker)
        served = await self.turn("DRAM hit", "Let us come back to where we were; what was the point of all that?")

        await trial.until_stored()
        say(f"kill -9 of {served.worker}, which served every turn so far")
        await trial.kill(served.worker)
        await self.turn("after kill -9 of the worker", "Still there? Then tell me who is answering me now.", store=True)

        await trial.until_stored()
        say(f"kill -9 and restart of the target; {served.worker} comes back empty, the other's tiers are emptied")
        await trial.kill("Store-0")
        await asyncio.gather(trial.restart("Store-0"), trial.restart(served.worker))
        # The first long prompt of an engine takes seconds, with or without a tier. It must not count in a turn.
        await trial.ask([{"role": "user", "content": "other things: " + OPENING}], max_tokens=2, worker=served.worker)
        await self.empty_workers()
        await trial.until_stored()
        await self.turn("after kill -9 of the target", "What do you remember of our conversation?", store=True)

        await self.flipped_byte()
        await self.target_loss()
        await self.disconnects()
        await self.control()
        return self.report

    async def turn(self, name: str, text: str, *, store: bool = False) -> Played:
        """Play a turn, compare it with the reference, and note it; `store` demands a store hit."""
        played = await self.trial.say_next(text)
        reference = await self.trial.reference()
        identical = played.answer.equals(reference)
        found = played.sources
        self.report.turns.append(
            TurnReport(
                turn=name,
                worker=played.worker,
                hbm_tokens=found.hbm,
                dram_tokens=found.dram,
                store_tokens=found.store,
                computed_tokens=found.computed,
                ttft_ms=round(1000 * played.answer.ttft_seconds, 1),
                identical=identical,
            )
        )
        self.report.identical &= identical
        self.report.store_hit_tokens += found.store
        say(
            f"turn {len(self.report.turns)}, {name}: {played.worker}, {played.answer.prompt_tokens} tokens "
            f"({found.hbm} HBM, {found.dram} DRAM, {found.store} store, {found.computed} computed), "
            f"{'identical' if identical else 'DIFFERENT'}"
        )
        if store and not found.store:
            raise Shortfall(f"turn '{name}' should have been a store hit, and {found.computed} tokens were computed")
        return played

    async def empty_workers(self) -> None:
        for worker in self.trial.workers:
            await self.trial.clear(worker)

    async def flipped_byte(self) -> None:
        """Corrupt a chunk of the next prompt on disk: the target's checksum detects it, the worker recomputes."""
        trial = self.trial
        await trial.until_stored()
        hashes = trial.chunk_hashes(trial.messages, answered=True)
        say("one bit flipped on disk, in the middle of the conversation's chunks")
        trial.flip_byte(hashes[len(hashes) // 2])
        await self.empty_workers()
        await self.turn("one byte flipped on disk", "Is there anything in what you said that you would take back?")
        status = await trial.store_status()
        self.report.corrupt_detected = status.corrupt_entries if status else 0
        say(f"the target counts {self.report.corrupt_detected} corrupt chunk(s)")

    async def target_loss(self) -> None:
        """A target that hangs, and one that is killed: no turn may take longer than recompute plus the deadline."""
        trial = self.trial
        await trial.until_stored()
        late = []
        for name, text in (
            ("target hangs (SIGSTOP)", "Suppose that the store stopped answering; how would you know?"),
            ("target gone (kill -9)", "And suppose that it were gone altogether; what would be lost?"),
        ):
            await self.empty_workers()
            if "hangs" in name:
                say("the target hangs: connections stay open, it does not answer")
                trial.child("Store-0").signal(signal.SIGSTOP)
            else:
                say("the target is killed")
                await trial.kill("Store-0")
            played = await self.turn(name, text)
            recompute = await trial.reference(cold=True)
            limit = recompute.ttft_seconds + DEADLINE_SECONDS
            late.append(played.answer.ttft_seconds > limit)
            say(
                f"first token after {played.answer.ttft_seconds:.2f} s; recomputing takes "
                f"{recompute.ttft_seconds:.2f} s, the deadline is {DEADLINE_SECONDS:.0f} s"
            )
        self.report.survived_target_loss = not any(late) and all(turn.identical for turn in self.report.turns[-2:])
        await trial.restart("Store-0")

    async def disconnects(self) -> None:
        """Clients disconnect while they queue and while they read; then the engines must be idle, alive and correct."""
        trial = self.trial
        say("eight clients on four slots; those that still queue leave first, then those that read")
        before = {name: await trial.sources(name) for name in trial.workers}
        clients = [LeavingClient(trial, number) for number in range(8)]

        async def slots_taken() -> bool:
            return sum(client.reads for client in clients) == 4

        await trial.until(slots_taken, "four clients read", 30)
        reading = [client for client in clients if client.reads]
        for client in sorted(clients, key=lambda client: client.reads):
            if client is reading[0]:
                await asyncio.sleep(0.5)
            await client.leave()
        await trial.until_idle()
        served = sum([(await trial.sources(name) - before[name]).total for name in trial.workers]) // len(OPENING)
        say(f"{served} of their prompts were ever computed; {len(trial.workers)} workers live")
        waited_in_vain = served == len(reading) == 4 and sum(client.reads for client in clients) == 4
        alive = len(trial.workers) == 2
        await self.turn("after clients left", "Where were we, before so many others came and went?")
        self.report.survived_disconnects = waited_in_vain and alive and self.report.turns[-1].identical

    async def control(self) -> None:
        """Forged KV with valid checksums: if the comparison does not detect this, it proves nothing."""
        trial = self.trial
        await trial.until_stored()
        say("control: the conversation's chunks on disk are forged, with valid checksums")
        hashes = trial.chunk_hashes(trial.messages, answered=True)
        await trial.kill("Store-0")
        for router_hash in hashes[: len(hashes) // 2]:
            trial.forge(router_hash)
        await trial.restart("Store-0")
        await self.empty_workers()
        await trial.until_stored()
        played = await trial.say_next("One last question, to which the answer should be nonsense.")
        reference = await trial.reference()
        self.report.control_noticed = played.sources.store > 0 and not played.answer.equals(reference)
        say(f"control: {'noticed' if self.report.control_noticed else 'NOT NOTICED'}")


class LeavingClient:
    """A client that disconnects before its response is complete."""

    def __init__(self, trial: Trial, number: int):
        self.reads = False
        self._task = asyncio.create_task(self._read(trial, number))

    async def leave(self) -> None:
        """Disconnect."""
        if self._task.done():
            raise Shortfall(f"a client that should have left got its whole answer: {self._task}")
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self, trial: Trial, number: int) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Client {number} has a long question. " + OPENING}],
            "max_tokens": 2500,
            "stream": True,
        }
        async with aclosing(trial.stream(body)) as parts:
            async for part in parts:
                self.reads |= any(choice["delta"].get("content") for choice in part["choices"])


class Shortfall(Exception):
    """The cluster failed a check of the demo."""


def table(turns: Sequence[TurnReport]) -> str:
    """The turns, one a line."""
    heads = ("turn", "", "worker", "HBM", "DRAM", "store", "computed", "TTFT ms", "identical")
    rows = [
        (
            str(number),
            turn.turn,
            turn.worker,
            str(turn.hbm_tokens),
            str(turn.dram_tokens),
            str(turn.store_tokens),
            str(turn.computed_tokens),
            f"{turn.ttft_ms:.0f}",
            "yes" if turn.identical else "NO",
        )
        for number, turn in enumerate(turns, 1)
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    left = (1, 2)  # words; the rest are numbers
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


_started = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - _started:5.0f} s] {line}", flush=True)


async def run(folder: Path) -> Report:
    for leftover in (folder / "state", folder / "report.json"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        leftover.unlink(missing_ok=True)
    say("starting NATS, a target, two vLLM workers and one without the tier, router and frontend (a minute or two)")
    async with Trial(folder, say, OVERRIDES) as trial:
        return await Demo(trial).play()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = Path(arguments[0] if arguments else ".demo")
    folder.mkdir(parents=True, exist_ok=True)
    _dynamo_logs_to(folder / "dynamo.log")
    try:
        report = asyncio.run(run(folder))
    except (Shortfall, TimeoutError) as error:
        say(f"FAILED: {error}; logs are in {folder / 'state' / 'logs'}")
        return 1
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print("\n" + table(report.turns))
    print(f"\n{report.store_hit_tokens} tokens came from the store; {report.corrupt_detected} corrupt chunk(s) found")
    for claim, held in (
        ("every answer is the reference's, logprob by logprob", report.identical),
        ("the target's loss cost no more than recomputing and the deadline", report.survived_target_loss),
        ("clients that left freed their slots, and the engines live", report.survived_disconnects),
        ("wrong KV under right checksums was noticed", report.control_noticed),
    ):
        print(f"{'yes' if held else 'NO':>4}: {claim}")
    print(f"report: {folder / 'report.json'}")
    return 0 if report.passed else 1


def _dynamo_logs_to(path: Path) -> None:
    """Dynamo's runtime in this process logs each request to the standard error, whatever its log level is. What Python
    says there still comes through."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)


__all__ = ["Answer", "Demo", "Report", "TurnReport", "main", "run", "table"]

if __name__ == "__main__":
    run_command("demo", main)
