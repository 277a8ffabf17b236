"""Who is there: a fixed list or etcd, and which keys belong to whom."""

import os
from collections import Counter

import pytest

import kvstore.net.membership
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net.etcd import Etcd
from kvstore.net.membership import EtcdMembership, Registration, open_membership, target_for
from tests.conftest import eventually, key

TARGETS = [f"10.0.0.{number}:7600" for number in range(5)]


def test_a_static_list() -> None:
    membership = open_membership("a:1, b:2,a:1", "default")
    assert list(membership.targets()) == ["a:1", "b:2"]


@pytest.mark.parametrize("stores", ["nowhere", "a:1,b", "etcd://nowhere"])
def test_an_address_that_is_none_is_refused(stores: str) -> None:
    with pytest.raises(ConfigError, match="given, expected host:port"):
        open_membership(stores, "default")


def test_keys_are_shared_out_evenly_and_stay_where_they_are() -> None:
    keys = [key(number) for number in range(5000)]
    before = {one: target_for(one, TARGETS) for one in keys}
    assert all(800 < count < 1200 for count in Counter(before.values()).values())
    for one in keys:
        if before[one] != TARGETS[2]:
            assert target_for(one, TARGETS[:2] + TARGETS[3:]) == before[one]
    assert target_for(keys[0], []) is None


def test_etcd_shows_who_comes_and_goes(etcd_address: str) -> None:
    namespace = f"come-{os.getpid()}"
    first = Registration(etcd_address, namespace, "a:1")
    membership = open_membership(f"etcd://{etcd_address}", namespace)
    assert list(membership.targets()) == ["a:1"]
    second = Registration(etcd_address, namespace, "b:2")
    eventually(lambda: list(membership.targets()) == ["a:1", "b:2"])
    first.close()
    eventually(lambda: list(membership.targets()) == ["b:2"])
    again = Registration(etcd_address, namespace, "a:1")
    eventually(lambda: list(membership.targets()) == ["a:1", "b:2"])
    for one in (second, again, membership):
        one.close()


def test_what_is_no_address_in_etcd_is_left_out(etcd_address: str) -> None:
    """Or whoever can write there ends what everybody knows of the targets."""
    namespace = f"rogue-{os.getpid()}"
    etcd = Etcd(etcd_address)
    for number, value in enumerate([b"\xff\xfe", b"\x1b[31mred\r\n:1", b"nowhere", b"", b"a" * 300 + b":1"]):
        etcd.call(lambda client, at=number, value=value: client.put(f"/kvtier/{namespace}/targets/{at}", value))
    sound = Registration(etcd_address, namespace, "a:1")
    membership = open_membership(f"etcd://{etcd_address}", namespace)
    assert list(membership.targets()) == ["a:1"]
    for one in (sound, membership):
        one.close()


def test_another_process_watches_etcd_for_the_engine(etcd_address: str) -> None:
    """The engine's process must not import etcd3; what it sees is the same."""
    namespace = f"child-{os.getpid()}"
    registration = Registration(etcd_address, namespace, "a:1")
    membership = open_membership(f"etcd://{etcd_address}", namespace, isolated=True)
    eventually(lambda: list(membership.targets()) == ["a:1"], 15)
    child = membership._child
    registration.close()
    eventually(lambda: list(membership.targets()) == [])
    membership.close()
    assert child.wait(20) is not None


def test_the_last_known_targets_outlive_etcd(
    etcd_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That it is away is said once, and then rarely."""
    monkeypatch.setattr(kvstore.net.membership, "POLL_SECONDS", 0.02)
    looks: list[None] = []
    namespace = f"last-{os.getpid()}"
    registration = Registration(etcd_address, namespace, "a:1")
    membership = open_membership(f"etcd://{etcd_address}", namespace)
    assert isinstance(membership, EtcdMembership)

    def down() -> tuple[str, ...]:
        looks.append(None)
        raise UnavailableError("etcd is away")

    monkeypatch.setattr(membership, "_read", down)
    eventually(lambda: len(looks) > 20)
    assert list(membership.targets()) == ["a:1"]
    assert caplog.text.count("keeping the last known targets: etcd is away") == 1
    membership.close()
    registration.close()


def test_an_etcd_that_is_not_there_is_said_to_be() -> None:
    with pytest.raises(UnavailableError, match=r"etcd: no server answers at 127\.0\.0\.1:9"):
        open_membership("etcd://127.0.0.1:9", "default")
