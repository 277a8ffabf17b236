"""What the engine computes KV with: when ranks are asked, what becomes of requests when it changes, and that nothing is
shared while it is not known."""

import asyncio
import functools
import gc
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import TransferJobStatus
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.chat.scheduler import Drive
from components.worker import identity as identity_module
from components.worker import remote_tier
from components.worker.identity import _ADAPTERS_MAX, _HARMLESS, Identity, KnownRequests
from components.worker.loads import InStepMetadata
from components.worker.manager import HoldingTieringManager
from components.worker.weights import Unknown
from graphs.services import free_port
from kvstore.bus import messages
from kvstore.bus.messages import Bus, WorkerReport
from kvstore.keys import adapter_digest, fingerprint, layout_digest, sequence_hashes
from tests.conftest import eventually
from tests.worker.stock import Ranks, engine_request, has, offloading, primary
from tests.worker.stock import step_output as output
from tests.worker.test_connector import IDENTITY, connector
from tests.worker.test_scheduler import (
    START,
    configured,
    model,  # noqa: F401  a fixture
    start,  # noqa: F401  a fixture
)
from tests.worker.test_tier import (
    DIGEST,
    KEYS,
    SOON,
    Engine,
    engines,  # noqa: F401  a fixture
    plan,
    stored,
)
from tests.worker.test_tier import engine_request as tier_request

LAYOUT = {"engine": "a vLLM", "chunk": [2, 16]}
RANKS = [2, 1, 1, 1]


def identity(ranks: Ranks, *, alike: bool = True) -> Identity:
    with patch.object(identity_module, "_find_executor", lambda config: ranks):
        return Identity(ranks.vllm_config, LAYOUT, RANKS, alike=alike)


def established(ranks: Ranks) -> Identity:
    one = identity(ranks)
    assert one.establish() == ""
    return one


class Config:
    """An engine's configuration, of which only which one it is matters."""


# ---- which executor


def test_the_executor_is_the_one_of_the_engines_configuration() -> None:
    configs = [Config() for _ in range(3)]
    several = [Ranks(config) for config in configs]
    for config, ranks in zip(configs, several, strict=True):
        one: Any = Identity(config, LAYOUT, RANKS, alike=True)
        assert one._executor is ranks
    with pytest.raises(RuntimeError, match=r"^kvtier: no executor found .*; run this engine without kvtier$"):
        Identity(Config(), LAYOUT, RANKS, alike=True)


def test_an_executor_that_is_alone_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration may be a copy."""
    alone = Ranks(Config())
    others = [object(), Ranks, Config()]
    monkeypatch.setattr(identity_module, "gc", SimpleNamespace(get_objects=lambda: [*others, alone]))
    one: Any = Identity(Config(), LAYOUT, RANKS, alike=True)
    assert one._executor is alone


# ---- the model


def test_the_base_is_made_of_layout_weights_and_parallelism() -> None:
    ranks = Ranks(None, has("model", 1), has("model", 2))
    one = identity(ranks)
    assert one.base is None
    assert one.stale
    assert one.establish() == ""
    assert not one.stale
    assert one.base is not None
    assert len(one.base) == 32
    assert ranks.asked == ["model"]
    assert established(Ranks(None, has("model", 3))).base == one.base  # what it is made of, not how it is shared out
    others = [Ranks(None, has("other", 3)), Ranks(None, has("model", 4)), Ranks(None, has("model", 3), has("other"))]
    assert len({one.base, *(established(other).base for other in others)}) == 4
    apart = identity(ranks, alike=False)
    assert apart.establish() == ""
    assert apart.base != one.base


def test_ranks_that_are_not_alike_have_their_number_in_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, object]] = []
    monkeypatch.setattr(identity_module, "layout_digest", lambda one: (written.append(one), layout_digest(one))[1])
    identity(Ranks(None, has("model"), has("model"))).establish()
    identity(Ranks(None, has("model"), has("other"))).establish()
    identity(Ranks(None, has("model"), has("model")), alike=False).establish()
    assert [one["parallel"] for one in written] == ["any", RANKS, RANKS]
    assert all(LAYOUT.items() <= one.items() for one in written)
    assert all(re.fullmatch("[0-9a-f]{32}", str(one["weights"])) for one in written)


def test_a_rank_that_does_not_know_makes_the_model_unknown() -> None:
    ranks = Ranks(None, has("model"), Unknown("kvtier: the weights layer.weight cannot be read"))
    one = identity(ranks)
    assert one.establish() == "kvtier: the weights layer.weight cannot be read"
    assert (one.base, one.stale, one.known(None)) == (None, False, None)
    ranks.models[1] = has("model")
    assert one.establish() == ""
    assert one.known(None) == one.base is not None
    ranks.broken = RuntimeError("a rank died")
    assert one.establish() == "RuntimeError('a rank died')"
    assert (one.base, one.known(None)) == (None, None)


# ---- what the engine calls its ranks for


def test_ranks_are_not_asked_again_after_what_leaves_weights_alone() -> None:
    ranks = Ranks(Config())
    one: Any = established(ranks)
    one.on_stale = lambda: pytest.fail("nothing may have changed")
    for method in sorted(_HARMLESS):
        ranks.collective_rpc(method)
        ranks.collective_rpc(method=method, timeout=1.0)
    calls: list[Callable[[Any], object]] = [
        lambda engine: engine.execute_model(None, non_block=True),
        lambda engine: engine.sample_tokens(None, non_block=True),
        lambda engine: engine.take_draft_token_ids(),
        lambda engine: engine.execute_dummy_batch(),
        lambda engine: engine.check_health(),
        lambda engine: engine.profile(True),
        lambda engine: engine.reset_mm_cache(),
        lambda engine: engine.reset_encoder_cache(),
        lambda engine: engine.list_loras(),
        lambda engine: engine.pin_lora(1),
        lambda engine: engine.get_kv_cache_specs(),
        lambda engine: engine.get_kv_connector_handshake_metadata(),
        lambda engine: engine.supports_draft_weight_updates(),
        lambda engine: engine.save_sharded_state("folder"),
        lambda engine: engine.shutdown(),
    ]
    before = len(ranks.called)
    for call in calls:
        call(ranks)
    assert len(ranks.called) == before + len(calls)
    assert not one.stale
    assert one.known(None) == one.base
    assert ranks.asked == ["model"]


class Unhashable:
    """A function of somebody's own, as it may be sent to ranks."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, worker: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        raise AssertionError


def reads_weights(worker: object) -> None:
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.sleep(),
        lambda engine: engine.sleep(level=2),
        lambda engine: (engine.sleeping_tags.add("weights"), engine.wake_up(["weights"])),
        lambda engine: engine.discard(("weights",)),
        lambda engine: engine.collective_rpc("reload_weights"),
        lambda engine: engine.collective_rpc("update_weights", args=({"names": []},)),
        lambda engine: engine.collective_rpc("start_weight_update"),
        lambda engine: engine.collective_rpc("load_model"),
        lambda engine: engine.collective_rpc("apply_model", args=(reads_weights,)),
        lambda engine: engine.collective_rpc("checkpoint_restore"),
        lambda engine: engine.collective_rpc("anything"),
        lambda engine: engine.collective_rpc(method="anything"),
        lambda engine: engine.collective_rpc("Execute_Model"),
        lambda engine: engine.collective_rpc(reads_weights),
        lambda engine: engine.collective_rpc(functools.partial(reads_weights, None)),
        lambda engine: engine.collective_rpc(Unhashable()),
    ],
)
def test_ranks_are_asked_again_after_anything_else(call: Callable[[Any], object]) -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    base, heard = one.base, []
    one.on_stale = lambda: heard.append(1)
    call(ranks)
    assert one.stale
    assert one.known(None) is None
    assert heard == [1]
    assert ranks.asked == ["model"]  # not before they have to be: they may sleep
    assert one.establish() == ""
    assert (one.known(None), one.stale) == (base, False)
    assert ranks.asked == ["model", "model"]


