"""What the engine computes KV with: when ranks are asked, what becomes of requests when it changes, and that nothing is
shared while it is not known."""

import asyncio
import gc
import os
import signal
import threading
import time
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
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.keys import adapter_digest, fingerprint, sequence_hashes
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


def test_the_executor_is_found_in_a_heap_that_is_frozen() -> None:
    """As vLLM leaves it once an engine of one GPU has warmed up: its ranks are in the engine's own process."""
    ranks = Ranks(Config())
    gc.freeze()
    try:
        assert identity_module._find_executor(ranks.vllm_config) is ranks
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def established(ranks: Ranks) -> Identity:
    one = identity(ranks)
    assert one.establish() == ""
    return one


class Config:
    """An engine's configuration, of which only which one it is matters."""


# ---- which executor


def test_the_executor_is_the_one_of_the_engines_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the one that there is: its configuration may be a copy."""
    configs = [Config() for _ in range(3)]
    several = [Ranks(config) for config in configs]
    for config, ranks in zip(configs, several, strict=True):
        one: Any = Identity(config, LAYOUT, RANKS, alike=True)
        assert one._executor is ranks
    with pytest.raises(RuntimeError, match=r"^kvtier: no executor found .*; run this engine without kvtier$"):
        Identity(Config(), LAYOUT, RANKS, alike=True)
    monkeypatch.setattr(gc, "get_objects", lambda: [object(), Ranks, several[0]])
    one = Identity(Config(), LAYOUT, RANKS, alike=True)
    assert one._executor is several[0]


# ---- the model


def test_logs_of_two_engines_tell_in_what_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(identity_module.logger, "info", lambda text, *values: told.append((text % values).split(", ")))
    for dtype, made in (("torch.bfloat16", {"layers": [*range(40)]}), ("torch.float32", {"layers": [*range(41)]})):
        with patch.dict(LAYOUT, {"dtype": dtype, "model": made, "hash_seed": "17"}):
            established(Ranks(None, has("model", 1)))
    first, second = told[1], told[3]
    assert [one.split(" ")[0] for one, other in zip(first, second, strict=True) if one != other] == ["dtype", "model"]
    assert 'dtype "torch.float32"' in second
    assert 'hash_seed "17"' not in second


def test_the_base_is_made_of_layout_weights_and_parallelism() -> None:
    ranks = Ranks(None, has("model", 1), has("model", 2))
    one = identity(ranks)
    assert (one.base, one.stale) == (None, True)
    assert one.establish() == ""
    assert one.base is not None
    assert (len(one.base), one.stale, ranks.asked) == (32, False, ["model"])
    assert established(Ranks(None, has("model", 3))).base == one.base  # what it is made of, not how it is shared out
    others = [Ranks(None, has("other", 3)), Ranks(None, has("model", 4)), Ranks(None, has("model", 3), has("other"))]
    apart = identity(ranks, alike=False)
    assert apart.establish() == ""
    assert len({one.base, apart.base, *(established(other).base for other in others)}) == 5


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
        lambda engine: engine.collective_rpc("apply_model", args=(reads_weights,)),
        lambda engine: engine.collective_rpc(method="anything"),
        lambda engine: engine.collective_rpc(reads_weights),
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

    class Interrupted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            ranks.collective_rpc("update_weights")
            return super().__iter__()

    ranks.models = Interrupted(ranks.models)
    assert one.establish() == ""
    assert one.stale


def test_the_executor_stays_what_it_is() -> None:
    class Own(Ranks):
        def collective_rpc(self, method: object, *args: Any, **options: Any) -> Any:
            if method == "update_weights":
                raise ValueError("no such weights")
            return super().collective_rpc(method, *args, **options)  # type: ignore[arg-type]

    ranks: Any = Own(Config())
    one = established(ranks)
    assert isinstance(ranks, Own)
    assert (type(ranks).__name__, type(ranks).__qualname__) == (Own.__name__, Own.__qualname__)
    assert (ranks.uses_ray, ranks.collective_rpc("anything")) == (False, [None])
    assert one.establish() == ""
    with pytest.raises(ValueError, match="no such weights"):
        ranks.collective_rpc("update_weights")
    assert one.stale
    assert type(Own(Config())) is Own


def test_two_connectors_of_one_engine_both_hear() -> None:
    """What one has asked for the other has not heard."""
    ranks = Ranks(Config())
    first, second = established(ranks), established(ranks)
    assert len(type(ranks).__mro__) == len(Ranks.__mro__) + 1
    ranks.collective_rpc("update_weights")
    assert first.establish() == ""
    assert (first.stale, second.stale) == (False, True)
    assert second.establish() == ""
    assert (first.stale, first.base) == (False, second.base)


# ---- requests


def lora(name: str = "adapter", number: int = 1, path: str = "", **options: Any) -> LoRARequest:
    return LoRARequest(name, number, path or f"/{name}", **options)


ONE, TWO, THREE = lora("one", 1), lora("two", 2), lora("three", 3)


class Cache:
    """The engine's own prefix cache."""


IMAGE = "5" * 64


