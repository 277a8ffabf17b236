"""Announcer and mirror: whatever is lost, reordered or restarted, the mirror ends up with what the target holds."""

import asyncio
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable

import msgspec
import nats
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from nats.aio.msg import Msg

from kvstore.bus import messages, residency
from kvstore.bus.connection import Bus
from kvstore.bus.messages import ReplayRequest, Residency, SnapshotPage, SnapshotRequest
from kvstore.bus.residency import Announcer, Mirror
from kvstore.disk import record
from kvstore.disk.record import Entry
from tests.conftest import cases


def entry(router_hash: int, fingerprint: int = 7) -> Entry:
    return Entry(router_hash.to_bytes(16, "big"), router_hash, fingerprint, 1, 10, 0, 2)


def announced(entries: Iterable[Entry]) -> list[record.Announced]:
    return [record.announced(b"".join(map(record.pack_entry, entries)))]


class Holdings:
    """What a target holds, with an announcer that hears of every change."""

    def __init__(self, target: str = "t", epoch: int = 1, held: Iterable[int] = ()):
        self.held: dict[int, Entry] = {router_hash: entry(router_hash) for router_hash in held}
        self.announcer = Announcer(target, epoch, lambda _: announced(self.held.values()))

    def store(self, router_hash: int) -> None:
        self.held[router_hash] = entry(router_hash)
        self.announcer.stored(self.held[router_hash])

    def remove(self, router_hash: int) -> None:
        if gone := self.held.pop(router_hash, None):
            self.announcer.removed(gone)

    def snapshot(self) -> list[SnapshotPage]:
        self.announcer.make_snapshot()
        return snapshot_of(self.announcer)


def snapshot_of(announcer: Announcer) -> list[SnapshotPage]:
    pages: list[SnapshotPage] = []
    while not pages or len(pages) < pages[0].pages:
        page = announcer.snapshot_page(SnapshotRequest(pages[0].token if pages else 0, len(pages)))
        assert page is not None
        pages.append(page)
    return pages


def replay(mirror: Mirror, replayed: list[Residency]) -> bool:
    return bool(replayed) and residency._all_of(mirror.replaying("t", replayed))


def known(mirror: Mirror, hashes: Iterable[int], now: float = 0.0) -> set[int]:
    hashes = list(hashes)
    return {h for h, target in zip(hashes, mirror.locate(7, hashes, now), strict=True) if target}


@settings(max_examples=cases(300), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("srdaq"), st.integers(1, 12)), max_size=60),
    st.integers(1, 4),
    st.sets(st.integers(1, 12)),
    st.booleans(),
)
def test_a_mirror_ends_up_with_what_is_held(
    steps: list[tuple[str, int]], page: int, held: set[int], replays: bool
) -> None:
    """Steps: store, remove, announce and drop, announce and deliver, restart in a new epoch. Snapshots arrive late."""
    whole = residency.PAGE_HASHES
    residency.PAGE_HASHES = page
    try:
        holdings, mirror = Holdings(held=held), Mirror()
        epoch = 1
        asked: list[list[SnapshotPage]] = []

        def deliver(message: Residency) -> None:
            if mirror.apply(message, 0.0):
                missing = mirror.missing("t")
                replayed = holdings.announcer.replay(missing).messages if replays and missing else []
                if not replay(mirror, replayed):
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
    announcer = Announcer("t", 1, lambda _: announced([entry(1, fingerprint=7), entry(2, fingerprint=8)]))
    mirror.apply(announcer.announcements()[0], 0.0)
    announcer.make_snapshot()
    mirror.apply_snapshot(snapshot_of(announcer))
    assert mirror.locate(7, [1, 2], 0.0) == ["t", None]
    assert mirror.locate(8, [1, 2], 0.0) == [None, "t"]
    assert mirror.locate(9, [1, 2], 0.0) == [None, None]


def test_chunks_without_a_router_hash_are_not_announced() -> None:
    announcer = Announcer("t", 1, lambda _: announced([entry(0)]))
    announcer.stored(entry(0))
    (heartbeat,) = announcer.announcements()
    assert heartbeat.stored == []
    announcer.make_snapshot()
    assert [page.hashes for page in snapshot_of(announcer)] == [b""]


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