def test_what_happens_while_ranks_are_asked_makes_them_be_asked_again() -> None:
    """By another thread of the engine, say."""
    ranks = Ranks(Config())
    one = established(ranks)
    answer = ranks.models
    ranks.models = SimpleNamespace(__iter__=None)  # type: ignore[assignment]

    class Interrupted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            ranks.collective_rpc("update_weights")
            return super().__iter__()

    ranks.models = Interrupted(answer)
    assert one.establish() == ""
    assert one.stale


def test_the_executor_stays_what_it_is() -> None:
    class Own(Ranks):
        def own(self) -> str:
            return "own"

    ranks: Any = Own(Config())
    before = type(ranks)
    established(ranks)
    assert isinstance(ranks, Own)
    assert isinstance(ranks, Executor)
    assert type(ranks) is not before
    assert (type(ranks).__name__, type(ranks).__qualname__) == (before.__name__, before.__qualname__)
    assert (ranks.own(), ranks.uses_ray, ranks.collective_rpc("anything")) == ("own", False, [None])
    untouched = Own(Config())
    assert type(untouched) is Own
    assert not hasattr(untouched, "kvtier_watchers")


def test_two_connectors_of_one_engine_both_hear() -> None:
    ranks = Ranks(Config())
    first, second = established(ranks), established(ranks)
    assert len(type(ranks).__mro__) == len(Ranks.__mro__) + 1
    ranks.collective_rpc("update_weights")
    assert first.stale
    assert second.stale
    assert first.establish() == ""
    assert not first.stale
    assert second.stale  # what one has asked for the other has not heard
    assert second.establish() == ""
    assert (first.stale, first.base) == (False, second.base)


def test_what_a_rank_raises_the_engine_hears() -> None:
    class Failing(Ranks):
        def collective_rpc(self, method: object, *args: Any, **options: Any) -> Any:
            if method == "update_weights":
                raise ValueError("no such weights")
            return super().collective_rpc(method, *args, **options)  # type: ignore[arg-type]

    ranks = Failing(Config())
    one = established(ranks)
    with pytest.raises(ValueError, match="no such weights"):
        ranks.collective_rpc("update_weights")
    assert one.stale


# ---- adapters


def lora(name: str = "adapter", number: int = 1, path: str = "", **options: Any) -> LoRARequest:
    return LoRARequest(name, number, path or f"/{name}", **options)


def test_an_adapter_is_known_once_it_was_confirmed() -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    assert one.base is not None
    assert one.known(lora()) is None
    assert one.last(lora()) is None
    assert not one.confirm(lora())
    digest = one.known(lora())
    assert digest == one.last(lora()) == adapter_digest(one.base, "content of /adapter")
    assert digest != one.base
    assert one.known(lora("other", 2)) is None
    assert ranks.asked == ["model", 1]
    other = established(Ranks(Config(), has("other")))
    other.confirm(lora())
    assert other.known(lora()) != digest


@pytest.mark.parametrize("call", ["add_lora", "remove_lora"])
def test_after_a_call_for_adapters_they_are_confirmed_again(call: str) -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    one.confirm(lora())
    before = one.known(lora())
    one.on_stale = lambda: pytest.fail("the model itself is what it was")
    getattr(ranks, call)(lora() if call == "add_lora" else 1)
    assert not one.stale
    assert one.known(None) == one.base
    assert one.known(lora()) is None
    assert one.last(lora()) == before
    assert not one.confirm(lora())
    assert one.known(lora()) == before
    ranks.adapters[1] = "other content"
    assert one.confirm(lora())
    assert one.known(lora()) not in (None, before)


def test_after_other_calls_adapters_are_confirmed_again_too() -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    one.confirm(lora())
    ranks.collective_rpc("update_weights")
    assert one.known(lora()) is None
    assert one.establish() == ""
    assert one.known(lora()) is None
    assert not one.confirm(lora())
    assert one.known(lora()) is not None


def test_ranks_that_have_parts_of_an_adapter_are_taken_together() -> None:
    digests = []
    for content in (["a", "a"], ["a", "b"], ["b", "a"]):
        ranks = Ranks(Config(), has("model"), has("model"))
        ranks.adapters[1] = content
        one = established(ranks)
        one.confirm(lora())
        digests.append(one.known(lora()))
    assert None not in digests
    assert len(set(digests)) == 3


def test_an_adapter_that_a_rank_does_not_know_is_not_known() -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    ranks.adapters[1] = Unknown("kvtier: adapter 'adapter' is not loaded")
    assert not one.confirm(lora())
    assert one.known(lora()) is None
    assert one.known(None) == one.base
    ranks.adapters[1] = "content"
    assert not one.confirm(lora())
    assert one.known(lora()) is not None
    ranks.broken = RuntimeError("a rank died")
    assert one.confirm(lora())  # what it was before is not what it is now
    assert one.known(lora()) is None


def test_an_adapter_that_is_loaded_anew_in_each_step_is_never_known() -> None:
    ranks = Ranks(Config())
    one = established(ranks)
    assert not one.confirm(lora(load_inplace=True))
    assert one.known(lora(load_inplace=True)) is None
    one.confirm(lora())
    assert one.confirm(lora(load_inplace=True))
    assert one.known(lora()) is None
    assert ranks.asked == ["model", 1]


# ---- requests


class Cache:
    """The engine's own prefix cache."""


IMAGE = "5" * 64


def image(name: str | None, identifier: str | None = None) -> MultiModalFeatureSpec:
    where = PlaceholderRange(offset=0, length=4)
    return MultiModalFeatureSpec(None, "image", identifier or str(name), where, name)


