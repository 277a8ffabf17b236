"""Which model, and which adapters, the engine computes KV with now; and that it may have changed.

In the scheduler's process, on its thread. What ranks have loaded they say when they are asked (weights.py): once when
the engine starts, and again before anything is loaded or stored after something happened that may have changed it. vLLM
tells a connector of no such thing, so two are watched for:

* a call that the engine makes to its ranks, and that is not known to leave weights alone. All of them go through the
  executor: new weights by whatever route, sleeping and waking up, adapters, a function of somebody's own;
* that the engine threw its own prefix cache away, which is how it is told that KV is not valid any more.

Ranks are asked by such a call, too, in the order of the steps before it and after it, and only while the engine
schedules: one that sleeps has no weights.

An adapter is asked for when its first request is looked up; after that only when a request with it is about to be
scheduled, and only if the adapter may have been unloaded since. Ranks unload one when the engine tells them to, or to
make room for another one; and so that they tell of it, each one is asked for before a step computes with it.
"""

import gc
import json
import logging
import weakref
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from components.worker import weights
from components.worker.compat import Executor, LoRARequest, Request, VllmConfig
from kvstore.keys import adapter_digest, layout_digest

logger = logging.getLogger(f"vllm.{__name__}")  # which vLLM shows, INFO included

# Calls that leave weights and adapters as they are, among them those of each step.
_HARMLESS = frozenset(
    (
        *("execute_model", "sample_tokens", "take_draft_token_ids"),
        *("check_health", "synchronize_device", "profile", "reset_mm_cache", "reset_encoder_cache"),
        *("get_supported_tasks", "supports_draft_weight_updates", "list_loras", "pin_lora"),
        *("get_kv_connector_handshake_metadata", "get_kv_cache_spec", "get_supported_kv_cache_layouts"),
        *("get_model_inspection", "save_sharded_state", "shutdown"),
    )
)
# Calls after which adapters may be others. A dummy batch unloads all of them.
_ADAPTERS = frozenset(("add_lora", "remove_lora", "execute_dummy_batch"))
_TOLD_MAX = 40  # characters of an input in the log
# An adapter's name and path.
_Owner = tuple[str, str]
# That routers hear of; and by name and path, that are remembered.
_ADAPTERS_MAX = 64
_LAST_MAX = 4096


