"""An adversary as target: manipulated answers, and how many a client accepts as hits, with and without seals.

    python -m benchmarks.store.hostile --seed S [--answers 10000] [--forged 300] [--json FILE]

The adversary is a server that speaks the protocol. It stores the puts of honest workers: with seal keys in use, with
older and retired ones, and of another tenant. It answers each GET with a manipulated value. The crc is right wherever
possible, so that only a seal can detect the manipulation. One answer in eleven is honest, and must be a hit. A
manipulated answer is accepted if its outcome is HIT. The same manipulations go to a client that authenticates, to one
that encrypts, and, as the control, to one without seals.

Then the adversary is on the bus and in etcd (hostile_bus.py).

The exit code is 1 in any of these cases:

- a client with seals accepted a manipulated answer;
- an answer was not counted, or an honest answer was not a hit;
- the client without seals accepted nothing, so the manipulations prove nothing;
- a router's state is still wrong some time after the last forged message.
"""

import argparse
import hashlib
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from benchmarks.store import hostile_bus
from benchmarks.store.adversary import BOUND_SECONDS, Adversary, Answer
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from kvstore.seal import TRAILER_BYTES, Mode, Seal, SealKey

CHUNKS = 24
SIZES = (16, 1000, 16_384)  # of chunks, in turn: short ones, of which the trailer is most, and those of several packets
HONEST_EVERY = 10
EXCHANGED = "answers exchanged"
OUR_KEY_ID = 2
_KEY_IDS = {"ours": OUR_KEY_ID, "older": 1, "retired": 3, "tenant": OUR_KEY_ID}
_BITS_MAX = 8
# In a trailer: docs/wire.md.
_VERSION_AT, _MODE_AT, _KEY_ID_AT, _NONCE_AT, _TAG_AT = 4, 5, 8, 12, 36


class Group(NamedTuple):
    """Workers that share values: each chunk's content, and the value that they put."""

    seal_key: SealKey | None
    contents: list[bytes]
    stored: list[bytes]


