"""Announcer and mirror: whatever is lost, reordered or restarted, the mirror ends up with what the target holds."""

import asyncio
import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import residency
from kvstore.bus import Bus, Residency, SnapshotPage, SnapshotRequest
from kvstore.record import Entry
from kvstore.residency import Announcer, Mirror


def entry(router_hash: int, fingerprint: int = 7) -> Entry:
    return Entry(router_hash.to_bytes(16, "big"), router_hash, fingerprint, 1, 10, 0, 2)


class Holdings:
    """What a target holds, with an announcer that hears of every change."""

    def __init__(self, target: str = "t", epoch: int = 1, held: Iterable[int] = ()):
        self.held: dict[int, Entry] = {router_hash: entry(router_hash) for router_hash in held}
        self.announcer = Announcer(target, epoch, lambda: list(self.held.values()))

    def store(self, router_hash: int) -> None:
        self.held[router_hash] = entry(router_hash)
        self.announcer.stored(self.held[router_hash])

    def remove(self, router_hash: int) -> None:
        if gone := self.held.pop(router_hash, None):
            self.announcer.removed(gone)

    def snapshot(self) -> list[SnapshotPage]:
        pages = [self.announcer.snapshot_page(SnapshotRequest(0, 0))]
        while len(pages) < pages[0].pages:
            pages.append(self.announcer.snapshot_page(SnapshotRequest(pages[0].token, len(pages))))
        return pages


def known(mirror: Mirror, hashes: Iterable[int], now: float = 0.0) -> set[int]:
    hashes = list(hashes)
    return {h for h, target in zip(hashes, mirror.locate(7, hashes, now), strict=True) if target}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("srdaq"), st.integers(1, 12)), max_size=60),
    st.integers(1, 4),
    st.sets(st.integers(1, 12)),
)
def test_a_mirror_ends_up_with_what_is_held(steps: list[tuple[str, int]], page: int, held: set[int]) -> None:
    """Steps: store, remove, announce and drop, announce and deliver, restart in a new epoch. Snapshots arrive late."""
    whole = residency.PAGE_HASHES
    residency.PAGE_HASHES = page
    try:
        holdings, mirror = Holdings(held=held), Mirror()
        epoch = 1
        asked: list[list[SnapshotPage]] = []

        def deliver(message: Residency) -> None:
            if mirror.apply(message, 0.0):
                asked.append(holdings.snapshot())

        for step, router_hash in steps:
            match step:
                case "s":
                    holdings.store(router_hash)
                case "r":
                    holdings.remove(router_hash)
                case "d":
                    holdings.announcer.announcements()
                case "a":
                    for message in holdings.announcer.announcements():
                        deliver(message)
                    if asked and router_hash % 2:
                        mirror.apply_snapshot(asked.pop(0))
                case "q":
                    epoch += 1
                    holdings = Holdings(epoch=epoch, held=holdings.held)
        for _ in range(3):  # heartbeats; at most one gap, one snapshot, one confirmation
            for message in holdings.announcer.announcements():
                deliver(message)
            while asked:
                if not mirror.apply_snapshot(asked.pop(0)):
                    mirror.give_up_snapshot("t")
        assert known(mirror, range(1, 13)) == set(holdings.held)
    finally:
        residency.PAGE_HASHES = whole


def test_a_gap_asks_once() -> None:
    holdings, mirror = Holdings(held=[1]), Mirror()
    messages = []
    for router_hash in (2, 3, 4, 5):
        holdings.store(router_hash)
        messages += holdings.announcer.announcements()
    assert mirror.apply(messages[0], 0.0)
    assert mirror.apply_snapshot(holdings.snapshot())
    assert not mirror.apply(messages[1], 0.0)  # the snapshot knew it already
    holdings.store(6)
    (lost,) = holdings.announcer.announcements()
    holdings.store(7)
    (after,) = holdings.announcer.announcements()
    assert lost.seq + 1 == after.seq
    assert mirror.apply(after, 0.0)
    holdings.store(8)
    (later,) = holdings.announcer.announcements()
    assert not mirror.apply(later, 0.0)  # a snapshot is under way
    assert known(mirror, range(9)) == set()  # and until it is there, nothing is claimed
    assert mirror.apply_snapshot(holdings.snapshot())
    assert known(mirror, range(9)) == set(range(1, 9))