def _told(inputs: Mapping[str, object]) -> str:
    """Each input by its name, so that the logs of two engines tell in which one they differ; a long one as a digest."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in sorted(inputs.items())}
    short = {
        name: text if len(text) <= _TOLD_MAX and name != "hash_seed" else f"#{blake2b(text.encode()).hexdigest()[:8]}"
        for name, text in texts.items()
    }
    return ", ".join(f"{name} {text}" for name, text in short.items())


class Identity:
    """`layout` is what is known without the weights (layout.py). `base` is the digest (32 bytes) that goes into keys of
    requests without an adapter; None: it is not known, and nothing may be shared."""

    def __init__(self, config: VllmConfig, layout: Mapping[str, object], ranks: list[int], *, alike: bool):
        self._layout, self._ranks, self._alike = layout, ranks, alike
        # Adapters by name and path, which is all that blocks' hashes tell, and their digests as they were last loaded;
        # and by vLLM's number those that are loaded still. None: the ranks could not tell.
        self._confirmed: dict[int, tuple[_Owner, str | None]] = {}
        self._last: dict[_Owner, str] = {}
        self._executor = _find_executor(config)
        self._forgotten = False  # whether there were more adapters than are remembered
        self.base: bytes | None = None
        self.stale = True
        self.on_stale: Callable[[], None] = lambda: None  # called at once, between two steps
        self.on_unload: Callable[[], None] = lambda: None  # an adapter may have been unloaded
        self._executor.__class__ = _watched(type(self._executor))
        self._executor.kvtier_watchers = [*getattr(self._executor, "kvtier_watchers", ()), self._heard]

    def establish(self) -> str:
        """Ask the ranks. Returns an empty text, or what stands in the way: `base` is None then."""
        self.stale = False
        self.keep(())
        answers = self._ask(weights.model_digest)
        if isinstance(answers, str):
            self.base = None
            return answers
        digest, alike = weights.combined(answers, alike=self._alike)
        inputs = {**self._layout, "weights": digest, "parallel": "any" if alike else self._ranks}
        self.base = layout_digest(inputs)
        logger.info(
            "kvtier: the model is %s: %.1f GB of weights read on %d ranks in %.2f s",
            self.base.hex()[:16],
            sum(answer.hashed_bytes for answer in answers) / 1e9,
            len(answers),
            max(answer.seconds for answer in answers),
        )
        logger.info("kvtier: what its chunks depend on: %s", _told(inputs))
        return ""

    def known(self, adapter: LoRARequest | None) -> bytes | None:
        """The digest of requests with that adapter, as far as it is known without asking."""
        if self.stale or self.base is None or adapter is None:
            return None if self.stale else self.base
        _, content = self._confirmed.get(adapter.lora_int_id, (None, None))
        if content is None or adapter.load_inplace:  # which is loaded anew in every step
            return None
        return adapter_digest(self.base, content)

    def confirmed(self, number: int) -> bool:
        """Whether ranks were asked for the adapter of that number since it may have been unloaded."""
        return number in self._confirmed

    def confirm(self, adapter: LoRARequest, in_use: list[int]) -> bool:
        """Ask the ranks which adapter they have under that number; they load it if they have none. Whether it may be
        another one than requests of that name and path had before. `in_use` as in weights.loaded_adapter. Not to be
        called while `stale`."""
        if len(self._last) >= _LAST_MAX:
            self._last.clear()
            self._forgotten = True
        owner = adapter.lora_name, adapter.lora_path
        before = self._last.pop(owner, None)
        changed = before is not None or self._forgotten
        # Of adapters with one name and path, one at a time: DRAM does not tell them apart.
        others = {number for number, (one, _) in self._confirmed.items() if one != owner} - {adapter.lora_int_id}
        if adapter.load_inplace:
            self.keep(others)
            return changed
        answers = self._ask(weights.loaded_adapter, adapter, in_use)
        if isinstance(answers, str):
            logger.warning("kvtier: requests with adapter %r do without the tier: %s", adapter.lora_name, answers)
            self._confirmed[adapter.lora_int_id] = owner, None
            self.keep((adapter.lora_int_id,))
            return changed
        digests = [answer.digest for answer in answers]
        digest = digests[0] if len(set(digests)) == 1 else "/".join(digests)
        self._confirmed[adapter.lora_int_id] = owner, digest
        self._last[owner] = digest
        self.keep({adapter.lora_int_id, *others.intersection(*(answer.held for answer in answers))})
        return changed and before != digest

    def expected(self, adapter: LoRARequest | None) -> bytes | None:
        """As `known`; and of an adapter that may have been unloaded, what it was."""
        if self.stale or adapter is None or adapter.load_inplace or self.confirmed(adapter.lora_int_id):
            return self.known(adapter)
        return self.last(adapter)

    def last(self, adapter: LoRARequest) -> bytes | None:
        """The digest of requests with that adapter, when it was asked for last."""
        content = self._last.get((adapter.lora_name, adapter.lora_path))
        return None if content is None or self.base is None else adapter_digest(self.base, content)

    def keep(self, numbers: Collection[int]) -> None:
        """Of adapters, only these are loaded still."""
        kept = {number: one for number, one in self._confirmed.items() if number in numbers}
        unloaded = len(kept) < len(self._confirmed)
        self._confirmed = kept
        if unloaded:
            self.on_unload()

    def _ask(self, question: Callable[..., Any], *args: object) -> list[Any] | str:
        try:
            answers: list[Any] = self._executor.collective_rpc(weights.answer, args=(question.__name__, *args))
        except Exception as error:  # of an executor that failed, say: whatever it is, the engine goes on as it would
            logger.exception("kvtier: ranks do not say what they have loaded")
            return repr(error)
        return next((answer for answer in answers if isinstance(answer, weights.Unknown)), answers)

    def _heard(self, method: object) -> None:
        """The engine is about to call its ranks."""
        if isinstance(method, str) and method in _ADAPTERS:
            self.keep(())
        elif method is not weights.answer and not (isinstance(method, str) and method in _HARMLESS):
            self.stale = True
            self.on_stale()


@dataclass(frozen=True)
class _Known:
    digest: bytes
    adapter: LoRARequest | None
    clean: bool  # whether what it may find in the engine's own cache was computed with the same; no, before it looks


# What the tier is told: requests whose KV is not what would be computed now, and what was found: "same", "changed",
# "failed" of the model, "adapter", "adapter_changed" of an adapter.
Note = Callable[[Collection[str], str], None]


class KnownRequests:
    """Which requests are computed with what, as far as it is known. `note` hears of every answer of the ranks.
    `images`: whether what names an image is believed."""

    def __init__(self, identity: Identity, note: Note, *, images: bool = False):
        self._identity, self._note, self._images = identity, note, images
        self._requests: dict[str, _Known] = {}
        self._running: dict[str, LoRARequest] = {}  # that have blocks, and their adapter
        self._computed: Container[str] = ()  # in the last step
        self._names: dict[str, LoRARequest] = {}
        self._cache: weakref.ref[object] | None = None
        # Of the engine's own prefix cache: what the first of its KV was computed with, by adapter.
        self._served: dict[_Owner | None, bytes] = {}
        self._warned = b""

    def arrived(self, request: Request, cache: object) -> None:
        """A request is new, and the engine may sleep."""
        self._see(cache)
        self._take(request)

    def look(self, request: Request, cache: object) -> None:
        """The scheduler is about to look the request up. What it is computed with is known, and for an adapter that was
        asked for before it is expected to be what it was."""
        self._see(cache)
        if self._identity.stale:
            self._renew()
        adapter = request.lora_request
        if adapter is not None and not adapter.load_inplace and self._identity.last(adapter) is None:
            self._confirm(adapter)
        self._take(request)

    def admit(self, request: Request, *, handed_over: str | None = None) -> bool:
        """The scheduler is about to give the request what was found of it, or to compute it. Whether what it was looked
        up with is what it is computed with; if not, it has to be looked up again. `handed_over`: its prompt comes from
        another worker, which computed it with what has this digest, in hexadecimal."""
        adapter, looked_up = request.lora_request, self.identity(request.request_id)
        if adapter is not None:
            self._confirm(adapter)
        digest = self._identity.known(adapter)
        if looked_up is not None and looked_up != digest:
            self._requests.pop(request.request_id, None)
            return False
        # What the engine's own cache holds was computed with, if not all of it with this.
        if handed_over is not None and (digest is None or handed_over != digest.hex()):
            self._served[_owner(adapter)] = b""
        clean = self._served.setdefault(_owner(adapter), digest or b"") == digest
        if digest is not None and request.request_id in self._requests:
            self._requests[request.request_id] = _Known(digest, adapter, clean)
        if digest is not None and not clean and self._warned != digest:
            self._warned = digest
            logger.warning(
                "kvtier: the engine's prefix cache holds KV of weights or of an adapter that were replaced, or that a "
                "prefill worker without kvtier, or with others, handed over: nothing is stored until it is reset (POST "
                "/reset_prefix_cache, or Dynamo's flush_cache)"
            )
        return True

    def computed_with(self, request: Request) -> bytes | None:
        """What the request's KV was computed with, what is in the engine's own cache, too; None if not known."""
        digest = self._identity.known(request.lora_request)
        return digest if self._served.get(_owner(request.lora_request)) == digest else None

    def identity(self, req_id: str) -> bytes | None:
        known = self._requests.get(req_id)
        return known.digest if known is not None else None

    def may_store(self, req_id: str) -> bool:
        known = self._requests.get(req_id)
        return known is not None and known.clean and self._identity.known(known.adapter) == known.digest

    def runs(self, request: Request) -> None:
        """It has its blocks."""
        if request.lora_request is not None:
            self._running[request.request_id] = request.lora_request

    def left(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        self._running.pop(req_id, None)

    def step_ends(self, scheduled: Container[str]) -> None:
        """The requests that the step computes. Adapters among them that may have been unloaded are asked for."""
        self._computed = scheduled
        adapters = {one.lora_int_id: one for req_id, one in self._running.items() if req_id in scheduled}
        for adapter in adapters.values():
            if adapter.load_inplace:  # what makes room for it, ranks do not tell
                self._identity.keep(adapters)
            else:
                self._confirm(adapter)

    def reset(self) -> None:
        """The engine wants all KV forgotten."""
        self._identity.stale = True

    def adapters(self) -> dict[str, bytes]:
        """By the name that requests give them."""
        digests = {name: self._identity.last(adapter) for name, adapter in self._names.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def _see(self, cache: object) -> None:
        if cache is not (self._cache and self._cache()):
            if self._cache is not None:
                self._identity.stale = True
            self._cache = weakref.ref(cache)
            self._served.clear()

    def _renew(self) -> None:
        before = self._identity.base
        problem = self._identity.establish()
        if problem:
            logger.error("kvtier: the tier is off until the engine's weights or caches are touched again: %s", problem)
        elif before == self._identity.base:
            self._note((), "same")
            return
        gone = list(self._requests)
        self._requests.clear()
        self._note(gone, "failed" if problem else "changed")

    def _confirm(self, adapter: LoRARequest) -> None:
        """Once for each time that it may have been unloaded."""
        if self._identity.base is None or self._identity.stale:
            return
        if self._identity.confirmed(adapter.lora_int_id) and not adapter.load_inplace:
            return
        running = list(reversed(self._running.items()))
        in_use = [one for req_id, one in running if req_id in self._computed] + [one for _, one in running]
        changed = self._identity.confirm(adapter, list({one.lora_int_id: None for one in in_use}))
        self._names.pop(adapter.lora_name, None)
        self._names[adapter.lora_name] = adapter
        while len(self._names) > _ADAPTERS_MAX:
            del self._names[next(iter(self._names))]
        gone = [
            req_id
            for req_id, known in self._requests.items()
            if known.adapter is not None
            and known.adapter.lora_int_id == adapter.lora_int_id
            and known.digest != self._identity.known(adapter)
        ]
        for req_id in gone:
            del self._requests[req_id]
        self._note(gone, "adapter_changed" if changed else "adapter")

    def _take(self, request: Request) -> None:
        digest = self._identity.expected(request.lora_request)
        # vLLM knows an image by its hash, by what its client calls it, or by what it says of itself, and does not tell.
        if digest is not None and (self._images or not request.mm_features):
            self._requests.setdefault(request.request_id, _Known(digest, request.lora_request, False))


def _owner(adapter: LoRARequest | None) -> _Owner | None:
    """Whose KV the engine's own cache takes it for: it goes by an adapter's name and path."""
    return None if adapter is None else (adapter.lora_name, adapter.lora_path)


def _find_executor(config: VllmConfig) -> Any:
    """The executor of the engine that this code runs in, which vLLM shows no connector."""
    frozen = gc.get_freeze_count()  # one that computes in this process has frozen the heap, and is not listed
    gc.unfreeze()
    found = [one for one in gc.get_objects() if issubclass(type(one), Executor)]
    if frozen:
        gc.freeze()
    ours = [one for one in found if one.vllm_config is config] or (found if len(found) == 1 else [])
    if not ours:
        raise RuntimeError(
            "kvtier: no executor found in the engine's process, so that ranks cannot be asked which model they have "
            "loaded; run this engine without kvtier"
        )
    return ours[0]


def _watched(executor: type) -> type:
    if hasattr(executor, "kvtier_watchers"):
        return executor

    class Watched(executor):
        kvtier_watchers: tuple[Callable[[object], None], ...] = ()

        def collective_rpc(self, method: object, *args: object, **options: object) -> object:
            for watcher in self.kvtier_watchers:
                watcher(method)
            return super().collective_rpc(method, *args, **options)

    Watched.__name__ = executor.__name__
    Watched.__qualname__ = executor.__qualname__
    return Watched