def request(name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> Any:
    return SimpleNamespace(request_id=name, lora_request=adapter, mm_features=list(images))


class Requests:
    """What a connector does with what is known of requests. `notes` is what the tier is told."""

    def __init__(self, *models: Any):
        self.ranks = Ranks(Config(), *models)
        self.identity = established(self.ranks)
        self.notes: list[tuple[set[str], str]] = []
        self.known = KnownRequests(self.identity, lambda gone, outcome: self.notes.append((set(gone), outcome)))
        self.cache = Cache()
        self.ranks.asked.clear()

    def arrive(self, name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> bytes | None:
        self.known.arrived(request(name, adapter, *images), self.cache)
        return self.known.identity(name)

    def look(self, name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> bytes | None:
        self.known.look(request(name, adapter, *images), self.cache)
        return self.known.identity(name)

    def step(self, *left_out: str) -> None:
        """Of all that have their blocks, but for some."""
        self.known.step_ends(set(self.known._running).difference(left_out))

    def update(self, name: str) -> None:
        """Other weights, of which vLLM tells nobody."""
        self.ranks.models = [has(name)]
        self.ranks.collective_rpc("update_weights")

    def reset(self) -> None:
        """As vLLM forgets its own KV."""
        self.cache = Cache()


@pytest.fixture
def engine() -> Requests:
    return Requests()


def test_requests_are_known_as_they_arrive_without_asking(engine: Requests) -> None:
    for number in range(3):
        assert engine.arrive(f"{number}") == engine.identity.base
        assert engine.look(f"{number}") == engine.identity.base
        assert engine.known.may_store(f"{number}")
    assert engine.ranks.asked == []
    assert engine.notes == []
    engine.known.left("1")
    assert engine.known.identity("1") is None
    assert not engine.known.may_store("1")
    assert engine.known.identity("never") is None


def test_nobody_is_asked_on_arrival_and_one_look_asks(engine: Requests) -> None:
    """An engine that sleeps has no weights; one that schedules has."""
    engine.ranks.sleep()
    assert [engine.arrive(name) for name in "abc"] == [None] * 3
    assert engine.ranks.asked == []
    engine.ranks.wake_up()
    assert engine.arrive("d") is None
    assert engine.look("a") == engine.identity.base
    assert engine.ranks.asked == ["model"]
    assert [engine.known.identity(name) for name in "bcd"] == [None] * 3  # until they are looked up themselves
    assert [engine.look(name) for name in "bcd"] == [engine.identity.base] * 3
    assert engine.ranks.asked == ["model"]
    assert engine.notes == [(set(), "same")]


def test_before_it_was_looked_up_nothing_of_a_request_is_stored(engine: Requests) -> None:
    """What it can go on from is not known yet."""
    engine.arrive("a")
    assert not engine.known.may_store("a")
    engine.look("a")
    assert engine.known.may_store("a")


def test_what_was_known_is_kept_if_nothing_has_changed(engine: Requests) -> None:
    engine.look("a")
    engine.update("model")
    assert engine.known.identity("a") == engine.identity.base
    assert not engine.known.may_store("a")  # it may run already, with other weights
    engine.look("b")
    assert engine.known.may_store("a")
    assert engine.notes == [(set(), "same")]


def test_requests_of_other_weights_are_handed_over_once(engine: Requests) -> None:
    before = engine.arrive("a")
    engine.look("b")
    engine.update("other")
    assert not engine.known.may_store("a")
    after = engine.look("c")
    assert after == engine.identity.base != before
    assert engine.notes == [({"a", "b"}, "changed")]
    assert [engine.known.identity(name) for name in "ab"] == [None, None]
    assert engine.look("a") == after
    assert engine.look("d") == after
    assert engine.notes == [({"a", "b"}, "changed")]


def test_the_request_that_is_looked_up_is_handed_over_too(engine: Requests) -> None:
    before = engine.arrive("a")
    engine.update("other")
    assert engine.look("a") == engine.identity.base != before
    assert engine.notes == [({"a"}, "changed")]


def test_while_nothing_is_known_of_the_model_nothing_is_of_requests(engine: Requests) -> None:
    engine.arrive("a")
    engine.ranks.models = [Unknown("no weights")]
    engine.ranks.collective_rpc("update_weights")
    assert engine.look("b") is None
    assert engine.notes == [({"a"}, "failed")]
    assert engine.look("c") is engine.arrive("d") is engine.look("e", lora()) is None
    assert not any(engine.known.may_store(name) for name in "abcde")
    assert engine.ranks.asked == ["model"]  # once, until something happens
    engine.update("model")
    assert engine.look("c") == engine.identity.base is not None
    assert engine.notes[1:] == [(set(), "changed")]


# ---- the engine's own cache


def test_after_its_cache_was_thrown_away_ranks_are_asked(engine: Requests) -> None:
    engine.look("a")
    assert engine.ranks.asked == []  # the first one that is seen was not thrown away
    for expected in (1, 2):
        engine.reset()
        gc.collect()
        assert engine.arrive(f"{expected}") is None
        assert engine.ranks.asked == ["model"] * (expected - 1)
        assert engine.look(f"{expected}") == engine.identity.base
        assert engine.look("x") == engine.identity.base
        assert engine.ranks.asked == ["model"] * expected


def test_whatever_brought_other_weights_in_is_seen_by_the_cache(engine: Requests) -> None:
    """By none of the engine's calls: another process that has the memory, say."""
    before = engine.look("a")
    engine.ranks.models = [has("other")]
    assert engine.look("b") == before
    engine.reset()
    assert engine.look("c") == engine.identity.base != before
    assert engine.notes == [({"a", "b"}, "changed")]


def test_a_reset_of_the_connector_makes_ranks_be_asked(engine: Requests) -> None:
    engine.look("a")
    engine.known.reset()
    assert engine.arrive("b") is None
    assert engine.look("b") == engine.identity.base
    assert engine.ranks.asked == ["model"]


def test_an_engine_without_a_cache_of_its_own_is_served(engine: Requests) -> None:
    engine.cache = None  # type: ignore[assignment]
    assert engine.look("a") == engine.look("b") == engine.identity.base
    assert engine.known.may_store("a")
    assert engine.ranks.asked == []


def test_on_kv_of_other_weights_nothing_is_stored_until_the_cache_is_reset(engine: Requests) -> None:
    """A request may go on from it."""
    engine.look("a")
    engine.update("other")
    assert engine.look("b") == engine.look("c") == engine.identity.base
    assert not engine.known.may_store("b")
    assert not engine.known.may_store("c")
    engine.reset()
    engine.look("d")
    assert engine.known.may_store("d")
    assert not engine.known.may_store("b")
    engine.update("model")
    engine.look("e")
    assert not engine.known.may_store("e")


def test_weights_that_come_back_are_those_of_the_cache(engine: Requests) -> None:
    engine.look("a")
    engine.update("other")
    engine.look("b")
    assert not engine.known.may_store("b")
    engine.update("model")
    engine.look("c")
    assert engine.known.may_store("c")


def test_on_kv_of_which_nothing_is_known_nothing_is_stored(engine: Requests) -> None:
    engine.ranks.models = [Unknown("no weights")]
    engine.ranks.collective_rpc("update_weights")
    engine.look("a")
    engine.update("model")
    assert engine.look("b") == engine.identity.base
    assert not engine.known.may_store("b")
    engine.reset()
    engine.look("c")
    assert engine.known.may_store("c")


def test_kv_of_an_adapter_is_its_own(engine: Requests) -> None:
    """Of one adapter's KV another one's request, or one without, cannot go on."""
    engine.look("a", lora("one", 1))
    engine.look("b", lora("two", 2))
    engine.look("c")
    engine.ranks.adapters[1] = "other content"
    engine.ranks.add_lora(lora("one", 1))
    engine.look("d", lora("one", 1))
    engine.look("e", lora("two", 2))
    engine.look("f")
    assert [engine.known.may_store(name) for name in "def"] == [False, True, True]
    elsewhere = lora("one", 1, "/another path")
    engine.look("g", elsewhere)
    assert engine.known.may_store("g")
    engine.reset()
    engine.look("h", lora("one", 1))
    assert engine.known.may_store("h")


def test_a_reset_with_a_request_that_is_known_already_does_not_hide_what_it_computes(engine: Requests) -> None:
    """It waits while the cache is reset, and is the first to fill the new one."""
    engine.arrive("a")
    engine.reset()
    engine.look("a")
    engine.update("other")
    engine.look("b")
    assert not engine.known.may_store("b")


# ---- what a client calls its images


def test_a_prompt_with_an_image_is_known_where_what_names_images_is_believed(engine: Requests) -> None:
    """vLLM goes by the image's hash, by what its client calls it, or by what it says of itself, and does not tell."""
    first = engine.look("first")
    assert engine.arrive("a", None, image(IMAGE)) is None
    assert engine.look("a", None, image(IMAGE)) is None
    assert not engine.known.may_store("a")
    assert engine.look("b") == first
    assert engine.known.may_store("b")
    assert engine.ranks.asked == []
    believing = KnownRequests(engine.identity, lambda gone, outcome: None, images=True)
    believing.look(request("a", None, image(IMAGE)), engine.cache)
    assert believing.identity("a") == first
    assert believing.may_store("a")


def test_an_image_with_a_name_keeps_nobody_else_from_storing(engine: Requests) -> None:
    """Nor if it is what the engine begins with: its weights are those that others have."""
    engine.look("a", None, image("cat"))
    engine.look("b")
    assert engine.known.may_store("b")


# ---- adapters of requests


def test_an_adapter_is_confirmed_at_the_first_look(engine: Requests) -> None:
    assert engine.arrive("a", lora()) is None
    assert engine.ranks.asked == []
    digest = engine.look("a", lora())
    assert digest not in (None, engine.identity.base)
    assert engine.ranks.asked == [1]
    assert engine.arrive("b", lora()) == digest
    assert engine.look("b", lora()) == digest
    assert engine.look("c") == engine.identity.base
    assert engine.ranks.asked == [1]
    assert engine.known.may_store("a")
    assert engine.notes == [(set(), "adapter")]
    assert engine.known.adapters() == {"adapter": digest}


def test_an_adapter_stays_confirmed_while_one_of_its_requests_runs(engine: Requests) -> None:
    engine.look("a", lora())
    engine.known.runs(request("a", lora()))
    for _ in range(3):
        engine.step()
        assert engine.known.may_store("a")
        assert engine.look("b", lora()) is not None
    assert engine.ranks.asked == [1]
    engine.known.left("a")
    engine.known.left("b")
    engine.step()
    assert engine.arrive("c", lora()) is None
    assert engine.look("c", lora()) is not None
    assert engine.ranks.asked == [1, 1]
    assert {outcome for _, outcome in engine.notes} == {"adapter"}


def test_an_adapter_with_which_nothing_runs_is_confirmed_each_step(engine: Requests) -> None:
    """It may be unloaded, and loaded again from files that were replaced."""
    first = engine.look("a", lora())
    engine.known.runs(request("base"))
    engine.step()
    assert not engine.known.may_store("a")
    engine.ranks.adapters[1] = "other content"
    second = engine.look("b", lora())
    assert second not in (None, first)
    assert engine.known.identity("a") is None
    assert engine.notes == [(set(), "adapter"), ({"a"}, "adapter_changed")]


def test_of_adapters_that_run_each_is_kept(engine: Requests) -> None:
    one, two, three = lora("one", 1), lora("two", 2), lora("three", 3)
    for name, adapter in (("a", one), ("b", two), ("c", three)):
        engine.look(name, adapter)
    engine.known.runs(request("a", one))
    engine.known.runs(request("c", three))
    engine.step()
    assert [engine.known.may_store(name) for name in "abc"] == [True, False, True]
    engine.look("d", one)
    engine.look("e", two)
    assert engine.ranks.asked == [1, 2, 3, 2]


@pytest.mark.parametrize("call", ["add_lora", "remove_lora"])
def test_an_adapter_that_was_replaced_hands_over_its_requests_alone(engine: Requests, call: str) -> None:
    one, two = lora("one", 1), lora("two", 2)
    before = [engine.look("a", one), engine.look("b", one), engine.look("c", two), engine.look("d")]
    engine.known.runs(request("a", one))
    engine.known.runs(request("c", two))
    getattr(engine.ranks, call)(one if call == "add_lora" else 1)
    assert not engine.known.may_store("a")
    assert engine.known.may_store("d")
    engine.ranks.adapters[1] = "other content"
    engine.notes.clear()
    after = engine.look("e", one)
    assert after not in before
    assert engine.notes == [({"a", "b"}, "adapter_changed")]
    assert [engine.known.identity(name) for name in "abcd"] == [None, None, *before[2:]]
    assert not engine.known.may_store("c")  # until it is known to be what it was
    assert engine.look("f", two) == before[2]
    assert engine.known.may_store("c")
    assert engine.notes[1:] == [(set(), "adapter")]
    assert engine.known.adapters() == {"one": after, "two": before[2]}


def test_an_adapter_that_cannot_be_confirmed_hands_over_its_requests(engine: Requests) -> None:
    engine.look("a", lora())
    engine.ranks.adapters[1] = Unknown("not loaded")
    engine.ranks.add_lora(lora())
    assert engine.look("b", lora()) is None
    assert engine.notes[1:] == [({"a"}, "adapter_changed")]
    assert engine.known.adapters() == {}
    assert engine.look("c") == engine.identity.base


def test_a_request_that_loads_its_adapter_anew_is_never_known(engine: Requests) -> None:
    for name in "ab":
        assert engine.look(name, lora(load_inplace=True)) is None
        assert not engine.known.may_store(name)
    assert engine.ranks.asked == []
    assert engine.known.adapters() == {}
    assert engine.look("c") == engine.identity.base
    assert engine.known.may_store("c")


def test_a_request_that_loads_its_adapter_anew_hands_over_those_before(engine: Requests) -> None:
    engine.look("a", lora())
    assert engine.look("b", lora(load_inplace=True)) is None
    assert engine.notes[1:] == [({"a"}, "adapter_changed")]
    assert engine.known.identity("a") is None


def test_other_weights_hand_over_requests_with_adapters_too(engine: Requests) -> None:
    before = engine.look("a", lora())
    engine.look("b")
    engine.update("other")
    after = engine.look("c", lora())
    assert after not in (None, before)
    assert engine.notes == [(set(), "adapter"), ({"a", "b"}, "changed"), (set(), "adapter")]
    assert engine.known.adapters() == {"adapter": after}


def test_adapters_that_routers_hear_of_are_bounded(engine: Requests) -> None:
    """Those are kept that were confirmed last."""
    for number in range(1, _ADAPTERS_MAX + 1):
        engine.look(f"{number}", lora(f"adapter {number}", number))
    engine.step()
    engine.look("again", lora("adapter 1", 1))
    for number in range(_ADAPTERS_MAX + 1, _ADAPTERS_MAX + 4):
        engine.look(f"{number}", lora(f"adapter {number}", number))
    kept = {1, *range(5, _ADAPTERS_MAX + 4)}
    assert set(engine.known.adapters()) == {f"adapter {number}" for number in kept}
    assert len(kept) == _ADAPTERS_MAX


def test_a_name_that_is_given_to_another_adapter_is_told_with_that_one(engine: Requests) -> None:
    first = engine.look("a", lora("name", 1, "/one"))
    second = engine.look("b", lora("name", 2, "/two"))
    assert engine.known.adapters() == {"name": second}
    assert first != second


def test_an_adapter_that_comes_back_changed_under_another_number_has_changed(engine: Requests) -> None:
    """As vLLM's server loads it after it was unloaded. Its name and path are all that its blocks' hashes tell, and DRAM
    goes by those."""
    engine.look("a", lora("name", 1, "/path"))
    engine.ranks.adapters[2] = "other content"
    engine.look("b", lora("name", 2, "/path"))
    assert engine.notes[-1][1] == "adapter_changed"


def test_an_adapter_is_confirmed_again_for_a_request_that_was_preempted(engine: Requests) -> None:
    """Nothing holds an adapter for a request that does not run."""
    engine.look("a", lora())
    engine.known.runs(request("a", lora()))
    engine.step("a")
    engine.look("a", lora())  # it lost its blocks, and other adapters may have run since
    assert engine.ranks.asked == [1, 1]


# ---- the connector


class Loading:
    """A connector at which requests load between steps, until ranks say that it is over. `freed` have lost what they
    loaded."""

    def __init__(self, *names: str):
        self.connector, self.tier, _ = connector(9, {})
        self.freed: list[str] = []
        self.connector._kv_cache_manager = SimpleNamespace(free=lambda request: self.freed.append(request.request_id))
        self.requests = {name: SimpleNamespace(request_id=name, num_computed_tokens=8) for name in names}
        for number, request in enumerate(self.requests.values()):
            self.allocate(request.request_id, 8, number)

    def allocate(self, name: str, tokens: int, job_id: int = 99) -> None:
        """It has its blocks, of which so many tokens are to be loaded."""
        scheduler = self.connector.connector_scheduler
        scheduler._req_status[name] = SimpleNamespace(transfer_jobs={job_id})
        scheduler._jobs[job_id] = TransferJobStatus(name, 1, set(), is_store=False)
        self.connector.update_state_after_alloc(self.requests[name], None, tokens)

    def over(self, *names: str) -> None:
        """The ranks have said so."""
        self.connector.update_connector_output(KVConnectorOutput(finished_recving=set(names) or None))

    @property
    def lost(self) -> set[str]:
        lost = {name for name, request in self.requests.items() if not request.num_computed_tokens}
        assert sorted(lost) == sorted(self.freed)
        return lost

    @property
    def forgotten(self) -> bool:
        return not (self.connector._loading or self.connector._loaded or self.connector._void)


def test_what_was_loaded_is_kept_where_nothing_has_changed() -> None:
    one = Loading("a", "b")
    one.over()
    one.over("a", "another connector's")
    one.over("b")
    one.allocate("a", 0)
    one.allocate("b", 0)
    assert one.lost == set()
    assert one.forgotten
    one.connector._undo_loaded()
    assert one.lost == set()


def test_a_load_of_what_has_changed_is_undone_when_it_is_over() -> None:
    """Not before: ranks write to its blocks."""
    one = Loading("a", "b", "c")
    one.connector._note_answer({"a", "b"}, "changed")
    assert one.lost == set()
    one.over("a", "c")
    assert one.lost == {"a"}
    one.over("b")
    assert one.lost == {"a", "b"}
    one.allocate("c", 0)
    assert one.forgotten


def test_a_load_that_is_over_is_undone_at_once_when_weights_may_have_changed() -> None:
    """The scheduler may be about to compute after it."""
    one = Loading("a", "b", "c")
    one.over("a")
    one.connector._undo_loaded()
    assert one.lost == {"a"}
    one.connector._identity.stale = True
    one.over("b")
    assert one.lost == {"a", "b"}
    one.connector._identity.stale = False
    one.over("c")
    assert one.lost == {"a", "b"}


def test_what_was_undone_may_be_loaded_again() -> None:
    one = Loading("a")
    one.connector._note_answer({"a"}, "changed")
    one.over("a")
    assert one.lost == {"a"}
    one.requests["a"].num_computed_tokens = 4
    one.freed.clear()
    one.allocate("a", 4)
    one.over("a")
    one.allocate("a", 0)
    assert one.lost == set()
    assert one.forgotten


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("void", [False, True])
def test_of_a_request_that_leaves_nothing_is_undone(over: bool, void: bool) -> None:
    """Its blocks are the scheduler's."""
    one = Loading("a")
    if void:
        one.connector._note_answer({"a"}, "changed")
    elif over:
        one.over("a")
    one.connector._leave(one.requests["a"])
    assert one.forgotten
    one.over("a")
    one.connector._undo_loaded()
    assert one.lost == set()


def test_loads_in_a_step_are_not_undone() -> None:
    """They are over when it is computed."""
    one = Loading()
    one.requests["a"] = SimpleNamespace(request_id="a", num_computed_tokens=8)
    one.connector._loads._jobs[5] = "a"
    one.allocate("a", 8, 5)
    one.connector._note_answer({"a"}, "changed")
    one.over("a")
    assert one.lost == set()
    assert one.forgotten


def test_a_load_that_is_over_is_undone_when_its_adapter_has_changed() -> None:
    one = Loading("a", "b")
    one.over("a", "b")
    one.connector._note_answer({"a"}, "adapter_changed")
    assert one.lost == {"a"}


@pytest.mark.parametrize("outcome", ["changed", "failed", "adapter_changed"])
def test_a_change_makes_dram_be_dropped_and_requests_be_forgotten(outcome: str) -> None:
    one, tier, _ = connector(9, {"a": 1, "b": 1, "c": 1, "d": 1})
    one._note_answer({"a", "b", "d"}, outcome)
    assert one._drop
    assert list(one._arriving) == ["c"]
    assert tier.forgotten == [{"a", "b", "d"}]
    assert tier.outcomes == [outcome]
    assert tier.announced == [(IDENTITY, {"adapter": IDENTITY})]
    one._identity.base = None
    one._note_answer({"c"}, outcome)
    assert tier.announced[1:] == [(None, {"adapter": IDENTITY})]


@pytest.mark.parametrize("outcome", ["same", "adapter"])
def test_an_answer_without_a_change_leaves_all_as_it_is(outcome: str) -> None:
    one, tier, _ = connector(9, {"a": 1})
    one._note_answer((), outcome)
    assert (one._drop, list(one._arriving)) == (False, ["a"])
    assert (tier.forgotten, tier.outcomes) == ([set()], [outcome])
    assert tier.announced == [(IDENTITY, {"adapter": IDENTITY})]


def stock_scheduler(one: Any) -> tuple[Any, list[object]]:
    """vLLM's own scheduler's half under the connector, with something in DRAM; and when that is dropped."""
    manager = HoldingTieringManager(primary(), [])
    one.connector_scheduler, one._manager = offloading(manager), manager
    one._loads.scheduler = one.connector_scheduler
    dropped: list[object] = []
    reset_cache = manager.reset_cache
    manager.reset_cache = lambda: (dropped.append(1), reset_cache())  # type: ignore[assignment]
    return one.connector_scheduler, dropped


def test_dram_is_dropped_when_the_next_request_is_looked_up() -> None:
    one, tier, _ = connector(9, {})
    scheduler, dropped = stock_scheduler(one)
    asked = engine_request()
    one._drop = True
    one.on_new_request(asked)
    assert not tier.identities  # nothing is begun for it that would be dropped
    scheduler._jobs[7] = TransferJobStatus("other", 1, set(), is_store=False)
    assert one.get_num_new_matched_tokens(asked, 0) == (None, False)
    assert (dropped, one._drop) == ([], True)  # ranks copy from its rows
    scheduler._jobs.clear()
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert (dropped, one._drop) == ([1], False)
    assert tier.identities == {"r": IDENTITY}
    assert [name for name, _ in tier.asked] == ["r"]
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert dropped == [1]


def test_dram_is_not_dropped_under_a_step_that_has_begun_to_load() -> None:
    """Who would be scheduled in that step waits for the next one."""
    one, tier, _ = connector(9, {})
    scheduler, dropped = stock_scheduler(one)
    asked = engine_request()
    one.on_new_request(asked)
    tier.hurried.clear()
    one._drop = True
    scheduler._current_batch_allocated_block_ids = {1}
    for _ in range(2):
        assert one.get_num_new_matched_tokens(asked, 0) == (None, False)
    assert (dropped, one._drop, tier.hurried) == ([], True, [])
    meta = one.build_connector_meta(output())
    assert (dropped, one._drop) == ([1], False)
    assert isinstance(meta, InStepMetadata)
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert tier.hurried


def test_a_step_that_is_scheduled_keeps_what_it_was_told_to_load() -> None:
    """What it has begun to load is still there for its ranks, and DRAM is dropped behind it."""
    one, _, _ = connector(9, {})
    loads: dict[int, Any] = {3: SimpleNamespace(req_id="r")}
    scheduler, dropped = stock_scheduler(one)
    one._drop = True
    scheduler._current_batch_load_jobs = dict(loads)
    assert one.build_connector_meta(output()).load_jobs == loads
    assert dropped == [1]


def test_a_request_of_which_nothing_is_known_does_without_the_tiers() -> None:
    one, tier, manager = connector(9, {"r": 1})
    tier.identities.clear()
    one._known.unknown.add("r")
    asked = SimpleNamespace(request_id="r", num_tokens=90, skip_reading_prefix_cache=False)
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert (tier.hurried, tier.asked, tier.identities, manager.promoted) == ([], [], {}, [])
    one._known.unknown.clear()
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert tier.identities == {"r": IDENTITY}
    assert manager.expected == ["r"]
    assert manager.promoted == [("r", 0)]
    assert tier.hurried == ["r", "r answered"]


def test_the_connector_says_who_runs_and_when_a_step_ends() -> None:
    one, _, _ = connector(0, {})
    one.update_state_after_alloc(SimpleNamespace(request_id="r"), None, 0)
    assert one._known.running == ["r"]
    one.build_connector_meta(output())
    assert one._known.steps == 1


def test_when_the_engine_wants_its_kv_forgotten_ranks_are_asked_and_dram_is_dropped() -> None:
    one, _, _ = connector(0, {})
    scheduler, dropped = stock_scheduler(one)
    scheduler._jobs[7] = TransferJobStatus("other", 1, set(), is_store=True)
    assert one.reset_cache() is True
    assert (one._known.resets, dropped, one._drop) == (1, [], True)  # when the copies are over
    scheduler._jobs.clear()
    one.build_connector_meta(output())
    assert (dropped, one._drop) == ([1], False)


@pytest.mark.parametrize("why", ["unknown", "may_not_store"])
def test_what_may_not_be_stored_is_not(why: str) -> None:
    """Neither as it is computed nor when the request is over, unless it may by then."""
    stored: Counter[str] = Counter()

    def prepare_store(keys: list[bytes], context: Any) -> Any:
        stored[context.req_id] += len(keys)
        return SimpleNamespace(keys_to_store=[])

    one, _, _ = connector(0, {})
    manager = HoldingTieringManager(primary(), [])
    manager.prepare_store = prepare_store  # type: ignore[assignment]
    one.connector_scheduler = scheduler = offloading(manager)
    one._loads.scheduler, one._computed = scheduler, []
    requests = [engine_request(name, prompt_tokens=17) for name in ("fine", "never", "late")]
    for asked in requests:
        scheduler.on_new_request(asked)
        status = scheduler._req_status[asked.request_id]
        status.update_offload_keys()
        status.update_block_id_groups(([1, 2, 3, 4, 5],))
    forbidden = getattr(one._known, why)
    forbidden |= {"never", "late"}
    for _ in range(2):
        one._build_store_jobs(output(fine=17, never=17, late=17))
        for asked in requests:
            asked.num_computed_tokens = 17
    assert stored == {"fine": 4}
    forbidden.discard("late")
    for asked in requests:
        asked.status = RequestStatus.FINISHED_STOPPED
    one._build_store_jobs(output(("fine", "never", "late")))
    assert stored == {"fine": 4, "late": 4}
    assert sorted(one._known.gone) == ["fine", "late", "never"]


# ---- the tier


def asked_for(engine: Engine, name: str, digest: bytes | None, chunks: int = 4) -> list[LookupResult]:
    """What is found of a new request whose KV is computed with that."""
    engine.digest = digest or b""
    context = engine.arrive(tier_request(name=name), KEYS, identified=digest is not None)
    engine.ask(name)
    eventually(lambda: (engine.step(), not engine.tier.undecided(name))[1], SOON)
    return [engine.tier.lookup(key, context) for key in KEYS[:chunks]]


HIT, MISS = LookupResult.HIT, LookupResult.MISS
OTHER = b"\x08" * 32


def test_chunks_of_one_identity_are_not_found_under_another(start_target: Any, engines: Any) -> None:  # noqa: F811
    target = start_target()
    contents = stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    assert asked_for(engine, "a", DIGEST) == [HIT] * 4
    assert asked_for(engine, "b", OTHER) == [MISS] * 4
    assert asked_for(engine, "c", None) == [MISS] * 4
    # A plan of a router that does not know better says that they are there.
    engine.digest = OTHER
    context = engine.arrive(tier_request(name="d"), KEYS, plan(target, 4))
    assert engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[:4])
    for row in range(4):
        engine.fill(row, 100 + row)
    engine.store(engine.arrive(tier_request(name="e"), KEYS), KEYS[:4], [0, 1, 2, 3])
    assert {entry.fingerprint for entry in target.log.entries()} == {fingerprint(DIGEST), fingerprint(OTHER)}
    assert len(target.log) == 8
    engine.digest = DIGEST
    context = engine.arrive(tier_request(name="f"), KEYS, plan(target, 4))
    assert not engine.load(context, KEYS[:4], [8, 9, 10, 11]).failed
    assert [engine.memory[row].tobytes() for row in (8, 9, 10, 11)] == contents


def test_of_a_request_of_which_nothing_is_known_nothing_is_loaded_or_stored(start_target: Any, engines: Any) -> None:  # noqa: F811
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address)
    context = engine.arrive(tier_request(), KEYS, plan(target, 4), identified=False)
    assert [engine.tier.lookup(key, context) for key in KEYS[:4]] == [MISS] * 4
    assert engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[:4])
    engine.store(context, KEYS[4:6], [4, 5])
    assert len(target.log) == 4
    assert engine.counted()["vllm:kvtier_stored_chunks:('dropped',)"] == 2
    assert engine.tier.identify("r", DIGEST)
    assert not engine.tier.identify("r", DIGEST)
    assert engine.tier.lookup(KEYS[0], context) is HIT
    engine.store(context, KEYS[4:6], [4, 5])
    eventually(lambda: len(target.log) == 6)