def test_a_token_that_is_not_known_has_no_pages() -> None:
    holdings = Holdings(held=[1])
    (page,) = holdings.snapshot()
    for request in SnapshotRequest(12345, 0), SnapshotRequest(page.token, 1):
        answer = holdings.announcer.snapshot_page(request)
        assert answer is not None
        assert answer.pages == 0


def test_a_snapshot_is_made_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror that asks late has heard nothing since: what it missed is replayed."""
    holdings = Holdings(held=range(1, 100))
    early = holdings.snapshot()
    for router_hash in range(100, 110):
        holdings.store(router_hash)
        messages = holdings.announcer.announcements()
    late, mirror = snapshot_of(holdings.announcer), Mirror()
    assert late == early
    assert mirror.apply(messages[0], 0.0)
    assert mirror.apply_snapshot(late, holdings.announcer.replay(ReplayRequest(1, late[0].seq + 1)).messages)
    assert known(mirror, range(110)) == set(range(1, 110))
    monkeypatch.setattr(residency, "_SNAPSHOT_SECONDS", 0)
    assert holdings.announcer.snapshot_page(SnapshotRequest(0, 0)) is None  # a new one must be made


def test_lost_messages_cost_no_snapshot() -> None:
    holdings, mirror = mirrored([1])
    holdings.announcer.announcements()
    for router_hash in (2, 3, 4):
        holdings.store(router_hash)
        (last,) = holdings.announcer.announcements()  # but for this one all are lost
    holdings.remove(1)
    (after,) = holdings.announcer.announcements()
    assert mirror.apply(last, 0.0)
    assert not mirror.apply(after, 0.0)
    missing = mirror.missing("t")
    assert missing == ReplayRequest(5, 2)
    said = holdings.announcer.replay(missing).messages
    assert [message.seq for message in said] == [2, 3, 4, 5, 6]
    assert replay(mirror, said)
    assert known(mirror, range(5)) == {2, 3, 4}
    assert (mirror.resyncs, mirror.replays) == (1, 1)


def test_what_is_kept_for_a_replay_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "REPLAY_HASHES", 10)
    holdings = Holdings()
    for router_hash in range(1, 30):
        holdings.store(router_hash)
        holdings.announcer.announcements()
    assert holdings.announcer.replay(ReplayRequest(1, 5)).messages == []
    assert holdings.announcer.replay(ReplayRequest(2, 25)).messages == []  # of another start
    assert [message.seq for message in holdings.announcer.replay(ReplayRequest(1, 20)).messages] == list(range(20, 30))


TARGETS = st.sampled_from(["a", "b", "c", "d"])  # a mirror remembers four holders of a chunk
LAYOUTS = st.sampled_from([7, 8])
# Few different ones, so that they meet again; the ends of the range among them.
HASHES = st.lists(st.one_of(st.integers(1, 40), st.integers((1 << 64) - 5, (1 << 64) - 1)), max_size=30)


class MirrorMachine(RuleBasedStateMachine):
    """A mirror of four targets against plain sets, with tables so small that they are made anew all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, residency._SLOTS_MIN = residency._SLOTS_MIN, 4
        self.mirror = Mirror()
        self.held: defaultdict[str, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.seqs: dict[str, tuple[int, int]] = {}

    def teardown(self) -> None:
        residency._SLOTS_MIN = self.slots

    @rule(name=TARGETS, layout=LAYOUTS, stored=HASHES, removed=HASHES)
    def change(self, name: str, layout: int, stored: list[int], removed: list[int]) -> None:
        epoch, seq = self.seqs.get(name, (1, 0))
        asked = self.mirror.apply(Residency(name, epoch, seq + 1, layout, 2, stored, removed, 0), 0.0)
        assert asked == (name not in self.seqs)
        if asked:
            self.mirror.give_up_snapshot(name)
        else:
            self.seqs[name] = epoch, seq + 1
            self.held[name][layout] -= set(removed)
            self.held[name][layout] |= set(stored)

    @rule(name=TARGETS, held=st.lists(st.tuples(LAYOUTS, HASHES), min_size=1, max_size=4))
    def restart(self, name: str, held: list[tuple[int, list[int]]]) -> None:
        epoch = self.seqs.get(name, (1, 0))[0] + 1
        assert self.mirror.apply(Residency(name, epoch, 3, 7, 2, [99], [], 0), 0.0)
        pages = [SnapshotPage(name, epoch, 3, 5, len(held), of, array("Q", hashes).tobytes()) for of, hashes in held]
        assert self.mirror.apply_snapshot(pages)
        self.seqs[name] = epoch, 3
        self.held[name] = defaultdict(set)
        for of, hashes in held:
            self.held[name][of] |= set(hashes)

    @rule(name=TARGETS)
    def lose(self, name: str) -> None:
        for other in self.seqs.keys() - {name}:
            epoch, seq = self.seqs[other]
            self.mirror.apply(Residency(other, epoch, seq + 1, 7, 2, [], [], 0), 100.0)
            self.seqs[other] = epoch, seq + 1
        self.mirror.forget_silent(100.0)
        self.seqs.pop(name, None)
        self.held.pop(name, None)
        for view in self.mirror._views.values():
            view.heard = 0.0

    @invariant()
    def says_what_is_held(self) -> None:
        asked = [*range(1, 41), 99, *range((1 << 64) - 5, 1 << 64)]
        for layout in (7, 8):
            for router_hash, target in zip(asked, self.mirror.locate(layout, asked, 0.0), strict=True):
                holders = {one for one, held in self.held.items() if router_hash in held[layout]}
                assert target in holders if holders else target is None
        counts = self.mirror.counts(0.0)
        for target, held in self.held.items():
            assert counts.get(target, 0) == sum(map(len, held.values()))


TestMirrorMachine = MirrorMachine.TestCase
TestMirrorMachine.settings = settings(max_examples=cases(60), stateful_step_count=30, deadline=None)


FORMER_EPOCH = 9


def mirrored(held: Iterable[int], **options: int) -> tuple[Holdings, Mirror]:
    """A target that was started twice. Epochs have no order."""
    mirror = Mirror(**options)  # type: ignore[arg-type]
    for epoch in (FORMER_EPOCH, 5):
        holdings = Holdings(epoch=epoch, held=held)
        mirror.apply(holdings.announcer.announcements()[0], 0.0)
        assert mirror.apply_snapshot(holdings.snapshot())
    mirror.resyncs = 1
    return holdings, mirror


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Residency("t", 5, -1, 7, 2, [2], [], 0), "number_out_of_range"),
        (Residency("t", 5, 2, 1 << 64, 2, [2], [], 0), "number_out_of_range"),
        (Residency("t", 5, 2, 7, -2, [2], [], 0), "number_out_of_range"),
        (Residency("t", FORMER_EPOCH, 2, 7, 2, [2], [1], 0), "former_start"),
        (Residency("t", 5, 2, 7, 2, [2] * 70_000, [], 0), "too_many_changes"),
        (Residency("t" * 300, 5, 2, 7, 2, [2], [], 0), "invalid_name"),
        (Residency("t", 5, 2, 7, 2, [2, -3], [1], 0), "hash_out_of_range"),
        (Residency("t", 5, 2, 7, 2, [2], [1 << 64], 0), "hash_out_of_range"),
    ],
)
def test_what_cannot_be_right_is_ignored_and_counted(message: Residency, reason: str) -> None:
    _, mirror = mirrored([1])
    assert not mirror.apply(message, 1.0)
    assert mirror.ignored == {reason: 1}
    assert known(mirror, [1, 2]) == {1}


