"""Identity: which model and which adapters the engine computes KV with now, and when that may have changed.

Runs in the scheduler's process, on its thread. Ranks report what they have loaded when they are asked (weights.py).
They are asked when the engine starts. After an event that may have changed the weights, they are asked again, before
the next load or store. vLLM does not notify connectors of such events, so this module watches for two:

* a call from the engine to its ranks that is not known to be harmless. All of them go through the executor: new weights
  by any route, sleep and wake-up, adapters, custom functions;
* a reset of the engine's prefix cache, which is how users declare KV invalid.

The question to the ranks is such a call, too, so it is ordered between two steps. It is asked only while the engine
schedules: a sleeping engine has no weights.

Ranks are asked for an adapter when its first request is looked up. They are asked again when a request with it is about
to be scheduled, if it may have been unloaded since. Ranks unload an adapter on the engine's command, or to make room
for another one. The answers reveal it: each adapter is asked for before a step computes with it.
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
# Calls that may change adapters. A dummy batch unloads all of them.
_ADAPTERS = frozenset(("add_lora", "remove_lora", "execute_dummy_batch"))
_TOLD_MAX = 40  # characters of an input in the log
# An adapter's name and path.
_Owner = tuple[str, str]
# Limits: adapters announced to routers; adapters remembered by name and path.
_ADAPTERS_MAX = 64
_LAST_MAX = 4096


def _told(inputs: Mapping[str, object]) -> str:
    """Each input by name, so that the logs of two engines show which input differs. Long ones are shown as digests."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in sorted(inputs.items())}
    short = {
        name: text if len(text) <= _TOLD_MAX and name != "hash_seed" else f"#{blake2b(text.encode()).hexdigest()[:8]}"
        for name, text in texts.items()
    }
    return ", ".join(f"{name} {text}" for name, text in short.items())


class Identity:
    """`layout` is the part that does not depend on the weights (layout.py). `base` is the digest (32 bytes) in the keys
    of requests without an adapter. None: it is not known, and nothing may be shared."""

    def __init__(self, config: VllmConfig, layout: Mapping[str, object], ranks: list[int], *, alike: bool):
        self._layout, self._ranks, self._alike = layout, ranks, alike
        # `_last`: each adapter's digest when it was last loaded, by name and path, which is all that block hashes
        # contain. `_confirmed`: the loaded adapters, by vLLM's number. A digest of None: the ranks could not read it.
        self._confirmed: dict[int, tuple[_Owner, str | None]] = {}
        self._last: dict[_Owner, str] = {}
        self._executor = _find_executor(config)
        self._forgotten = False  # whether adapters were forgotten because there were too many
        self.base: bytes | None = None
        self.stale = True
        self.on_stale: Callable[[], None] = lambda: None  # called at once, between two steps
        self.on_unload: Callable[[], None] = lambda: None  # an adapter may have been unloaded
        self._executor.__class__ = _watched(type(self._executor))
        self._executor.kvtier_watchers = [*getattr(self._executor, "kvtier_watchers", ()), self._heard]

    def establish(self) -> str:
        """Ask the ranks. Returns an empty text, or the problem. With a problem, `base` is None."""
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
            "kvtier: identity %s: %.1f GB of weights read on %d ranks in %.2f s",
            self.base.hex()[:16],
            sum(answer.hashed_bytes for answer in answers) / 1e9,
            len(answers),
            max(answer.seconds for answer in answers),
        )
        logger.info("kvtier: what its chunks depend on: %s", _told(inputs))
        return ""

    def known(self, adapter: LoRARequest | None) -> bytes | None:
        """The digest of requests with that adapter, if it is known without asking the ranks."""
        if self.stale or self.base is None or adapter is None:
            return None if self.stale else self.base
        _, content = self._confirmed.get(adapter.lora_int_id, (None, None))
        if content is None or adapter.load_inplace:  # it is reloaded in every step
            return None
        return adapter_digest(self.base, content)

    def confirmed(self, number: int) -> bool:
        """Whether ranks were asked for the adapter of that number since it was last possibly unloaded."""
        return number in self._confirmed

    def confirm(self, adapter: LoRARequest, in_use: list[int]) -> bool:
        """Ask the ranks which adapter they have under that number; they load it if they have none. Returns whether it
        may differ from the one that earlier requests of that name and path had. `in_use` as in weights.loaded_adapter.
        Precondition: not `stale`."""
        if len(self._last) >= _LAST_MAX:
            self._last.clear()
            self._forgotten = True
        owner = adapter.lora_name, adapter.lora_path
        before = self._last.pop(owner, None)
        changed = before is not None or self._forgotten
        # Only one adapter at a time for each name and path: DRAM does not distinguish them.
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
        """As `known`. For an adapter that may have been unloaded, the digest that it last had."""
        if self.stale or adapter is None or adapter.load_inplace or self.confirmed(adapter.lora_int_id):
            return self.known(adapter)
        return self.last(adapter)

    def last(self, adapter: LoRARequest) -> bytes | None:
        """The digest of requests with that adapter, as of the last answer of the ranks."""
        content = self._last.get((adapter.lora_name, adapter.lora_path))
        return None if content is None or self.base is None else adapter_digest(self.base, content)

    def keep(self, numbers: Collection[int]) -> None:
        """Note that only these adapters are still loaded."""
        kept = {number: one for number, one in self._confirmed.items() if number in numbers}
        unloaded = len(kept) < len(self._confirmed)
        self._confirmed = kept
        if unloaded:
            self.on_unload()

    def _ask(self, question: Callable[..., Any], *args: object) -> list[Any] | str:
        try:
            answers: list[Any] = self._executor.collective_rpc(weights.answer, args=(question.__name__, *args))
        except Exception as error:  # for example of a failed executor; the engine must not notice
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
    clean: bool  # whether its hits in the engine's prefix cache have the same identity; False until it was admitted


