"""Which model, and which adapters, the engine computes KV with now; and that it may have changed.

In the scheduler's process, on its thread. What ranks have loaded they say when they are asked (weights.py): once when
the engine starts, and again before anything is loaded or stored after something happened that may have changed it. vLLM
tells a connector of no such thing, so two are watched for:

* a call that the engine makes to its ranks, and that is not known to leave weights alone. All of them go through the
  executor: new weights by whatever route, sleeping and waking up, adapters, a function of somebody's own;
* that the engine threw its own prefix cache away, which is how it is told that KV is not valid any more.

Ranks are asked by such a call, too, in the order of the steps before it and after it, and only while the engine
schedules: one that sleeps has no weights.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any

from components.worker import weights
from components.worker.compat import Executor, LoRARequest, Request, VllmConfig
from kvstore.keys import adapter_digest, layout_digest

logger = logging.getLogger(f"vllm.{__name__}")  # which vLLM shows, INFO included

# Calls that leave weights and adapters as they are, among them those of each step.
_HARMLESS = frozenset(
    (
        *("execute_model", "sample_tokens", "take_draft_token_ids", "execute_dummy_batch"),
        *("check_health", "synchronize_device", "profile", "reset_mm_cache", "reset_encoder_cache"),
        *("get_supported_tasks", "supports_draft_weight_updates", "list_loras", "pin_lora"),
        *("get_kv_connector_handshake_metadata", "get_kv_cache_spec", "get_supported_kv_cache_layouts"),
        *("get_model_inspection", "save_sharded_state", "shutdown"),
    )
)
_ADAPTERS = frozenset(("add_lora", "remove_lora"))
# That routers hear of; and by name and path, that are remembered.
_ADAPTERS_MAX = 64
_LAST_MAX = 4096


class Identity:
    """`layout` is what is known without the weights (layout.py). `base` is the digest (32 bytes) that goes into keys of
    requests without an adapter; None: it is not known, and nothing may be shared."""

    def __init__(self, config: VllmConfig, layout: Mapping[str, object], ranks: list[int], *, alike: bool):
        self._layout, self._ranks, self._alike = layout, ranks, alike
        # Digests of adapters as they were last loaded: by vLLM's number while they are loaded still, and by name and
        # path, which is all that blocks' hashes tell.
        self._confirmed: dict[int, str] = {}
        self._last: dict[tuple[str, str], str] = {}
        self._executor = _find_executor(config)
        self._forgotten = False  # whether there were more adapters than are remembered
        self.base: bytes | None = None
        self.stale = True
        self.on_stale: Callable[[], None] = lambda: None  # called at once, between two steps
        self._executor.__class__ = _watched(type(self._executor))
        self._executor.kvtier_watchers = [*getattr(self._executor, "kvtier_watchers", ()), self._heard]

    def establish(self) -> str:
        """Ask the ranks. Returns an empty text, or what stands in the way: `base` is None then."""
        self.stale = False
        self._confirmed.clear()
        answers = self._ask(weights.model_digest)
        if isinstance(answers, str):
            self.base = None
            return answers
        digest, alike = weights.combined(answers, alike=self._alike)
        self.base = layout_digest({**self._layout, "weights": digest, "parallel": "any" if alike else self._ranks})
        logger.info(
            "kvtier: the model is %s: %.1f GB of weights read on %d ranks in %.2f s",
            self.base.hex()[:16],
            sum(answer.hashed_bytes for answer in answers) / 1e9,
            len(answers),
            max(answer.seconds for answer in answers),
        )
        return ""

    def known(self, adapter: LoRARequest | None) -> bytes | None:
        """The digest of requests with that adapter, as far as it is known without asking."""
        if self.stale or self.base is None or adapter is None:
            return None if self.stale else self.base
        content = self._confirmed.get(adapter.lora_int_id)
        if content is None or adapter.load_inplace:  # which is loaded anew in every step
            return None
        return adapter_digest(self.base, content)

    def confirm(self, adapter: LoRARequest) -> bool:
        """Ask the ranks which adapter they have under that number; they load it if they have none. Whether it may be
        another one than requests of that name and path had before. Not to be called while `stale`."""
        if len(self._last) >= _LAST_MAX:
            self._last.clear()
            self._forgotten = True
        owner = adapter.lora_name, adapter.lora_path
        self._confirmed.pop(adapter.lora_int_id, None)
        before = self._last.pop(owner, None)
        changed = before is not None or self._forgotten
        if adapter.load_inplace:
            return changed
        answers = self._ask(weights.adapter_digest, adapter)
        if isinstance(answers, str):
            logger.warning("kvtier: requests with adapter %r do without the tier: %s", adapter.lora_name, answers)
            return changed
        if any(answer.loaded for answer in answers):  # which may have pushed out another one
            self._confirmed.clear()
        digests = [answer.digest for answer in answers]
        digest = digests[0] if len(set(digests)) == 1 else "/".join(digests)
        self._confirmed[adapter.lora_int_id] = self._last[owner] = digest
        return changed and before != digest

    def last(self, adapter: LoRARequest) -> bytes | None:
        """The digest of requests with that adapter, when it was asked for last."""
        content = self._last.get((adapter.lora_name, adapter.lora_path))
        return None if content is None or self.base is None else adapter_digest(self.base, content)

    def keep(self, numbers: Collection[int]) -> None:
        """Of adapters, only these stay confirmed."""
        self._confirmed = {number: digest for number, digest in self._confirmed.items() if number in numbers}

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
            self._confirmed.clear()
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
        self._running: dict[str, int] = {}  # with an adapter, and its number
        self._names: dict[str, LoRARequest] = {}
        self._cache: Callable[[], object] = lambda: None
        # Of the engine's own prefix cache: what the first of its KV was computed with, by adapter.
        self._served: dict[tuple[str, str] | None, bytes] = {}
        self._warned = b""

    def arrived(self, request: Request, cache: object) -> None:
        """A request is new, and the engine may sleep."""
        self._see(cache)
        self._take(request)

    def look(self, request: Request, cache: object) -> None:
        """The scheduler is about to look the request up: make sure what it is computed with."""
        self._see(cache)
        if self._identity.stale:
            self._renew()
        adapter = request.lora_request
        if adapter is not None and self._identity.base is not None and self._identity.known(adapter) is None:
            self._confirm(adapter)
        self._take(request)
        digest = self._identity.known(adapter)
        # What the engine's own cache holds was computed with, if not all of it with this.
        clean = self._served.setdefault(_owner(adapter), digest or b"") == digest
        if digest is not None and request.request_id in self._requests:
            self._requests[request.request_id] = _Known(digest, adapter, clean)
        if digest is not None and not clean and self._warned != digest:
            self._warned = digest
            logger.warning(
                "kvtier: the engine's prefix cache holds KV of weights or of an adapter that were replaced: nothing is "
                "stored until it is reset (POST /reset_prefix_cache, or Dynamo's flush_cache)"
            )

    def identity(self, req_id: str) -> bytes | None:
        known = self._requests.get(req_id)
        return known.digest if known is not None else None

    def may_store(self, req_id: str) -> bool:
        known = self._requests.get(req_id)
        return known is not None and known.clean and self._identity.known(known.adapter) == known.digest

    def runs(self, request: Request) -> None:
        """It has its blocks. In each step that it is computed in, its adapter is loaded."""
        if request.lora_request is not None:
            self._running[request.request_id] = request.lora_request.lora_int_id

    def left(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        self._running.pop(req_id, None)

    def step_ends(self, scheduled: Container[str]) -> None:
        """An adapter that no request of the step has may be unloaded, and loaded again from other files."""
        if self._names:
            self._identity.keep({number for req_id, number in self._running.items() if req_id in scheduled})

    def reset(self) -> None:
        """The engine wants all KV forgotten."""
        self._identity.stale = True

    def adapters(self) -> dict[str, bytes]:
        """By the name that requests give them."""
        digests = {name: self._identity.last(adapter) for name, adapter in self._names.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def _see(self, cache: object) -> None:
        if cache is not self._cache():
            if self._cache() is not None or self._served:
                self._identity.stale = True
            self._cache = weakref.ref(cache) if cache is not None else lambda: None
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
        changed = self._identity.confirm(adapter)
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
        digest = self._identity.known(request.lora_request)
        # vLLM knows an image by its hash, by what its client calls it, or by what it says of itself, and does not tell.
        if digest is not None and (self._images or not request.mm_features):
            self._requests.setdefault(request.request_id, _Known(digest, request.lora_request, False))


def _owner(adapter: LoRARequest | None) -> tuple[str, str] | None:
    """Whose KV the engine's own cache takes it for: it goes by an adapter's name and path."""
    return None if adapter is None else (adapter.lora_name, adapter.lora_path)


def _find_executor(config: VllmConfig) -> Any:
    """The executor of the engine that this code runs in, which vLLM shows no connector."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Executor)]
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