def test_a_request_that_is_identified_otherwise_starts_over(start_target: Any, engines: Any) -> None:  # noqa: F811
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    engine.digest = OTHER
    context = engine.arrive(tier_request(), KEYS)
    engine.ask()
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    assert engine.tier.lookup(KEYS[0], context) is MISS
    before = engine.tier._states["r"]
    assert engine.tier.identify("r", DIGEST)
    after = engine.tier._states["r"]
    assert after.number != before.number
    assert list(engine.tier._by_number.values()) == [after]
    assert after.request is before.request
    engine.ask()
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.RETRY
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    assert engine.tier.lookup(KEYS[0], context) is HIT
    assert not engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed
    engine.store(context, KEYS[4:5], [4])
    hashes = sequence_hashes(list(range(64)), 4)[1::2]
    eventually(lambda: {entry.router_hash for entry in target.log.entries()} == set(hashes[:5]))


def test_loads_of_requests_that_are_forgotten_end_as_missing(start_target: Any, engines: Any) -> None:  # noqa: F811
    """What the mover has not heard of at once, and the rest when it says that it has let go of their rows."""
    target = start_target()
    stored(engines(target.address), target)
    stuck = threading.Event()
    get = target.target._get
    target.target._get = lambda *all_of_it: stuck.wait(SOON) and get(*all_of_it)
    engine = engines(target.address, fetch_threads=1)
    kept = engine.arrive(tier_request(name="kept"), KEYS, plan(target, 4))
    first = engine.begin_load(kept, KEYS[:1], [0])
    gone = engine.arrive(tier_request(name="gone"), KEYS, plan(target, 4))
    jobs = [engine.begin_load(gone, [KEYS[chunk]], [4 + chunk]) for chunk in range(4)]
    engine.step()
    engine.tier.forget(["gone", "never there"])
    assert [engine.tier.lookup(key, gone) for key in KEYS[:4]] == [MISS] * 4
    assert all(engine.result(job).failed for job in jobs)
    assert engine.begin_load(gone, KEYS[:1], [4]) not in engine.results
    assert first not in engine.results
    stuck.set()
    assert not engine.result(first).failed
    assert engine.tier.lookup(KEYS[0], kept) is HIT
    assert engine.counted()["vllm:kvtier_overdue_chunks"] == 0
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert engine.tier._load_rows == 0


