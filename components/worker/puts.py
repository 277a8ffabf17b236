"""Chunks on their way to the store, behind the requests that computed them.

A job to store is put in pieces. What a mover leaves unanswered when it ends, the next one tries once more: to put twice
does no harm. What has no room is left over, in the order of the prompt, and put later if it is still in DRAM.
"""

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from components.worker.compat import JobId, JobResult, OffloadKey, ReqContext, TransferJob
from components.worker.counters import STORED, STORED_BYTES, Counters
from components.worker.mover import frames
from components.worker.mover.link import Job, MoverLink
from components.worker.tier_request import TierRequest, names

# Of all rows. Those that wait for a put cannot be evicted: with more of them the tier would stand in the engine's way.
ROWS_SHARE = 0.25
# Of one piece.
PIECE_CHUNKS = 256
PIECE_BYTES = 64 << 20
# With puts under way, the mover answers one at least so often, unless it hangs: it gives a piece 10 seconds, and gives
# way to loads for a moment before each 8 MiB of it.
HUNG_SECONDS = 60.0
# Puts wait for a mover that is back so soon; for longer their rows are not kept from the engine.
GONE_SECONDS = 1.0

Pin = Callable[[list[OffloadKey], ReqContext], TransferJob | None]


@dataclass(eq=False)
class _Piece(Job):
    """A part of a job to store."""

    command: frames.Put
    job_id: JobId
    request: TierRequest
    retried: bool = False


@dataclass(eq=False)
class _Leftover:
    """What of a job to store had no room, in the order of the prompt."""

    request: TierRequest
    keys: list[OffloadKey]


