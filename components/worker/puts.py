"""Write-behind: chunks on their way to the store, after the requests that computed them.

A store job is put in pieces. If a mover ends without an answer, the next mover retries the piece once: puts are
idempotent. Chunks without room are left over, in the order of the prompt, and put later if they are still in DRAM.
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

# Share of all rows. Rows that wait for a put cannot be evicted: with more of them the engine would run out of rows.
ROWS_SHARE = 0.25
# The size of a piece.
PIECE_CHUNKS = 256
PIECE_BYTES = 64 << 20
# A mover with puts in flight that answers none for this long hangs. A put times out after 10 seconds, plus a moment
# before each 8 MiB of it, for which it gives way to loads.
HUNG_SECONDS = 60.0
# Puts wait this long for the next mover. After it, the engine gets their rows back.
GONE_SECONDS = 1.0

Pin = Callable[[list[OffloadKey], ReqContext], TransferJob | None]


@dataclass(eq=False)
class _Piece(Job):
    """A part of a store job."""

    command: frames.Put
    job_id: JobId
    request: TierRequest
    retried: bool = False


@dataclass(eq=False)
class _Leftover:
    """The chunks of a store job that had no room, in the order of the prompt."""

    request: TierRequest
    keys: list[OffloadKey]


class Puts:
    """For the scheduler's thread; used by the tier (remote_tier.py). No method blocks. Ended jobs are added to
    `finished`."""

    def __init__(self, link: MoverLink, counters: Counters, finished: list[JobResult], *, rows: int, row_bytes: int):
        self._link, self._counters, self._finished = link, counters, finished
        self._row_bytes = row_bytes
        self._piece_chunks = max(1, min(PIECE_CHUNKS, PIECE_BYTES // max(1, row_bytes)))
        self._rows_max = int(ROWS_SHARE * rows)
        self._rows = 0
        self._pieces: dict[int, _Piece] = {}  # by their own number
        self._pieces_left: dict[JobId, int] = {}  # pieces in flight, by job
        self._number = 0
        self._progress = 0.0  # when the mover answered last, or had nothing to answer
        self._leftovers: deque[_Leftover] = deque()
        self._leftover_chunks = 0
        self._leftover_chunks_max = rows  # leftovers have to be in DRAM, so there are no more than rows

    @property
    def pending(self) -> bool:
        return bool(self._pieces)

    # ---- jobs

    def submit(self, job: TransferJob, request: TierRequest | None) -> None:
        """Put as many of a job's chunks as have room. Leftovers go first."""
        if request is None or request.identity is None:
            self._counters.add(STORED, len(job.keys), "dropped")
            self._finished.append(JobResult(job.job_id, True))
            return
        # The leading chunks are useful without the rest, but not vice versa.
        kept = 0 if self._leftovers else self._room
        self._leave_over(request, list(job.keys)[kept:])
        self._put(job, request, kept)

    def submit_leftovers(self, pin: Pin) -> None:
        """Put as many leftovers as have room now. `pin` makes a job of the keys that are still in DRAM, or returns
        None."""
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
        """Their rows are about to be evicted."""
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
        """Put the first `count` chunks of a job."""
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
        """Send the request's tokens first: the mover computes the chunks' router hashes from them."""
        request = piece.request
        self._send_tokens(request, max(piece.command.chunks, default=-1))
        self._link.add(piece)
        if request.gone and self._link.say(frames.Forget(request.number)):
            request.tokens_sent = 0

    def _send_tokens(self, of: TierRequest, chunk: int) -> None:
        """Send the request's tokens up to the end of the chunk. Only if its blocks depend on nothing but tokens, LoRA
        and salt: routers cannot compute the hashes of others."""
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
        """Let the next mover retry the unanswered pieces once."""
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
        """Give up if the next mover does not start soon."""
        if self._link.gone_seconds > GONE_SECONDS:
            for piece in list(self._pieces.values()):
                self._give_up(piece)

    def retry_none(self) -> None:
        """From here on, unanswered pieces fail when the mover ends."""
        for piece in self._pieces.values():
            piece.retried = True

    def _give_up(self, piece: _Piece) -> None:
        self._finish(piece, ["unreachable"] * len(piece.command.rows))

    def _finish(self, piece: _Piece, outcomes: list[str]) -> None:
        """Precondition: the mover no longer reads the piece's rows."""
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