def test_what_a_forgotten_request_had_left_to_store_is_not_stored(start_target: Any, engines: Any) -> None:  # noqa: F811
    """What the mover was given before is: it was computed with what its name says."""
    target = start_target()
    engine = engines(target.address, put_queue_share=0.125)  # 2 of 16 rows
    gone = engine.arrive(tier_request(name="gone"), KEYS)
    kept = engine.arrive(tier_request(name="kept"), KEYS)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    given = engine.begin_store(gone, KEYS[:4], [0, 1, 2, 3])
    engine.begin_store(kept, KEYS[4:6], [4, 5])
    engine.tier.forget({"gone"})
    engine.store(gone, KEYS[6:7], [6])
    os.kill(engine.tier.link.pid, signal.SIGCONT)
    engine.result(given)
    pinned: list[list[Any]] = []

    def pin(keys: list[Any], context: Any) -> Any:
        pinned.append(list(keys))
        return engine.job(context, keys, [4, 5])

    eventually(lambda: (engine.step(), engine.tier.store_leftovers(pin), not engine.tier._leftovers)[2], SOON)
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert pinned == [KEYS[4:6]]
    assert len(target.log) == 4
    assert {entry.fingerprint for entry in target.log.entries()} == {fingerprint(DIGEST)}
    counted = engine.counted()
    assert counted["vllm:kvtier_stored_chunks:('dropped',)"] == 3
    assert counted["vllm:kvtier_stored_chunks:('stored',)"] == 4