class Puts:
    """For the scheduler's thread, with the tier (remote_tier.py). No method blocks. Jobs that have ended are added to
    `finished`."""

    def __init__(self, link: MoverLink, counters: Counters, finished: list[JobResult], *, rows: int, row_bytes: int):
        self._link, self._counters, self._finished = link, counters, finished
        self._row_bytes = row_bytes
        self._piece_chunks = max(1, min(PIECE_CHUNKS, PIECE_BYTES // max(1, row_bytes)))
        self._rows_max = int(ROWS_SHARE * rows)
        self._rows = 0
        self._pieces: dict[int, _Piece] = {}  # by a number of their own
        self._pieces_left: dict[JobId, int] = {}  # of a job, how many are under way
        self._number = 0
        self._progress = 0.0  # when the mover answered last, or need not have
        self._leftovers: deque[_Leftover] = deque()
        self._leftover_chunks = 0
        self._leftover_chunks_max = rows  # what is put later has to be in DRAM still

    @property
    def pending(self) -> bool:
        return bool(self._pieces)

    # ---- jobs

    def submit(self, job: TransferJob, request: TierRequest | None) -> None:
        """Put a job's chunks as far as there is room. What waits already goes first."""
        if request is None or request.identity is None:
            self._counters.add(STORED, len(job.keys), "dropped")
            self._finished.append(JobResult(job.job_id, True))
            return
        # The leading chunks are of use without the rest, not the other way round.
        kept = 0 if self._leftovers else self._room
        self._leave_over(request, list(job.keys)[kept:])
        self._put(job, request, kept)

    def submit_leftovers(self, pin: Pin) -> None:
        """Put what had no room, as far as there is some now. `pin` makes a job of those keys that are in DRAM still;
        None: none is."""
        while self._leftovers and self._room >= min(self._piece_chunks, self._rows_max):
            request, keys = self._leftovers[0].request, self._leftovers[0].keys[: self._piece_chunks]
            self._take_over(len(keys))
            job = pin(keys, request.context) if request.identity is not None else None
            found = 0 if job is None else len(job.keys)
            if found < len(keys):
                self._counters.add(STORED, len(keys) - found, "dropped")
            if job is not None:
                self._put(job, request, found)

    def forget_leftovers(self) -> None:
        """Their rows are about to go."""
        self._leftovers.clear()
        self._leftover_chunks = 0

    @property
    def _room(self) -> int:
        """How many more rows may wait for a put."""
        if self._link.gone_seconds > GONE_SECONDS or self._link.full:
            return 0
        return max(0, self._rows_max - self._rows)

    def _leave_over(self, request: TierRequest, keys: list[OffloadKey]) -> None:
        if keys:
            self._leftovers.append(_Leftover(request, keys))
            self._leftover_chunks += len(keys)
        while (excess := self._leftover_chunks - self._leftover_chunks_max) > 0:
            dropped = min(excess, len(self._leftovers[0].keys))
            self._take_over(dropped)
            self._counters.add(STORED, dropped, "dropped")

    def _take_over(self, count: int) -> None:
        """Take the leading chunks from the leftover that is first in the queue."""
        del self._leftovers[0].keys[:count]
        self._leftover_chunks -= count
        if not self._leftovers[0].keys:
            self._leftovers.popleft()

    def _put(self, job: TransferJob, request: TierRequest, count: int) -> None:
        """The first so many chunks of a job."""
        keys, rows = list(job.keys)[:count], job.chunk_ids.tolist()[:count]
        if not keys:
            self._finished.append(JobResult(job.job_id, True))
            return
        assert request.identity is not None
        saved = 0.0 if request.plan is None else request.plan.chunk_ms / 1000
        if not self._pieces:
            self._progress = time.monotonic()
        starts = range(0, len(keys), self._piece_chunks)
        for start in starts:
            part = slice(start, start + self._piece_chunks)
            chunks = [request.chunk(key) for key in keys[part]]
            self._number += 1
            command = frames.Put(
                self._number, request.number, request.identity, names(keys[part]), rows[part], chunks, saved
            )
            self._pieces[self._number] = piece = _Piece(command, job.job_id, request)
            if not self._link.dead:
                self._send(piece)
        self._pieces_left[job.job_id] = len(starts)
        self._rows += len(keys)
        self._link.flush()

    def _send(self, piece: _Piece) -> None:
        """Its request's tokens first, of which the chunks' router hashes are made."""
        request = piece.request
        self._send_tokens(request, max(piece.command.chunks, default=-1))
        self._link.add(piece)
        if request.gone and self._link.say(frames.Forget(request.number)):
            request.tokens_sent = 0

    def _send_tokens(self, of: TierRequest, chunk: int) -> None:
        """The request's tokens up to the end of the chunk, where its blocks depend on nothing but tokens, LoRA and
        salt: a router can compute the hashes of no others."""
        request = of.engine_request
        if request is None or request.mm_features or request.prompt_embeds is not None:
            return
        end = (chunk + 1) * of.chunk_tokens
        salt = (request.cache_salt or "").removeprefix("dynamo-cache-salt:") or None
        lora = request.lora_request.name if request.lora_request else None
        while of.tokens_sent < end:
            first = of.tokens_sent
            tokens = array("I", request.all_token_ids[first : min(end, first + frames.TOKENS_MAX)])
            if not tokens or not self._link.say(frames.Tokens(of.number, first, tokens.tobytes(), lora, salt)):
                return
            of.tokens_sent += len(tokens)

    # ---- the mover

    def stored(self, report: frames.Stored) -> None:
        if (piece := self._pieces.get(report.job)) is None:
            self._link.kill(f"protocol error: unknown put {report.job}")
        else:
            self._finish(piece, report.outcomes)

    def watch(self, now: float) -> None:
        """End a mover that does not answer."""
        if not self._link.ready:
            self._progress = now  # how long a mover may take to start is the link's business
        if self._pieces and now > self._progress + HUNG_SECONDS:
            self._link.kill("a put is not answered")

    def mover_ended(self) -> None:
        """What it had not stored, the next one tries once more."""
        for piece in list(self._pieces.values()):
            piece.request.tokens_sent = 0
            if piece.retried:
                self._give_up(piece)
            piece.retried = True
        self.wait_for_mover()

    def mover_started(self) -> None:
        self._progress = time.monotonic()
        for piece in self._pieces.values():
            self._send(piece)

    def wait_for_mover(self) -> None:
        """Give up if the next one is not started soon, or never."""
        if self._link.gone_seconds > GONE_SECONDS:
            for piece in list(self._pieces.values()):
                self._give_up(piece)

    def retry_none(self) -> None:
        """When the mover ends, what it had not stored has failed."""
        for piece in self._pieces.values():
            piece.retried = True

    def _give_up(self, piece: _Piece) -> None:
        self._finish(piece, ["unreachable"] * len(piece.command.rows))

    def _finish(self, piece: _Piece, outcomes: list[str]) -> None:
        """The mover reads none of the piece's rows any more."""
        for name, chunks in Counter(outcomes).items():
            self._counters.add(STORED, chunks, name)
        self._counters.add(STORED_BYTES, outcomes.count("stored") * self._row_bytes)
        piece.done = True
        self._progress = time.monotonic()
        del self._pieces[piece.command.job]
        self._rows -= len(piece.command.rows)
        self._pieces_left[piece.job_id] -= 1
        if not self._pieces_left[piece.job_id]:
            del self._pieces_left[piece.job_id]
            self._finished.append(JobResult(piece.job_id, True))