def test_a_hash_out_of_range_leaves_a_gap() -> None:
    holdings, mirror = mirrored([1])
    holdings.announcer.announcements()
    mirror.apply(Residency("t", 5, 2, 7, 2, [-1], [], 0), 0.0)
    assert mirror.apply(holdings.announcer.announcements()[0], 0.0)
    assert mirror.apply_snapshot(holdings.snapshot())
    assert mirror.resyncs == 2


def test_snapshots_that_cannot_be_right_are_ignored() -> None:
    _, mirror = mirrored([1])
    page = SnapshotPage("t", 5, 1, 9, 1, 7, bytes(8))
    assert not mirror.apply_snapshot([SnapshotPage("t", 5, 1, 9, 1, 7, b"odd")])
    assert not mirror.apply_snapshot([page, SnapshotPage("u", 5, 1, 9, 1, 7, b"")])
    assert not mirror.apply_snapshot([SnapshotPage("t", FORMER_EPOCH, 1, 9, 1, 7, bytes(8))])
    assert not mirror.apply_snapshot([SnapshotPage("nobody", 5, 1, 9, 1, 7, bytes(8))])
    assert mirror.ignored == {"invalid_snapshot": 2, "former_start": 1}
    assert known(mirror, [1]) == {1}


@pytest.mark.parametrize("epoch", [1, 6])
def test_a_wiped_or_restored_store_under_an_old_name_is_noticed_at_once(epoch: int) -> None:
    before, mirror = mirrored([1])
    again = Holdings(epoch=epoch, held=[2])
    assert mirror.apply(again.announcer.announcements()[0], 0.0)
    assert known(mirror, [1, 2]) == set()
    assert not mirror.apply_snapshot(before.snapshot())  # was asked for before
    assert mirror.apply(again.announcer.announcements()[0], 0.0)
    assert mirror.apply_snapshot(again.snapshot())
    assert not mirror.apply(before.announcer.announcements()[0], 0.0)
    assert known(mirror, [1, 2]) == {2}
    assert mirror.ignored == {"former_start": 1}