def test_a_request_that_was_forgotten_and_is_known_again_is_served(start_target: Any, engines: Any) -> None:  # noqa: F811
    """It has not begun: it waits for its turn."""
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    engine.digest = OTHER
    context = engine.arrive(tier_request(), KEYS)
    engine.ask()
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    engine.tier.forget(["r"])
    assert engine.tier.identify("r", DIGEST)
    engine.ask()
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    assert [engine.tier.lookup(key, context) for key in KEYS[:4]] == [HIT] * 4


async def test_routers_hear_what_a_worker_computes_with(nats_url: str, start_target: Any) -> None:
    """Of an engine that nobody has asked yet, too, and from a mover that was started after it was said."""
    line = await Bus.connect(nats_url, "test")
    said_last: list[tuple[int, dict[str, int]]] = []

    async def hear(report: WorkerReport) -> None:
        said_last[:] = [(report.fingerprint, report.adapters)]

    async def until(*expected: object, idle: bool = False) -> None:
        async with asyncio.timeout(SOON):
            while said_last != [expected]:
                if not idle:
                    await asyncio.to_thread(engine.step)
                await asyncio.sleep(0.05)

    await line.subscribe(messages.subject("default", "speed.worker"), WorkerReport, hear)
    engine = Engine(start_target().address, nats=nats_url, endpoint="identity.b.c")
    try:
        engine.tier.announce(DIGEST, {})
        await until(fingerprint(DIGEST), {}, idle=True)
        engine.tier.announce(DIGEST, {"one": OTHER})
        await until(fingerprint(DIGEST), {"one": fingerprint(OTHER)})
        os.kill(engine.tier.link.pid, signal.SIGKILL)
        said_last.clear()
        await until(fingerprint(DIGEST), {"one": fingerprint(OTHER)})
        engine.tier.announce(None, {})
        await until(0, {})
    finally:
        engine.close()
        await line.close()