class Manipulations:
    """Each makes one answer for a chunk. The groups: `ours`, the same workers with `older` and `retired` seal keys, and
    another `tenant`."""

    def __init__(self, chance: random.Random, groups: dict[str, Group], mode: Mode | None):
        self._chance = chance
        self._groups = groups
        self._mode = mode
        self.kinds: dict[str, Callable[[int], Answer]] = {
            "bits flipped": lambda chunk: Answer(self._flipped(self._stored(chunk))),
            "bits flipped, old crc": lambda chunk: Answer(
                self._flipped(self._stored(chunk)), crc=crc32c(self._stored(chunk))
            ),
            "bits of the trailer flipped": self._trailer_flipped,
            "another key's value": lambda chunk: Answer(self._stored(self._another(chunk))),
            "another key's trailer": self._spliced,
            EXCHANGED: lambda chunk: Answer(self._stored(chunk)),
            "older key's value": lambda chunk: Answer(self._of("older", chunk)),
            "older key's value, relabelled": lambda chunk: Answer(self._relabelled(self._of("older", chunk))),
            "retired key's value": lambda chunk: Answer(self._of("retired", chunk)),
            "retired key's value, relabelled": lambda chunk: Answer(self._relabelled(self._of("retired", chunk))),
            "another tenant's value": lambda chunk: Answer(self._of("tenant", chunk)),
            "sealed by another tenant for this key": self._sealed_by_tenant,
            "unsealed": self._unsealed,
            "forged tag": self._forged,
            "another nonce": lambda chunk: Answer(self._patched(self._stored(chunk), _NONCE_AT, _TAG_AT)),
            "another mode": lambda chunk: Answer(self._patched(self._stored(chunk), _MODE_AT, _MODE_AT + 1, by=3)),
            "another version": lambda chunk: Answer(self._patched(self._stored(chunk), _VERSION_AT, _MODE_AT)),
            "shifted": self._shifted,
            "truncated": lambda chunk: Answer(self._stored(chunk)[: -chance.randint(1, TRAILER_BYTES)]),
            "truncated and filled": self._refilled,
            "extended": lambda chunk: Answer(self._stored(chunk) + chance.randbytes(chance.randint(1, 100))),
            "cut off": self._cut_off,
            "a hit for what was never put": lambda chunk: Answer(chance.randbytes(len(self._stored(chunk)))),
            "a miss for what is there": lambda chunk: Answer(b"", Outcome.MISS),
            "an outcome that does not exist": lambda chunk: Answer(self._stored(chunk), chance.randint(7, 65535)),
        }

    def _stored(self, chunk: int) -> bytes:
        return self._groups["ours"].stored[chunk]

    def _of(self, group: str, chunk: int) -> bytes:
        return self._groups[group].stored[chunk]

    def _another(self, chunk: int) -> int:
        """Another chunk of the same length."""
        return self._chance.choice([other for other in range(chunk % len(SIZES), CHUNKS, len(SIZES)) if other != chunk])

    def _flipped(self, value: bytes, begin: int = 0) -> bytes:
        flipped = bytearray(value)
        for bit in self._chance.sample(range(8 * begin, 8 * len(value)), self._chance.randint(1, _BITS_MAX)):
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)

    def _trailer_flipped(self, chunk: int) -> Answer:
        value = self._stored(chunk)
        return Answer(self._flipped(value, max(0, len(value) - TRAILER_BYTES)))

    def _spliced(self, chunk: int) -> Answer:
        other = self._stored(self._another(chunk))
        cut = max(1, len(other) - TRAILER_BYTES)
        return Answer(self._stored(chunk)[:cut] + other[cut:])

    def _patched(self, value: bytes, begin: int, end: int, by: int = 0) -> bytes:
        """Other bytes at a place in the trailer or, without one, as near to it as there is room. `by` makes `mac` of
        `encrypt`, and the other way round, where it is 3."""
        patched = bytearray(value)
        trailer = max(0, len(value) - TRAILER_BYTES)
        for place in range(min(trailer + begin, len(value) - 1), min(trailer + end, len(value))):
            patched[place] ^= by or self._chance.randint(1, 255)
        return bytes(patched)

    def _relabelled(self, value: bytes) -> bytes:
        place = len(value) - TRAILER_BYTES + _KEY_ID_AT
        return value if place < 0 else value[:place] + OUR_KEY_ID.to_bytes(4, "little") + value[place + 4 :]

    def _sealed_by_tenant(self, chunk: int) -> Answer:
        """With the same id, for the name that our workers use."""
        tenant, ours = self._groups["tenant"], self._groups["ours"]
        if self._mode is None or tenant.seal_key is None or ours.seal_key is None:
            return Answer(tenant.contents[chunk])
        name = ours.seal_key.name(chunk_key(chunk))
        stored, trailer = tenant.seal_key.seal(name, memoryview(tenant.contents[chunk]), self._mode)
        return Answer(bytes(stored) + trailer)

    def _unsealed(self, chunk: int) -> Answer:
        """A value from a writer that knows the length but has no seal key."""
        planted = self._groups["tenant"].contents[chunk]
        return Answer(planted + bytes(len(self._stored(chunk)) - len(planted)))

    def _forged(self, chunk: int) -> Answer:
        value = self._stored(chunk)
        tag_bytes = TRAILER_BYTES - _TAG_AT
        return Answer(value[:-tag_bytes] + self._chance.randbytes(min(tag_bytes, len(value))))

    def _shifted(self, chunk: int) -> Answer:
        """The value shifted by some bytes, so that the payload's end is where the trailer should be."""
        value, by = self._stored(chunk), self._chance.randint(1, TRAILER_BYTES)
        return Answer((self._chance.randbytes(by) + value)[: len(value)])

    def _refilled(self, chunk: int) -> Answer:
        value = self._stored(chunk)
        cut = self._chance.randrange(len(value))
        return Answer(value[:cut] + self._chance.randbytes(len(value) - cut))

    def _cut_off(self, chunk: int) -> Answer:
        value = self._stored(chunk)
        return Answer(value, sent=self._chance.randrange(len(value)))