def test_a_forged_announcement_is_found_out_by_the_next_true_one() -> None:
    """Two messages with one number: only a snapshot tells which was the target's."""
    holdings, mirror = mirrored([1])
    forged = Residency("t", 5, 2, 7, 2, [99], [1], 0)
    assert not mirror.apply(forged, 0.0)
    assert known(mirror, [1, 99]) == {99}
    assert mirror.apply(holdings.announcer.announcements()[0], 0.0)
    assert known(mirror, [1, 99]) == set()
    assert mirror.apply_snapshot(holdings.snapshot())
    assert known(mirror, [1, 99]) == {1}
    assert mirror.ignored == {"duplicate_number": 1}


def test_a_forged_epoch_counts_until_the_target_has_spoken_some_times() -> None:
    holdings, mirror = mirrored([1])
    mirror.apply(Residency("t", 1 << 60, 1, 7, 2, [], [], 0), 0.0)
    assert mirror.apply_snapshot([SnapshotPage("t", 1 << 60, 1, 9, 1, 7, bytes([9] * 8))])
    asked = [mirror.apply(holdings.announcer.announcements()[0], 0.0) for _ in range(6)]
    assert asked == [False] * 5 + [True]
    assert mirror.apply_snapshot(holdings.snapshot())
    assert known(mirror, [1]) == {1}


def test_targets_that_nobody_hears_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_TARGETS_MAX", 64)
    mirror = Mirror()
    for number in range(70):
        mirror.apply(Residency(f"forged-{number}", 1, 1, 7, 2, [], [], 0), 0.0)
    assert not mirror.apply(Residency("t", 1, 1, 7, 2, [], [], 0), 5.0)
    assert mirror.apply(Residency("t", 1, 1, 7, 2, [], [], 0), 11.0)


async def test_a_snapshot_with_two_answers_is_not_believed(nats_url: str, caplog: pytest.LogCaptureFixture) -> None:
    line, forger = await Bus.connect(nats_url, "test"), await nats.connect(nats_url)
    mirror, holdings = Mirror(), Holdings("10.0.0.1:7600", held=range(1, 10))
    lies = True

    async def lie(raw: Msg) -> None:
        if lies:
            forged = SnapshotPage("10.0.0.1:7600", 1, 1, 9, 1, 7, (1 << 40).to_bytes(8, "little"))
            await raw.respond(msgspec.msgpack.encode(forged))

    await forger.subscribe(messages.subject("lies", "snapshot"), cb=lie)
    await forger.flush()
    tasks = [
        asyncio.create_task(residency.follow(mirror, line, "lies")),
        asyncio.create_task(residency.announce(holdings.announcer, line, "lies")),
    ]
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(30):
        while not mirror.ignored["conflicting_snapshots"]:
            await asyncio.sleep(0.02)
        lies = False
        assert "10.0.0.1:7600: conflicting answers" in caplog.text
        while known(mirror, [*range(1, 10), 1 << 40], clock()) != set(range(1, 10)):
            await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await forger.close()
    await line.close()