def test_what_ranks_have_answered_is_counted(engines: Any) -> None:  # noqa: F811
    """Every outcome from the beginning: Prometheus sees no growth in a series that appears with its first count."""
    engine = engines("127.0.0.1:9", wait=False)
    for outcome in ("same", "same", "changed", "failed", "adapter", "adapter_changed", "adapter"):
        engine.tier.note_identity(outcome)
    counted = engine.counted()
    found = {name: counted[f"vllm:kvtier_identity_checks:('{name}',)"] for name in remote_tier._IDENTITY_OUTCOMES}
    assert found == {"same": 2, "changed": 1, "failed": 1, "adapter": 2, "adapter_changed": 1}
    (fresh,) = [one.tier.get_stats().reduce() for one in [engines("127.0.0.1:9", wait=False)]]
    assert all(fresh[f"vllm:kvtier_identity_checks:('{name}',)"] == 0 for name in found)


# ---- vLLM's own scheduler over all of it


def update(drive: Drive, name: str) -> None:
    """Other weights, without a word to anybody else."""
    drive.executor.loaded = has(name, 1)
    drive.executor.collective_rpc("update_weights")


def fetches_of(drive: Drive) -> list[object]:
    """Chunks that came from the store from here on."""
    fetched: list[object] = []
    (tier,) = drive._scheduler.connector._tiers
    on_load = tier.on_load
    tier.on_load = lambda request, key, end: (fetched.append(key), on_load(request, key, end))
    return fetched


