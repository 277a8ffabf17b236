"""The bus is shared and nobody signs what is said there: what is no message is counted, and the next one is heard."""

import asyncio
import random

import msgspec
import nats

from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import Residency, SnapshotPage, SnapshotRequest, TargetReport, WorkerReport

REPORT = WorkerReport("5", "d.b.g", 7, 16, 1, 1000, 0)


async def test_forged_and_corrupt_messages_are_counted_and_passed_over(nats_url: str, seed: int) -> None:
    chance = random.Random(seed)
    sound = msgspec.msgpack.encode(REPORT)
    nested = b"\x91" * 100_000 + b"\xc0"
    forged = [
        b"",
        nested,
        msgspec.msgpack.encode({"worker": nested}),
        msgspec.msgpack.encode({**msgspec.to_builtins(REPORT), "worker": 5}),
        msgspec.msgpack.encode({**msgspec.to_builtins(REPORT), "ts_ms": 1 << 63})[:-9] + b"\xc1" * 9,
        sound.replace(b"d.b.g", b"\xff\xfe\xfd\xfc\xfb"),
        msgspec.msgpack.encode(TargetReport("t", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        msgspec.msgpack.encode(Residency("t", 1, 1, 0, 0, [], [], 0)),
        *(sound[: chance.randrange(len(sound))] for _ in range(50)),
        *(chance.randbytes(chance.randrange(1, 200)) for _ in range(50)),
    ]
    forged = [one for one in forged if _decodes(one) is None]
    line, forger = await Bus.connect(nats_url, "test"), await nats.connect(nats_url)
    heard: list[int] = []

    async def hear(report: WorkerReport) -> None:
        heard.append(report.ts_ms)

    async def until_heard(ts_ms: int) -> None:
        async with asyncio.timeout(30):
            while ts_ms not in heard:
                await forger.publish(to, msgspec.msgpack.encode(msgspec.structs.replace(REPORT, ts_ms=ts_ms)))
                await asyncio.sleep(0.02)

    await line.subscribe(messages.subject("forged", "speed.worker"), WorkerReport, hear)
    to = messages.subject("forged", "speed.worker", "5")
    await until_heard(1)  # a subscription takes effect some time after it was made
    for one in forged:
        await forger.publish(to, one)
    await until_heard(2)
    assert line.undecoded == {"WorkerReport": len(forged)}

    async def lie(raw: object) -> None:
        await raw.respond(b"\x91\xff")  # type: ignore[attr-defined]

    await forger.subscribe("liar", cb=lie)
    await forger.flush()
    async with line.conversation("liar") as peer:
        assert await peer.ask(SnapshotRequest(0, 0), SnapshotPage, seconds=20) is None
    await forger.close()
    await line.close()


def _decodes(one: bytes) -> WorkerReport | None:
    try:
        return msgspec.msgpack.decode(one, type=WorkerReport)
    except (ValueError, RecursionError):
        return None