class Side(msgspec.Struct):
    """One client's results."""

    manipulated: int
    accepted: int  # of these, taken for hits
    uncounted: int  # of these, with seals, neither accepted nor given a reason
    honest: int
    honest_hits: int
    outcomes: dict[str, int]  # of manipulated answers
    reasons: dict[str, int]
    accepted_by_kind: dict[str, int]
    reasons_by_kind: dict[str, dict[str, int]]


class Result(msgspec.Struct):
    seed: int
    mac: Side
    encrypt: Side
    off: Side
    bus: hostile_bus.Forged

    @property
    def failures(self) -> list[str]:
        failed = []
        for name, side in (("mac", self.mac), ("encrypt", self.encrypt), ("off", self.off)):
            if side.honest_hits != side.honest:
                failed.append(f"{name}: {side.honest - side.honest_hits} honest answers were no hits")
            if name != "off" and side.accepted:
                failed.append(f"{name}: {side.accepted} manipulated answers were accepted: {side.accepted_by_kind}")
            if side.uncounted:
                failed.append(f"{name}: {side.uncounted} manipulated answers were not counted")
        if not self.off.accepted:
            failed.append("off: nothing was accepted, so the manipulations are none")
        return failed + self.bus.failures


def chunk_key(chunk: int) -> bytes:
    return chunk.to_bytes(16, "big")


class Client:
    """A client of the adversary. It is replaced after a broken connection, since it would back off from the target."""

    def __init__(self, address: str, seal: Seal | None):
        self.seal = seal
        self._address = address
        self._store = self._connect()

    def put(self, items: Sequence[Item]) -> None:
        outcomes = self._store.put(items, time.monotonic() + BOUND_SECONDS)
        assert set(outcomes) == {Outcome.STORED}, outcomes

    def get(self, chunks: Sequence[int], sizes: Sequence[int]) -> tuple[list[Outcome], list[bytes]]:
        rooms = [memoryview(bytearray(size)) for size in sizes]
        keys = [chunk_key(chunk) for chunk in chunks]
        outcomes = self._store.get(keys, rooms, time.monotonic() + BOUND_SECONDS)
        if Outcome.UNREACHABLE in outcomes:
            self._store.close()
            self._store = self._connect()
        return outcomes, [bytes(room) for room in rooms]

    def close(self) -> None:
        self._store.close()

    def _connect(self) -> StoreClient:
        return StoreClient(StaticMembership([self._address]), connections_per_target=1, seal=self.seal)


def play(mode: Mode | None, seed: int, answers: int) -> Side:
    """Send `answers` manipulated answers to a client of one mode. Without seals, the groups have plain values of the
    same chunks."""
    adversary = Adversary()
    groups = {name: _group(adversary, mode, seed, name, id) for name, id in _KEY_IDS.items()}
    ring = [key for name in ("ours", "older") if (key := groups[name].seal_key) is not None]
    client = Client(adversary.address, Seal(ring, mode) if mode is not None else None)
    logger = logging.getLogger("kvstore")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the client would log each answer
    try:
        return _Game(adversary, client, groups, mode, seed).run(answers)
    finally:
        logger.setLevel(level)
        client.close()
        adversary.close()


def _group(adversary: Adversary, mode: Mode | None, seed: int, name: str, key_id: int) -> Group:
    """Workers that put all chunks, each group its own content, as real workers with real seals."""
    secret = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=32).digest()
    seal_key = SealKey(key_id, secret) if mode is not None else None
    worker = Client(adversary.address, Seal([seal_key], mode) if seal_key is not None and mode is not None else None)
    contents = [random.Random(f"{seed} {name} {chunk}").randbytes(SIZES[chunk % len(SIZES)]) for chunk in range(CHUNKS)]
    worker.put([Item(chunk_key(chunk), memoryview(content), 0, 7, 1) for chunk, content in enumerate(contents)])
    worker.close()
    return Group(seal_key, contents, [adversary.values[_name(seal_key, chunk)] for chunk in range(CHUNKS)])


def _name(seal_key: SealKey | None, chunk: int) -> bytes:
    return chunk_key(chunk) if seal_key is None else seal_key.name(chunk_key(chunk))