def test_a_snapshot_that_is_too_old_to_join_is_refused() -> None:
    holdings, mirror = Holdings(held=[1]), Mirror()
    old = holdings.snapshot()
    for router_hash in range(2, 6):
        holdings.store(router_hash)
        messages = holdings.announcer.announcements()
    assert mirror.apply(messages[0], 0.0)
    assert not mirror.apply_snapshot(old)
    holdings.store(6)
    assert mirror.apply(holdings.announcer.announcements()[0], 0.0)  # asks again


def test_a_silent_target_is_left_out_and_forgotten() -> None:
    holdings, mirror = Holdings(held=[1]), Mirror(max_age_seconds=10)
    mirror.apply(holdings.announcer.announcements()[0], 100.0)
    mirror.apply_snapshot(holdings.snapshot())
    assert known(mirror, [1], 105.0) == {1}
    assert known(mirror, [1], 111.0) == set()
    assert mirror.counts(105.0) == {"t": 1}
    mirror.forget_silent(200.0)
    assert mirror.counts(100.0) == {}


def test_layouts_do_not_mix() -> None:
    mirror = Mirror()
    announcer = Announcer("t", 1, lambda: [entry(1, fingerprint=7), entry(2, fingerprint=8)])
    mirror.apply(announcer.announcements()[0], 0.0)
    first = announcer.snapshot_page(SnapshotRequest(0, 0))
    mirror.apply_snapshot([first, announcer.snapshot_page(SnapshotRequest(first.token, 1))])
    assert mirror.locate(7, [1, 2], 0.0) == ["t", None]
    assert mirror.locate(8, [1, 2], 0.0) == [None, "t"]
    assert mirror.locate(9, [1, 2], 0.0) == [None, None]


def test_chunks_without_a_router_hash_are_not_announced() -> None:
    announcer = Announcer("t", 1, lambda: [entry(0)])
    announcer.stored(entry(0))
    (heartbeat,) = announcer.announcements()
    assert heartbeat.stored == []
    assert announcer.snapshot_page(SnapshotRequest(0, 0)).hashes == b""


def test_changes_beyond_the_bound_become_a_gap() -> None:
    holdings = Holdings()
    bound, residency.PENDING_MAX = residency.PENDING_MAX, 10
    try:
        (first,) = holdings.announcer.announcements()
        for router_hash in range(1, 30):
            holdings.store(router_hash)
        (message,) = holdings.announcer.announcements()
    finally:
        residency.PENDING_MAX = bound
    assert message.seq > first.seq + 1


def test_an_expired_token_has_no_pages() -> None:
    announcer = Holdings(held=[1]).announcer
    assert announcer.snapshot_page(SnapshotRequest(12345, 0)).pages == 0
    page = announcer.snapshot_page(SnapshotRequest(0, 0))
    assert announcer.snapshot_page(SnapshotRequest(page.token, 1)).pages == 0


async def test_over_nats_two_mirrors_follow_two_targets(nats_url: str, seed: int) -> None:
    chance = random.Random(seed)
    line = await Bus.connect(nats_url, "test")
    mirrors = [Mirror(), Mirror()]
    targets = [Holdings("10.0.0.1:7600", held=range(1, 50)), Holdings("10.0.0.2:7600", epoch=9, held=range(50, 60))]
    tasks = [asyncio.create_task(residency.announce(one.announcer, line, "test")) for one in targets]
    tasks.append(asyncio.create_task(residency.follow(mirrors[0], line, "test")))
    for _ in range(200):
        target = chance.choice(targets)
        (target.store if chance.random() < 0.7 else target.remove)(chance.randrange(1, 100))
        if chance.random() < 0.1:
            await asyncio.sleep(0.02)
    tasks.append(asyncio.create_task(residency.follow(mirrors[1], line, "test")))  # late to the party
    held = set(targets[0].held) | set(targets[1].held)
    clock = asyncio.get_running_loop().time
    for mirror in mirrors:
        deadline = clock() + 20
        while (found := known(mirror, range(1, 101), clock())) != held and clock() < deadline:
            await asyncio.sleep(0.05)
        assert found == held
    for task in tasks:
        task.cancel()
    await line.close()