def test_entries_are_bounded() -> None:
    holdings, mirror = mirrored(range(1, 9), max_entries=10)
    for router_hash in range(5, 15):
        holdings.store(router_hash)
    mirror.apply(holdings.announcer.announcements()[0], 0.0)
    assert mirror.counts(0.0) == {"t": 10}
    assert mirror.ignored == {"mirror_full": 4}
    assert len(known(mirror, range(1, 15))) == 10
    holdings.remove(1)
    holdings.store(20)
    mirror.apply(holdings.announcer.announcements()[0], 0.0)
    assert known(mirror, [1, 20]) == {20}


def test_targets_and_layouts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_TARGETS_MAX", 64)
    mirror = Mirror()
    for number in range(70):
        mirror.apply(Residency(f"t{number}", 1, 1, 7, 2, [], [], 0), 0.0)
        mirror.apply_snapshot([SnapshotPage(f"t{number}", 1, 1, 9, 1, number, b"1" * 8)])
    assert mirror.ignored == {"too_many_targets": 6}
    for number in range(70, 80):
        mirror.apply(Residency("t0", 1, number - 68, number, 2, [1], [], 0), 0.0)
    assert mirror.ignored["too_many_layouts"] == 10
    assert mirror.ages(3.0)["t0"] == 3.0


def test_of_a_chunk_on_many_targets_four_are_known() -> None:
    mirror = Mirror()
    for number in range(1000):
        held = array("Q", [7, 1000 + number]).tobytes()  # a chunk that all hold, and one of its own
        mirror.apply(Residency(f"t{number}", 1, 1, 7, 2, [], [], 0), 0.0)
        assert mirror.apply_snapshot([SnapshotPage(f"t{number}", 1, 1, 9, 1, 7, held)])
    assert mirror.locate(7, list(range(1000, 2000)), 0.0) == [f"t{number}" for number in range(1000)]
    assert sum(mirror.counts(0.0).values()) == 1000 + 4
    for number in range(4):
        assert mirror.locate(7, [7], 0.0) != [None]
        mirror.apply(Residency(f"t{number}", 1, 2, 7, 2, [], [7], 0), 0.0)
    assert mirror.locate(7, [7], 0.0) == [None]
    mirror.apply(Residency("t999", 1, 2, 7, 2, [7], [], 0), 0.0)
    assert mirror.locate(7, [7], 0.0) == ["t999"]


def test_targets_share_the_reads_of_what_two_of_them_hold() -> None:
    mirror, held = Mirror(), range(1, 101)
    for name in ("t1", "t2"):
        mirror.apply(Residency(name, 1, 1, 7, 2, [], [], 0), 0.0)
        assert mirror.apply_snapshot([SnapshotPage(name, 1, 1, 9, 1, 7, array("Q", held).tobytes())])
    named = mirror.locate(7, [*held, 200], 0.0)
    assert named[-1] is None
    assert named == mirror.locate(7, [*held, 200], 0.0)
    assert named.count("t1") + named.count("t2") == 100
    assert 20 < named.count("t1") < 80


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