def image(name: str | None, identifier: str | None = None) -> MultiModalFeatureSpec:
    where = PlaceholderRange(offset=0, length=4)
    return MultiModalFeatureSpec(None, "image", identifier or str(name), where, name)


def request(name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> Any:
    return SimpleNamespace(request_id=name, lora_request=adapter, mm_features=list(images))


class Requests:
    """What a connector does with what is known of requests. `notes` is what the tier is told, `unloads` how often it
    was said that adapters may have been unloaded."""

    def __init__(self, *models: Any):
        self.ranks = Ranks(Config(), *models)
        self.identity = established(self.ranks)
        self.notes: list[tuple[set[str], str]] = []
        self.unloads = 0
        self.identity.on_unload = self.unloaded
        self.known = KnownRequests(self.identity, lambda gone, outcome: self.notes.append((set(gone), outcome)))
        self.cache = Cache()
        self.ranks.asked.clear()

    def unloaded(self) -> None:
        self.unloads += 1

    def arrive(self, name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> bytes | None:
        self.known.arrived(request(name, adapter, *images), self.cache)
        return self.known.identity(name)

    def look(self, name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> bytes | None:
        self.known.look(request(name, adapter, *images), self.cache)
        return self.known.identity(name)

    def admit(self, name: str, adapter: LoRARequest | None = None, *images: MultiModalFeatureSpec) -> bytes | None:
        """It is looked up, once more if that was in vain, and about to be scheduled."""
        for _ in range(2):
            self.look(name, adapter, *images)
            if self.known.admit(request(name, adapter, *images)):
                return self.known.identity(name)
        raise AssertionError(name)

    def run(self, name: str, adapter: LoRARequest | None = None) -> bytes | None:
        """And it has its blocks."""
        found = self.admit(name, adapter)
        self.known.runs(request(name, adapter))
        return found

    def step(self, *names: str) -> None:
        """These are computed."""
        self.known.step_ends(set(names))

    def update(self, name: str) -> None:
        """Other weights, of which vLLM tells nobody."""
        self.ranks.models = [has(name)]
        self.ranks.collective_rpc("update_weights")

    def replace(self, adapter: LoRARequest, content: Any) -> None:
        """An adapter is unloaded, and loaded from other files."""
        self.ranks.remove_lora(adapter.lora_int_id)
        self.ranks.adapters[adapter.lora_int_id] = content
        self.ranks.add_lora(adapter)

    def reset(self) -> None:
        """As vLLM forgets its own KV."""
        self.cache = Cache()

    def stores(self, *names: str) -> list[bool]:
        return [self.known.may_store(name) for name in names]


@pytest.fixture
def engine() -> Requests:
    return Requests()


def test_requests_are_known_as_they_arrive_without_asking(engine: Requests) -> None:
    """What one can go on from is known when it is about to be scheduled; until then nothing of it is stored."""
    for name in "abc":
        assert engine.arrive(name) == engine.identity.base
        assert engine.stores(name) == [False]
        assert engine.admit(name) == engine.identity.base
        assert engine.stores(name) == [True]
    assert (engine.ranks.asked, engine.notes) == ([], [])
    engine.known.left("b")
    assert engine.known.identity("b") is None
    assert engine.stores("b", "never") == [False, False]


def test_nobody_is_asked_on_arrival_and_one_look_asks(engine: Requests) -> None:
    """An engine that sleeps has no weights; one that schedules has."""
    engine.ranks.sleep()
    assert [engine.arrive(name) for name in "abc"] == [None] * 3
    assert engine.ranks.asked == []
    engine.ranks.wake_up()
    assert engine.arrive("d") is None
    assert engine.look("a") == engine.identity.base
    assert [engine.known.identity(name) for name in "bcd"] == [None] * 3  # until they are looked up themselves
    assert [engine.look(name) for name in "bcd"] == [engine.identity.base] * 3
    assert engine.ranks.asked == ["model"]
    assert engine.notes == [(set(), "same")]


def test_what_was_known_is_kept_if_nothing_has_changed(engine: Requests) -> None:
    engine.admit("a")
    engine.update("model")
    assert engine.known.identity("a") == engine.identity.base
    assert engine.stores("a") == [False]  # it may run already, with other weights
    engine.look("b")
    assert engine.stores("a") == [True]
    assert engine.notes == [(set(), "same")]


def test_requests_of_other_weights_are_handed_over_once(engine: Requests) -> None:
    """The one that is looked up, too."""
    before = engine.run("a", ONE), engine.admit("b"), engine.arrive("c")
    engine.notes.clear()
    engine.update("other")
    after = engine.look("c")
    assert after == engine.identity.base not in before
    assert engine.notes == [({"a", "b", "c"}, "changed")]
    assert engine.stores("a", "b") == [False, False]
    assert [engine.known.identity(name) for name in "ab"] == [None, None]
    assert engine.look("b") == engine.look("d") == after
    assert engine.admit("e", ONE) not in (None, *before)
    assert engine.notes[1:] == [(set(), "adapter")]


def test_while_nothing_is_known_of_the_model_nothing_is_of_requests(engine: Requests) -> None:
    engine.arrive("a")
    engine.ranks.models = [Unknown("no weights")]
    engine.ranks.collective_rpc("update_weights")
    assert engine.look("b") is None
    assert engine.notes == [({"a"}, "failed")]
    assert engine.admit("c") is engine.arrive("d") is engine.admit("e", ONE) is None
    assert not any(engine.stores(*"abcde"))
    assert engine.ranks.asked == ["model"]  # once, until something happens
    engine.update("model")
    assert engine.look("c") == engine.identity.base is not None
    assert engine.notes[1:] == [(set(), "changed")]


# ---- the engine's own cache


def test_after_its_cache_was_thrown_away_ranks_are_asked(engine: Requests) -> None:
    """Whatever brought other weights in: another process that has the memory, say."""
    before = engine.look("a")
    assert engine.ranks.asked == []  # the first one that is seen was not thrown away
    for expected in (1, 2):
        engine.reset()
        gc.collect()
        assert engine.arrive(f"{expected}") is None
        assert engine.ranks.asked == ["model"] * (expected - 1)
        assert engine.look(f"{expected}") == engine.look("x") == before
        assert engine.ranks.asked == ["model"] * expected
    engine.known.reset()  # of the connector
    engine.ranks.models = [has("other")]
    assert engine.arrive("y") is None
    assert engine.look("y") == engine.identity.base != before
    assert engine.notes[-1] == ({"a", "1", "2", "x"}, "changed")


def test_what_a_worker_of_other_weights_hands_over_ends_stores_until_the_cache_is_reset(engine: Requests) -> None:
    """Answers are computed with it, and prompts that find it in the engine's own cache. Each adapter has a cache."""
    digest = engine.admit("prompt")
    assert digest is not None
    assert engine.known.computed_with(request("prompt")) == digest
    # The second is a prefill worker's that does not know its weights, or is without kvtier.
    for handed_over, stores in ((digest.hex(), True), ("None", False), (digest.hex(), False)):
        assert engine.known.admit(request("prompt"), handed_over=handed_over)
        assert engine.stores("prompt") == [stores]
    assert engine.known.computed_with(request("prompt")) is None
    engine.reset()
    assert engine.admit("prompt") == digest
    assert engine.stores("prompt") == [True]


def test_an_engine_without_a_cache_of_its_own_is_served(engine: Requests) -> None:
    engine.cache = None  # type: ignore[assignment]
    assert engine.admit("a") == engine.admit("b") == engine.identity.base
    assert engine.stores("a", "b") == [True, True]
    assert engine.ranks.asked == []


@pytest.mark.parametrize("first", ["model", "nobody knows", "reset before"])
def test_on_kv_of_other_weights_nothing_is_stored_until_the_cache_is_reset(engine: Requests, first: str) -> None:
    """A request may go on from it. Also one that waited while the cache was reset, and is the first to fill it."""
    if first == "nobody knows":
        engine.ranks.models = [Unknown("no weights")]
        engine.ranks.collective_rpc("update_weights")
    elif first == "reset before":
        engine.arrive("a")
        engine.reset()
    engine.admit("a")
    engine.update("other")
    assert engine.admit("b") == engine.admit("c") == engine.identity.base
    assert engine.stores("b", "c") == [False, False]
    engine.reset()
    engine.admit("d")
    assert engine.stores("b", "d") == [False, True]
    engine.update("model")
    engine.admit("e")
    assert engine.stores("e") == [False]
    engine.update("other")  # which the cache has
    engine.admit("f")
    assert engine.stores("f") == [True]


def test_kv_of_an_adapter_is_its_own(engine: Requests) -> None:
    """Of one adapter's KV another one's request, or one without, cannot go on."""
    for name, adapter in (("a", ONE), ("b", TWO), ("c", None)):
        engine.admit(name, adapter)
    engine.replace(ONE, "other content")
    for name, adapter in (("d", ONE), ("e", TWO), ("f", None), ("g", lora("one", 1, "/another path"))):
        engine.admit(name, adapter)
        assert engine.stores(name) == [name != "d"]
    engine.reset()
    engine.admit("h", ONE)
    assert engine.stores("h") == [True]


def test_a_prompt_with_an_image_is_known_where_what_names_images_is_believed(engine: Requests) -> None:
    """vLLM goes by the image's hash, by what its client calls it, or by what it says of itself, and does not tell. One
    without a name that is believed keeps nobody else from storing, nor if it is what the engine begins with."""
    assert engine.arrive("a", None, image(IMAGE)) is engine.admit("a", None, image(IMAGE)) is None
    first = engine.admit("b")
    assert engine.stores("a", "b") == [False, True]
    assert engine.ranks.asked == []
    believing = KnownRequests(engine.identity, lambda gone, outcome: None, images=True)
    believing.look(request("a", None, image("cat")), engine.cache)
    assert believing.admit(request("a", None, image("cat")))
    assert believing.identity("a") == first
    assert believing.may_store("a")


# ---- adapters of requests


def test_an_adapter_is_told_by_what_the_ranks_have_loaded() -> None:
    digests = []
    for content in (["a", "a"], ["a", "b"], ["b", "a"]):
        one = Requests(has("model"), has("model"))
        one.ranks.adapters[1] = content
        digests.append(one.admit("a", ONE))
    other = Requests(has("other"), has("model"))
    other.ranks.adapters[1] = ["a", "a"]
    digests.append(other.admit("a", ONE))
    assert None not in digests
    assert len(set(digests)) == 4
    assert other.identity.base is not None
    assert digests[-1] == adapter_digest(other.identity.base, "a")


def test_an_adapter_is_asked_for_once_however_long_its_requests_wait_or_run(engine: Requests) -> None:
    """When its first request is looked up: there is nothing to look it up by before."""
    assert engine.arrive("a", ONE) is None
    assert engine.ranks.asked == []
    digest = engine.look("a", ONE)
    assert digest not in (None, engine.identity.base)
    for _ in range(50):
        assert engine.look("a", ONE) == digest  # the store has not answered
        engine.step("others")
    for _ in range(50):
        assert engine.admit("a", ONE) == digest  # there are no blocks for it
        engine.step("others")
    engine.run("a", ONE)
    for number in range(50):
        engine.step("a")
        assert engine.run(f"{number}", ONE) == digest
        assert engine.stores("a", f"{number}") == [True, True]
    engine.step()
    for name in ("a", *map(str, range(50))):
        engine.known.left(name)
    engine.step()
    assert engine.run("later", ONE) == digest
    assert engine.ranks.asked == [1]
    assert engine.notes == [(set(), "adapter")]
    assert engine.known.adapters() == {"one": digest}


def test_adapters_that_push_each_other_out_are_asked_for_when_their_turn_comes(engine: Requests) -> None:
    """Not while they wait: a look at each would load it and push out another, in every step."""
    engine.ranks.room = 2
    adapters = {"a": ONE, "b": TWO, "c": THREE}
    before = {name: engine.look(name, adapter) for name, adapter in adapters.items()}
    assert engine.ranks.asked == [1, 2, 3]
    for _ in range(50):
        assert {name: engine.look(name, adapter) for name, adapter in adapters.items()} == before
        engine.step()
    assert engine.ranks.asked == [1, 2, 3]
    assert engine.run("a", ONE) == before["a"]
    assert engine.ranks.asked == [1, 2, 3, 1]
    assert engine.stores("a", "b", "c") == [True, False, False]
    assert engine.unloads == 2


def test_an_adapter_in_use_does_not_make_room_if_another_can(engine: Requests) -> None:
    """It would be loaded again in the next step, from files that may have been replaced."""
    engine.ranks.room = 2
    engine.run("a", ONE)
    engine.admit("waits", TWO)
    engine.step("a")
    engine.admit("b", THREE)
    assert sorted(engine.ranks.loaded) == [1, 3]
    assert engine.stores("a") == [True]


@pytest.mark.parametrize("content", ["content of /one", "other content"])
@pytest.mark.parametrize("when", ["told", "pushed out", "dummy batch"])
def test_an_adapter_that_may_have_been_unloaded_is_asked_for_when_it_is_next_used(
    engine: Requests, when: str, content: str
) -> None:
    """Its requests are handed over, and its alone, if it is another one then."""
    same = content == "content of /one"
    engine.ranks.room = 2 if when == "pushed out" else 3
    before = [engine.run("a", ONE), engine.run("b", TWO), engine.admit("c")]
    engine.step("a", "b")
    engine.notes.clear()
    if when == "told":
        engine.replace(ONE, content)
    elif when == "dummy batch":  # of one engine among several, which removes all adapters
        engine.ranks.execute_dummy_batch()
    else:
        engine.known.left("a")
        engine.run("d", THREE)
        engine.step("b", "d")
        engine.known.left("d")
        engine.notes.clear()
    engine.ranks.adapters[1] = content
    asked = len(engine.ranks.asked)
    for _ in range(3):
        assert engine.arrive("e", ONE) == engine.look("e", ONE) == before[0]  # as far as anybody knows
        assert engine.stores("e", "c") == [False, True]
    assert engine.ranks.asked[asked:] == []
    found = engine.known.admit(request("e", ONE))
    assert found == same
    assert engine.ranks.asked[asked:] == [1]
    if same:
        assert engine.notes == [(set(), "adapter")]
    else:
        assert engine.notes == [({"e"} if when == "pushed out" else {"a", "e"}, "adapter_changed")]
    after = engine.run("e", ONE)
    assert (after == before[0]) == same
    engine.step("b", "e")  # two was loaded all the time; whether it was, is asked before it computes
    assert engine.ranks.asked[asked:] == ([1] if when == "pushed out" else [1, 2])
    assert engine.stores("b", "e") == [True, same]  # of the old content there is KV in the engine's cache
    assert engine.known.identity("b") == before[1]
    assert engine.known.adapters()["one"] == after
    assert engine.known.adapters()["two"] == before[1]


def test_an_adapter_that_cannot_be_confirmed_hands_over_its_requests(engine: Requests) -> None:
    """And it is not asked for again until it may be another one."""
    engine.admit("a", ONE)
    engine.replace(ONE, Unknown("not loaded"))
    assert engine.admit("b", ONE) is engine.admit("c", ONE) is None
    assert engine.notes[1:] == [({"a", "b"}, "adapter_changed")]
    assert engine.known.adapters() == {}
    assert engine.admit("d") == engine.identity.base
    assert engine.ranks.asked == [1, 1]
    engine.replace(ONE, "content of /one")
    assert engine.admit("e", ONE) is not None
    engine.ranks.broken = RuntimeError("a rank died")
    engine.ranks.add_lora(TWO)
    assert engine.admit("f", ONE) is None


def test_a_request_that_loads_its_adapter_anew_is_never_known(engine: Requests) -> None:
    """Those before it are handed over, and what makes room for its adapter the ranks do not tell."""
    engine.run("a", ONE)
    engine.run("b", TWO)
    anew = lora("one", 1, load_inplace=True)
    assert engine.run("c", anew) is None
    assert engine.stores("a", "c") == [False, False]
    assert engine.notes[-1] == ({"a"}, "adapter_changed")
    assert engine.known.identity("a") is None
    assert engine.known.adapters() == {"two": engine.known.identity("b")}
    engine.step("c")
    assert engine.stores("b") == [False]
    engine.admit("d", TWO)
    assert engine.stores("b") == [True]
    assert engine.ranks.asked == [1, 2, 2]
    assert engine.admit("e") == engine.identity.base


def test_of_adapters_with_one_name_and_path_one_at_a_time_is_known(engine: Requests) -> None:
    """They are all that DRAM goes by. vLLM's server gives an adapter another number when it is loaded again."""
    first, second = lora("name", 1, "/path"), lora("name", 2, "/path")
    before = engine.run("a", first)
    engine.ranks.adapters[2] = "other content"
    after = engine.run("b", second)
    assert after != before
    assert engine.notes[-1][1] == "adapter_changed"
    assert engine.known.adapters() == {"name": after}
    assert engine.stores("a") == [False]
    assert engine.admit("c", first) == before
    assert engine.notes[-1][1] == "adapter_changed"
    elsewhere = engine.admit("d", lora("name", 3, "/elsewhere"))
    assert engine.known.adapters() == {"name": elsewhere}


def test_adapters_that_routers_hear_of_are_bounded(engine: Requests) -> None:
    """Those are kept that were asked for last."""
    for number in range(1, _ADAPTERS_MAX + 4):
        engine.look(f"{number}", lora(f"adapter {number}", number))
    kept = range(4, _ADAPTERS_MAX + 4)
    assert set(engine.known.adapters()) == {f"adapter {number}" for number in kept}


# ---- the connector


class Loading:
    """A connector at which requests load between steps, until ranks say that it is over. `freed` have lost what they
    loaded."""

    def __init__(self, *names: str):
        self.connector, self.tier, _ = connector(9, {})
        self.freed: list[str] = []
        self.connector._kv_cache_manager = SimpleNamespace(free=lambda request: self.freed.append(request.request_id))
        self.requests = {
            name: SimpleNamespace(
                request_id=name,
                num_computed_tokens=8,
                lora_request=None,
                prefill_stats=None,
                kv_transfer_params=None,
            )
            for name in names
        }
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
        return not self.connector._loading


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


@pytest.mark.parametrize("outcome", ["changed", "adapter_changed"])
def test_a_load_of_what_has_changed_is_undone_when_it_is_over(outcome: str) -> None:
    """Not before: ranks write to its blocks."""
    one = Loading("a", "b", "c", "d")
    one.over("d")
    one.connector._note_answer({"a", "b", "d"}, outcome)
    assert one.lost == {"d"}
    one.over("a", "c")
    assert one.lost == {"a", "d"}
    one.over("b")
    assert one.lost == {"a", "b", "d"}
    one.allocate("c", 0)
    assert one.forgotten


def test_a_load_is_undone_when_its_adapter_may_have_been_unloaded() -> None:
    """It may be another one in the step that goes on from the load."""
    one = Loading("over", "under way", "another adapter's")
    for name in ("over", "under way"):
        one.requests[name].lora_request = ONE
    one.requests["another adapter's"].lora_request = TWO
    one.connector._identity.known = lambda adapter: None if adapter is ONE else IDENTITY
    one.over("over")
    one.connector._undo_unloaded()
    assert one.lost == {"over"}
    one.over("under way", "another adapter's")
    assert one.lost == {"over", "under way"}


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
    one.requests["a"] = SimpleNamespace(request_id="a", num_computed_tokens=8, prefill_stats=None)
    one.connector._loads._jobs[5] = "a"
    one.allocate("a", 8, 5)
    one.connector._note_answer({"a"}, "changed")
    one.over("a")
    assert one.lost == set()
    assert one.forgotten


@pytest.mark.parametrize("outcome", ["changed", "failed", "adapter_changed", "same", "adapter"])
def test_a_change_makes_dram_be_dropped_and_requests_be_forgotten(outcome: str) -> None:
    one, tier, _ = connector(9, {"a": 1, "b": 1, "c": 1, "d": 1})
    gone = set() if outcome in ("same", "adapter") else {"a", "b", "d"}
    one._note_answer(gone, outcome)
    assert one._drop == bool(gone)
    assert set(one._arriving) == {"a", "b", "c", "d"} - gone
    assert (tier.forgotten, tier.outcomes) == ([gone], [outcome])
    one._identity.base = None
    one._note_answer({"c"}, outcome)
    assert tier.announced == [(IDENTITY, {"adapter": IDENTITY}), (None, {"adapter": IDENTITY})]


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


def test_while_the_mover_has_jobs_in_dram_that_is_to_be_dropped_requests_are_computed() -> None:
    """Nothing is found for them, and they are stored when it is dropped."""
    one, tier, _ = connector(9, {})
    scheduler, dropped = stock_scheduler(one)
    looked_up: list[bool] = []
    scheduler._lookup = lambda *_: looked_up.append(True)
    tier.busy = one._drop = True
    asked = engine_request()
    one.on_new_request(asked)
    assert not tier.identities
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert (dropped, looked_up, tier.asked, tier.identities) == ([], [], [], {"r": IDENTITY})
    assert not one._may_store("r")
    tier.busy = False
    one.build_connector_meta(output())
    assert (dropped, one._drop, asked.skip_reading_prefix_cache) == ([1], False, False)
    assert one._may_store("r")


def test_what_was_found_is_not_given_to_a_request_that_is_computed_with_something_else() -> None:
    one, _, _ = connector(9, {"r": 1})
    one.connector_scheduler.get_num_new_matched_tokens = lambda *_, **options: (8, True)
    asked = SimpleNamespace(request_id="r", num_tokens=90, skip_reading_prefix_cache=False)
    one._known.admit = lambda request: False
    assert one.get_num_new_matched_tokens(asked, 0) == (None, False)
    one._known.admit = lambda request: setattr(one, "_drop", True) is None  # another request's adapter
    assert one.get_num_new_matched_tokens(asked, 0) == (None, False)


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
    assert one._known.admitted == ["r"]
    one._known.unknown.clear()
    assert one.get_num_new_matched_tokens(asked, 0) == (0, False)
    assert tier.identities == {"r": IDENTITY}
    assert manager.expected == ["r"]
    assert manager.promoted == [("r", 0)]
    assert tier.hurried == ["r", "r answered"]


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


@pytest.fixture
def target(start_target: Any) -> Any:
    return start_target()


@pytest.fixture
def contents(target: Any, engines: Any) -> list[bytes]:  # noqa: F811
    """Of the first four chunks, which the target holds under DIGEST."""
    return stored(engines(target.address), target)


@pytest.fixture
def waiting(target: Any, contents: list[bytes], engines: Any) -> Engine:  # noqa: F811
    """An engine that waits for what the target says."""
    one: Engine = engines(target.address, lookup_ms=60_000)
    return one


def test_chunks_of_one_identity_are_not_found_under_another(
    target: Any, contents: list[bytes], waiting: Engine
) -> None:
    assert asked_for(waiting, "a", DIGEST) == [HIT] * 4
    assert asked_for(waiting, "b", OTHER) == [MISS] * 4
    assert asked_for(waiting, "c", None) == [MISS] * 4
    # A plan of a router that does not know better says that they are there.
    waiting.digest = OTHER
    context = waiting.arrive(tier_request(name="d"), KEYS, plan(target, 4))
    assert waiting.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[:4])
    for row in range(4):
        waiting.fill(row, 100 + row)
    waiting.store(waiting.arrive(tier_request(name="e"), KEYS), KEYS[:4], [0, 1, 2, 3])
    assert {entry.fingerprint for entry in target.log.entries()} == {fingerprint(DIGEST), fingerprint(OTHER)}
    assert len(target.log) == 8
    waiting.digest = DIGEST
    context = waiting.arrive(tier_request(name="f"), KEYS, plan(target, 4))
    assert not waiting.load(context, KEYS[:4], [8, 9, 10, 11]).failed
    assert [waiting.memory[row].tobytes() for row in (8, 9, 10, 11)] == contents


def test_of_a_request_of_which_nothing_is_known_nothing_is_loaded_or_stored(target: Any, waiting: Engine) -> None:
    context = waiting.arrive(tier_request(), KEYS, plan(target, 4), identified=False)
    assert [waiting.tier.lookup(key, context) for key in KEYS[:4]] == [MISS] * 4
    assert waiting.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[:4])
    waiting.store(context, KEYS[4:6], [4, 5])
    assert len(target.log) == 4
    assert waiting.counted()["vllm:kvtier_stored_chunks:('dropped',)"] == 2
    assert waiting.tier.identify("r", DIGEST)
    assert not waiting.tier.identify("r", DIGEST)
    assert waiting.tier.lookup(KEYS[0], context) is HIT
    waiting.store(context, KEYS[4:6], [4, 5])
    eventually(lambda: len(target.log) == 6)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_request_that_is_identified_otherwise_starts_over(target: Any, waiting: Engine, forgotten: bool) -> None:
    assert asked_for(waiting, "r", OTHER) == [MISS] * 4
    before = waiting.tier._requests["r"]
    if forgotten:
        waiting.tier.forget(["r"])
    assert waiting.tier.identify("r", DIGEST)
    after = waiting.tier._requests["r"]
    assert after.number != before.number
    assert list(waiting.tier._by_number.values()) == [after]
    assert after.engine_request is before.engine_request
    waiting.ask()
    assert waiting.tier.lookup(KEYS[0], after.context) is LookupResult.RETRY
    eventually(lambda: (waiting.step(), not waiting.tier.undecided("r"))[1], SOON)
    assert [waiting.tier.lookup(key, after.context) for key in KEYS[:4]] == [HIT] * 4
    assert not waiting.load(after.context, KEYS[:4], [0, 1, 2, 3]).failed
    waiting.store(after.context, KEYS[4:5], [4])
    hashes = sequence_hashes(list(range(64)), 4)[1::2]
    eventually(lambda: {entry.router_hash for entry in target.log.entries()} == set(hashes[:5]))


def test_loads_of_requests_that_are_forgotten_end_as_missing(
    target: Any,
    contents: list[bytes],
    engines: Any,  # noqa: F811
) -> None:
    """What the mover has not heard of at once, and the rest when it says that it has let go of their rows."""
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
    assert engine.counted()["vllm:kvtier_fetch_timeout_chunks"] == 0
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert engine.tier._load_rows == 0


def test_what_a_forgotten_request_had_left_to_store_is_not_stored(
    target: Any,
    engines: Any,  # noqa: F811
    monkeypatch: Any,
) -> None:
    """What the mover was given before is: it was computed with what its name says."""
    monkeypatch.setattr("components.worker.puts.ROWS_SHARE", 0.125)
    engine = engines(target.address)  # 2 of 16 rows
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

    eventually(lambda: (engine.step(), engine.tier.store_leftovers(pin), not engine.tier.puts._leftovers)[2], SOON)
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert pinned == [KEYS[4:6]]
    assert len(target.log) == 4
    assert {entry.fingerprint for entry in target.log.entries()} == {fingerprint(DIGEST)}
    counted = engine.counted()
    assert counted["vllm:kvtier_stored_chunks:('dropped',)"] == 3
    assert counted["vllm:kvtier_stored_chunks:('stored',)"] == 4


async def test_routers_hear_what_a_worker_computes_with(nats_url: str, target: Any) -> None:
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
    engine = Engine(target.address, nats=nats_url, endpoint="identity.b.c")
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
    expected = {"same": 2, "changed": 1, "failed": 1, "adapter": 2, "adapter_changed": 1}
    assert {name: counted[f"vllm:kvtier_identity_checks:('{name}',)"] for name in expected} == expected
    (fresh,) = [one.tier.get_stats().reduce() for one in [engines("127.0.0.1:9", wait=False)]]
    assert all(fresh[f"vllm:kvtier_identity_checks:('{name}',)"] == 0 for name in expected)


# ---- vLLM's own scheduler over all of it


Over = Callable[..., Drive]


@pytest.fixture
def over(model: Path, tmp_path: Path, start: START) -> Over:  # noqa: F811
    """Starts a scheduler over a target, or over none."""

    def started(target: Any = None) -> Drive:
        address = f"127.0.0.1:{free_port()}" if target is None else target.address
        return start(configured(model, "store", tmp_path, address))

    return started


def update(drive: Drive, name: str) -> None:
    """Other weights, without a word to anybody else."""
    drive.executor.loaded = has(name, 1)
    drive.executor.collective_rpc("update_weights")


def fetches_of(drive: Drive) -> list[object]:
    """Chunks that came from the store from here on."""
    fetched: list[object] = []
    tier = drive._scheduler.connector._tier
    on_load = tier.on_load
    tier.on_load = lambda request, key, end: (fetched.append(key), on_load(request, key, end))
    return fetched


def rows_in_dram(drive: Drive) -> int:
    return len(drive._scheduler.connector._manager.primary_tier._policy.chunks)


def test_each_model_has_its_own_chunks_in_the_store(target: Any, over: Over) -> None:
    """The same prompts with one model, with another, and with the first one again."""
    drive = over(target)
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


def test_on_kv_of_another_model_nothing_is_kept_or_stored(target: Any, over: Over) -> None:
    """In HBM it stays until the engine is told to forget it: vLLM's own affair, but it goes no further."""
    drive = over(target)
    drive.play(1)
    count = len(target.log)
    update(drive, "other")
    drive.play(2)
    assert (len(target.log), rows_in_dram(drive)) == (count, 0)
    assert drive._scheduler.reset_prefix_cache()
    drive.play(3)
    assert len(target.log) == 2 * count
    assert rows_in_dram(drive) == count


def test_an_engine_whose_model_is_not_known_computes_by_itself(target: Any, over: Over) -> None:
    drive = over(target)
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

    def arrive(self, name: str, prompt: list[int], adapter: LoRARequest | None = None) -> None:
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        hasher = self.drive._hasher
        self.scheduler.add_request(Request(name, prompt, sampling, None, lora_request=adapter, block_hasher=hasher))

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

    def until_idle(self) -> None:
        def idle() -> bool:
            if self.scheduler.has_requests():
                self.step()
            return not self.scheduler.has_requests()

        eventually(idle, SOON)


@pytest.mark.parametrize("when", ["under way", "a step ahead", "over"])
def test_a_load_that_was_under_way_when_the_model_changed_is_computed(over: Over, when: str) -> None:
    """Also where the step that says that it is over was scheduled before, and where that was said already."""
    one = Stepped(over())
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


def test_a_row_that_a_rank_still_copies_from_is_not_filled_from_the_store(target: Any, over: Over) -> None:
    """Whatever is dropped meanwhile."""
    prompt = list(range(100, 150))
    other = over(target)
    update(other, "other")
    other._scheduler.connector._known.reset()
    Stepped.arrive(SimpleNamespace(scheduler=other._scheduler, drive=other), "stores", prompt)  # type: ignore[arg-type]
    eventually(lambda: (other.idle_step(), not other._scheduler.has_requests())[1], SOON)
    assert len(target.log) == 12
    one = Stepped(over(target))
    one.arrive("loads", one.prompt)
    one.step()
    (load,) = one.loads
    copied = set(load.src_spec.block_ids.tolist())
    under_way, received, one.drive._copied = one.drive._copied, one.drive._received, []  # the ranks take their time
    update(one.drive, "other")
    one.arrive("fetches", prompt)
    tier = one.scheduler.connector._tier
    filled: set[int] = set()
    for _ in range(50):
        one.step()
        filled.update(row for each in tier._loads.values() for row in each.command.rows)
    assert not copied & filled
    one.drive._copied, one.drive._received = under_way, received
    one.until_idle()


def test_steps_go_on_while_dram_waits_for_the_mover_to_be_dropped(
    target: Any, over: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a mover that hangs, too, as long as it is given."""
    monkeypatch.setattr(remote_tier, "_DRAIN_SECONDS", 3.0)
    one = Stepped(over(target))
    connector = one.scheduler.connector
    tier = connector._tier
    eventually(lambda: (one.drive.idle_step(), not tier.has_pending_work())[1], SOON)
    one.arrive("old", list(range(300, 350)))
    eventually(lambda: (one.step(), "old" in one.computed[-1])[1], SOON)
    os.kill(tier.link.pid, signal.SIGSTOP)
    eventually(lambda: (one.step(), tier.puts.pending)[1], SOON)
    update(one.drive, "other")
    assert one.scheduler.reset_prefix_cache()
    times: list[float] = []

    def step() -> None:
        begun = time.monotonic()
        one.step()
        times.append(time.monotonic() - begun)

    one.arrive("new", one.prompt)
    eventually(lambda: (step(), one.scheduler.get_num_unfinished_requests() == 0)[1], SOON)
    assert sum(times) < remote_tier._DRAIN_SECONDS
    assert sum(each.get("new", 0) for each in one.computed) == len(one.prompt) + 1
    assert connector._drop
    assert rows_in_dram(one.drive) > 0
    eventually(lambda: (step(), not connector._drop)[1], SOON)
    assert (tier.link.starts, rows_in_dram(one.drive)) == (2, 0)
    assert max(times) < remote_tier._DRAIN_SECONDS / 2
    eventually(lambda: (one.drive.idle_step(), tier.link.ready)[1], SOON)
    one.arrive("later", one.prompt)
    one.until_idle()
    eventually(lambda: (one.drive.idle_step(), not tier.has_pending_work())[1], SOON)
    assert rows_in_dram(one.drive) == 12
    assert len({entry.fingerprint for entry in target.log.entries()}) == 2


def test_ranks_are_asked_once_for_an_adapter_whose_request_waits_for_the_store(target: Any, over: Over) -> None:
    """And not while it is computed, nor for the next one; after it may have been unloaded, once."""
    one = Stepped(over(target))
    tier = one.scheduler.connector._tier
    asked = one.drive.executor.adapters_asked
    for number, (waits, computed) in enumerate([(1, 1), (0, 0), (0, 1)]):
        if number == 2:
            one.drive.executor.collective_rpc("remove_lora")
        os.kill(tier.link.pid, signal.SIGSTOP)
        one.arrive(f"{number}", list(range(100 * number, 100 * number + 50)), ONE)
        for _ in range(50):
            one.step()
        assert len(asked) == waits
        os.kill(tier.link.pid, signal.SIGCONT)
        one.until_idle()
        assert len(asked) == computed
        asked.clear()


def test_nobody_is_asked_for_what_is_computed_as_before(over: Over) -> None:
    drive = over()
    for seed in range(3):
        drive.play(seed)
        for method in ("execute_model", "reset_mm_cache", "add_lora"):
            drive.executor.collective_rpc(method)
    assert (drive.executor.asked, drive.executor.adapters_asked) == (1, [])
    assert drive._scheduler.reset_prefix_cache()
    drive.play(3)
    assert drive.executor.asked == 2


def test_states_of_a_request_that_may_not_be_stored_are_not_stored(over: Over) -> None:
    """Of hybrid models, which vLLM hands over as a step computes them."""
    connector = over()._scheduler.connector
    stored: list[str] = []
    scheduler = connector.connector_scheduler
    scheduler._build_aligned_boundary_store_jobs = lambda handoffs: (stored.extend(handoffs), {})[1]
    step = output()
    step.kv_connector_block_state = SimpleNamespace(boundary_state_offloads={"of nobody knows what": [(0, 1, 4)]})
    connector.build_connector_meta(step)
    assert stored == []