class _Game:
    """One client against the adversary."""

    def __init__(self, adversary: Adversary, client: Client, groups: dict[str, Group], mode: Mode | None, seed: int):
        self._adversary = adversary
        self._client = client
        self._contents = groups["ours"].contents
        self._stored = groups["ours"].stored
        self._chance = random.Random(seed)
        self._kinds = Manipulations(self._chance, groups, mode).kinds
        self._chunk_of = {_name(groups[name].seal_key, n): n for name in ("older", "ours") for n in range(CHUNKS)}
        self._outcomes: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {kind: Counter() for kind in self._kinds}
        self._uncounted = 0

    def run(self, answers: int) -> Side:
        honest = honest_hits = manipulated = 0
        while manipulated < answers:
            if manipulated >= honest * HONEST_EVERY:
                chunk = self._chance.randrange(CHUNKS)
                honest += 1
                honest_hits += self._ask([chunk], lambda chunk: Answer(self._stored[chunk])) == [(Outcome.HIT, True)]
            kind = self._chance.choice(list(self._kinds))
            manipulated += self._round(kind)
        return Side(
            manipulated=manipulated,
            accepted=self._accepted.total(),
            uncounted=self._uncounted,
            honest=honest,
            honest_hits=honest_hits,
            outcomes=dict(self._outcomes),
            reasons=dict(sum(self._reasons.values(), Counter())),
            accepted_by_kind=dict(self._accepted),
            reasons_by_kind={kind: dict(reasons) for kind, reasons in self._reasons.items()},
        )

    def _round(self, kind: str) -> int:
        """Run one GET with manipulated answers. Returns their number."""
        chunk = self._chance.randrange(CHUNKS)
        chunks = [chunk]
        if kind == EXCHANGED:
            chunks.append((chunk + len(SIZES)) % CHUNKS)  # of the same length
        before = self._rejected()
        self._adversary.exchange_numbers = kind == EXCHANGED
        answers = self._ask(chunks, lambda chunk: self._manipulated(kind, chunk))
        self._adversary.exchange_numbers = False
        reasons = self._rejected() - before
        for outcome, _ in answers:
            self._outcomes[outcome.name.lower()] += 1
            if outcome is Outcome.HIT:
                self._accepted[kind] += 1
            elif outcome is not Outcome.CORRUPT and not reasons:
                reasons[outcome.name.lower()] += 1  # the protocol's own reasons
        self._reasons[kind] += reasons
        if self._client.seal is not None:
            hits = sum(outcome is Outcome.HIT for outcome, _ in answers)
            self._uncounted += abs(len(answers) - hits - reasons.total())
        return len(answers)

    def _manipulated(self, kind: str, chunk: int) -> Answer:
        honest = Answer(self._stored[chunk])
        answer = self._kinds[kind](chunk)
        while kind != EXCHANGED and answer._replace(crc=None) == honest:  # the random bytes equal the original
            answer = self._kinds[kind](chunk)
        return answer

    def _ask(self, chunks: Sequence[int], answer: Callable[[int], Answer]) -> list[tuple[Outcome, bool]]:
        """The outcome of each, and whether the bytes are those that were put."""
        self._adversary.answer = lambda name, size: answer(self._chunk_of[name])
        outcomes, values = self._client.get(chunks, [len(self._contents[chunk]) for chunk in chunks])
        return [
            (outcome, value == self._contents[chunk])
            for outcome, value, chunk in zip(outcomes, values, chunks, strict=True)
        ]

    def _rejected(self) -> Counter[str]:
        return Counter(self._client.seal.rejected if self._client.seal is not None else {})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answers", type=int, default=10_000, help="manipulated ones, to each client")
    parser.add_argument("--forged", type=int, default=300, help="forged messages of each kind on the bus")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    mac, encrypt, off = (play(mode, options.seed, options.answers) for mode in (Mode.MAC, Mode.ENCRYPT, None))
    result = Result(options.seed, mac, encrypt, off, hostile_bus.play(options.seed, options.forged))
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    for failure in result.failures:
        print(failure, file=sys.stderr)
    if options.json:
        options.json.write_text(report + "\n")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