# A notification for the tier: the requests whose KV is outdated, and the result. For the model that is "same",
# "changed" or "failed"; for an adapter "adapter" or "adapter_changed".
Note = Callable[[Collection[str], str], None]


class KnownRequests:
    """The identity of each request, as far as it is known. `note` is called for every answer of the ranks. `images`:
    whether image hashes are trusted."""

    def __init__(self, identity: Identity, note: Note, *, images: bool = False):
        self._identity, self._note, self._images = identity, note, images
        self._requests: dict[str, _Known] = {}
        self._running: dict[str, LoRARequest] = {}  # requests that have blocks -> adapter
        self._computed: Container[str] = ()  # in the last step
        self._names: dict[str, LoRARequest] = {}
        self._cache: weakref.ref[object] | None = None
        # The identity of the first KV in the engine's prefix cache, by adapter.
        self._served: dict[_Owner | None, bytes] = {}
        self._warned = b""

    def arrived(self, request: Request, cache: object) -> None:
        """A request is new, and the engine may sleep."""
        self._see(cache)
        self._take(request)

    def look(self, request: Request, cache: object) -> None:
        """The scheduler is about to look the request up: establish its identity. An adapter that was asked for before
        is assumed to be unchanged."""
        self._see(cache)
        if self._identity.stale:
            self._renew()
        adapter = request.lora_request
        if adapter is not None and not adapter.load_inplace and self._identity.last(adapter) is None:
            self._confirm(adapter)
        self._take(request)

    def admit(self, request: Request, *, handed_over: str | None = None) -> bool:
        """The scheduler is about to use the request's hits, or to compute it. Returns whether its identity is still
        that of the lookup; if not, it has to be looked up again. `handed_over`: the prompt's KV comes from another
        worker, with this identity (hexadecimal)."""
        adapter, looked_up = request.lora_request, self.identity(request.request_id)
        if adapter is not None:
            self._confirm(adapter)
        digest = self._identity.known(adapter)
        if looked_up is not None and looked_up != digest:
            self._requests.pop(request.request_id, None)
            return False
        # From here on, the engine's prefix cache may hold KV of another identity.
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
        """The identity of all the request's KV, hits in the engine's prefix cache included. None: unknown or mixed."""
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
        """`scheduled` are the requests that the step computes. Ask for those of their adapters that may have been
        unloaded."""
        self._computed = scheduled
        adapters = {one.lora_int_id: one for req_id, one in self._running.items() if req_id in scheduled}
        for adapter in adapters.values():
            if adapter.load_inplace:  # ranks do not report which adapters they unload for it
                self._identity.keep(adapters)
            else:
                self._confirm(adapter)

    def reset(self) -> None:
        """The engine declares all KV invalid."""
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
        """Ask for the adapter, unless it is confirmed."""
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
        # vLLM identifies an image by its hash, a client's name for it, or its own metadata, and does not say by which.
        if digest is not None and (self._images or not request.mm_features):
            self._requests.setdefault(request.request_id, _Known(digest, request.lora_request, False))


def _owner(adapter: LoRARequest | None) -> _Owner | None:
    """The engine's prefix cache distinguishes adapters by name and path only."""
    return None if adapter is None else (adapter.lora_name, adapter.lora_path)


def _find_executor(config: VllmConfig) -> Any:
    """The executor of the engine that this code runs in. vLLM does not pass it to connectors."""
    frozen = gc.get_freeze_count()  # an executor in this process freezes the heap, and frozen objects are not listed
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