def test_no_step_takes_longer_the_more_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables grow, and are cleaned of what went, a few slots at a time."""
    moved: list[int] = []
    move = residency._Table._move

    def counted(self: residency._Table, slots: int) -> None:
        if self._before is not None:
            moved.append(min(slots, len(self._before) - self._moved))
        move(self, slots)

    monkeypatch.setattr(residency._Table, "_move", counted)
    _, mirror = mirrored([])
    chance, held, sizes = random.Random(1), [], []
    for seq in range(2, 82):
        stored = [chance.getrandbits(64) | 1 for _ in range(10_000)]
        removed, held = (held[:10_000], held[10_000:]) if len(held) > 200_000 else ([], held)
        held += stored
        mirror.apply(Residency("t", 5, seq, 7, 2, stored, removed, 0), 0.0)
        sizes.append(mirror.size_bytes)
    assert len(set(sizes)) > 5
    assert 0 < max(moved) <= residency._MOVED_PER_ENTRY * residency._STEP_ENTRIES
    assert mirror.size_bytes < 150 * len(held)
    assert known(mirror, held) == set(held)
    assert mirror.counts(0.0) == {"t": len(held)}
    mirror.forget_silent(100.0)
    while mirror.work():
        pass
    assert mirror.counts(0.0) == {}


def test_what_is_announced_between_the_steps_of_a_snapshot_comes_after_it() -> None:
    holdings, mirror = Holdings(epoch=5, held=range(1, 10_000)), Mirror()
    assert mirror.apply(holdings.announcer.announcements()[0], 0.0)
    steps = mirror.joining(holdings.snapshot())
    joined, others = False, iter(range(10_000, 10_003))
    while not joined:
        if (router_hash := next(others, None)) is not None:
            holdings.remove(router_hash - 9_999)
            holdings.store(router_hash)
            assert not mirror.apply(holdings.announcer.announcements()[0], 0.0)
            assert known(mirror, [5000]) == set()  # half of a snapshot is of no use
        try:
            next(steps)
        except StopIteration as end:
            joined = bool(end.value)
    assert known(mirror, range(1, 11_000)) == set(range(4, 10_003))


def test_a_snapshot_makes_its_room_once_and_a_second_one_of_the_same_target_none() -> None:
    mirror = Mirror(max_entries=1_000_000)
    hashes = np.random.default_rng(1).integers(1, 1 << 63, 100_000, dtype=np.uint64)

    def join(epoch: int) -> bool:
        mirror.apply(Residency("t", epoch, 1, 0, 0, [], [], 0), 0.0)
        pages = [SnapshotPage("t", epoch, 1, 5, 2, 7, part.tobytes()) for part in np.array_split(hashes, 2)]
        return mirror.apply_snapshot(pages)

    assert join(1)
    size = mirror.size_bytes
    assert mirror.counts(0.0) == {"t": len(hashes)}
    while mirror.work():
        pass
    assert join(2)
    while mirror.work():
        pass
    assert mirror.counts(0.0) == {"t": len(hashes)}
    assert mirror.size_bytes <= size
    located = mirror.locate(7, hashes.tolist(), 0.0)
    assert located == ["t"] * len(hashes)


def test_room_is_made_for_no_more_than_the_mirror_takes() -> None:
    mirror = Mirror(max_entries=1000)
    mirror.apply(Residency("t", 1, 1, 0, 0, [], [], 0), 0.0)
    hashes = np.arange(1, 100_001, dtype=np.uint64)
    mirror.apply_snapshot([SnapshotPage("t", 1, 1, 5, 1, 7, hashes.tobytes())])
    assert mirror.counts(0.0) == {"t": 1000}
    assert mirror.size_bytes <= 53 * 2048


def test_two_snapshots_at_once_and_changes_between_their_steps() -> None:
    mirror = Mirror(max_entries=1_000_000)
    hashes = np.random.default_rng(2).integers(1, 1 << 63, 60_000, dtype=np.uint64)
    joins = []
    for number, part in enumerate(np.array_split(hashes, 2)):
        mirror.apply(Residency(f"t{number}", 1, 1, 0, 0, [], [], 0), 0.0)
        joins.append(mirror.joining([SnapshotPage(f"t{number}", 1, 1, 5, 1, 7, part.tobytes())]))
    turns = 0
    while joins:
        joins = [steps for steps in joins if next(steps, "end") != "end"]
        mirror.work()
        turns += 1
    assert turns > 10
    assert sum(mirror.counts(0.0).values()) == len(hashes)
    assert set(mirror.locate(7, hashes.tolist(), 0.0)) == {"t0", "t1"}