def rows_in_dram(drive: Drive) -> int:
    return len(drive._scheduler.connector._manager.primary_tier._policy.chunks)


def test_each_model_has_its_own_chunks_in_the_store(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
    start_target: Any,
) -> None:
    """The same prompts with one model, with another, and with the first one again."""
    target = start_target()
    drive = start(configured(model, "store", tmp_path, target.address))
    fetched = fetches_of(drive)
    drive.play(1)
    count = len(target.log)
    assert count > 100
    assert drive.executor.asked == 1
    update(drive, "other")
    assert drive._scheduler.reset_prefix_cache()
    drive.play(1)
    assert drive.executor.asked == 2
    assert (len(target.log), len(fetched)) == (2 * count, 0)
    assert len({entry.fingerprint for entry in target.log.entries()}) == 2
    drive.executor.loaded = has("one model", 1)
    assert drive._scheduler.reset_prefix_cache()
    drive.play(1)
    assert drive.executor.asked == 3
    assert len(target.log) == 2 * count
    assert fetched


def test_on_kv_of_another_model_nothing_is_kept_or_stored(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
    start_target: Any,
) -> None:
    """In HBM it stays until the engine is told to forget it: vLLM's own affair, but it goes no further."""
    target = start_target()
    drive = start(configured(model, "store", tmp_path, target.address))
    drive.play(1)
    count = len(target.log)
    update(drive, "other")
    drive.play(2)
    assert (len(target.log), rows_in_dram(drive)) == (count, 0)
    assert drive._scheduler.reset_prefix_cache()
    drive.play(3)
    assert len(target.log) == 2 * count
    assert rows_in_dram(drive) == count


def test_an_engine_whose_model_is_not_known_computes_by_itself(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
    start_target: Any,
) -> None:
    target = start_target()
    drive = start(configured(model, "store", tmp_path, target.address))
    drive.play(1)
    count = len(target.log)
    drive.executor.loaded = Unknown("kvtier: the weights layer.weight cannot be read")
    drive.executor.collective_rpc("update_weights")
    for seed in (1, 2):
        assert drive._scheduler.reset_prefix_cache()
        drive.play(seed)
        assert (len(target.log), rows_in_dram(drive)) == (count, 0)
    assert not drive._scheduler.connector.connector_scheduler._req_status


class Stepped:
    """A drive whose steps a test takes one by one, each answered when the test says so. One prompt is in its DRAM, and
    loads are made between steps."""

    def __init__(self, drive: Drive):
        self.drive, self.scheduler = drive, drive._scheduler
        self.prompt = list(range(1, 50))
        self.under_way: list[tuple[Any, Any]] = []
        self.computed: list[dict[str, int]] = []
        self.loads: list[Any] = []
        self.arrive("before", self.prompt)
        self.until_idle()
        assert rows_in_dram(drive) >= 12
        assert self.scheduler.reset_prefix_cache()
        self.scheduler.connector._clock._copies = SimpleNamespace(bytes_per_second=0.0)

    def arrive(self, name: str, prompt: list[int]) -> None:
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        self.scheduler.add_request(Request(name, prompt, sampling, None, block_hasher=self.drive._hasher))

    def schedule(self) -> None:
        step = self.scheduler.schedule()
        self.computed.append(dict(step.num_scheduled_tokens))
        self.loads += step.kv_connector_metadata.load_jobs.values()
        self.under_way.append((step, self.drive._answer(step)))

    def answer(self) -> None:
        self.scheduler.update_from_output(*self.under_way.pop(0))

    def step(self) -> None:
        self.schedule()
        self.answer()

    def until_idle(self, steps: int = 200) -> None:
        for _ in range(steps):
            if not self.scheduler.has_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests()


@pytest.mark.parametrize("when", ["under way", "a step ahead", "over"])
def test_a_load_that_was_under_way_when_the_model_changed_is_computed(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
    when: str,
) -> None:
    """Also where the step that says that it is over was scheduled before, and where that was said already."""
    one = Stepped(start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}")))
    one.arrive("loads", one.prompt)
    one.step()
    assert [load.req_id for load in one.loads] == ["loads"]
    assert one.computed[-1] == {}
    if when == "a step ahead":
        one.schedule()
    elif when == "over":
        one.step()
    update(one.drive, "other")
    one.arrive("next", list(range(200, 220)))
    one.schedule()
    while one.under_way:
        one.answer()
    one.until_idle()
    assert sum(step.get("loads", 0) for step in one.computed) == len(one.prompt) + 1  # and the first of two answered
    assert rows_in_dram(one.drive) == 0  # HBM holds KV of both


def test_a_row_that_a_rank_still_copies_from_is_not_filled_from_the_store(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
    start_target: Any,
) -> None:
    """Whatever is dropped meanwhile."""
    target, prompt = start_target(), list(range(100, 150))
    other = start(configured(model, "store", tmp_path, target.address))
    update(other, "other")
    other._scheduler.connector._known.reset()
    Stepped.arrive(SimpleNamespace(scheduler=other._scheduler, drive=other), "stores", prompt)  # type: ignore[arg-type]
    eventually(lambda: (other.idle_step(), not other._scheduler.has_requests())[1], SOON)
    assert len(target.log) == 12
    one = Stepped(start(configured(model, "store", tmp_path, target.address)))
    one.arrive("loads", one.prompt)
    one.step()
    (load,) = one.loads
    copied = set(load.src_spec.block_ids.tolist())
    under_way, received, one.drive._copied = one.drive._copied, one.drive._received, []  # the ranks take their time
    update(one.drive, "other")
    one.arrive("fetches", prompt)
    (tier,) = one.scheduler.connector._tiers
    filled: set[int] = set()
    for _ in range(50):
        one.step()
        filled.update(row for each in tier._loads.values() for row in each.command.rows)
    assert not copied & filled
    one.drive._copied, one.drive._received = under_way, received
    one.until_idle()


def test_nobody_is_asked_for_what_is_computed_as_before(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
) -> None:
    drive = start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}"))
    for seed in range(3):
        drive.play(seed)
        for method in ("execute_model", "reset_mm_cache", "add_lora"):
            drive.executor.collective_rpc(method)
    assert drive.executor.asked == 1
    assert drive._scheduler.reset_prefix_cache()
    drive.play(3)
    assert drive.executor.asked == 2


def test_states_of_a_request_that_may_not_be_stored_are_not_stored(
    model: Path,  # noqa: F811
    tmp_path: Path,
    start: START,  # noqa: F811
) -> None:
    """Of hybrid models, which vLLM hands over as a step computes them."""
    connector = start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}"))._scheduler.connector
    stored: list[str] = []
    scheduler = connector.connector_scheduler
    scheduler._build_aligned_boundary_store_jobs = lambda handoffs: (stored.extend(handoffs), {})[1]
    step = output()
    step.kv_connector_block_state = SimpleNamespace(boundary_state_offloads={"of nobody knows what": [(0, 1, 4)]})
    connector.build_connector_meta(step)
    assert stored == []
