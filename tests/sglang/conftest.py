"""What tests of the backend are given. SGLang is imported by the first that asks; where it is missing, none does."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one model that SGLang has loaded in this process."""
    from benchmarks.store.hicache import load
    from tests.sglang.hicache import PAGE_TOKENS, compile_hash

    compile_hash()
    return load(tmp_path_factory.mktemp("model"), PAGE_TOKENS)


@pytest.fixture
def cache(runner: Any) -> Iterator[Callable[..., Any]]:
    """Makes caches with the backend attached; each is detached at the end of the test."""
    from tests.sglang.hicache import Cache

    made: list[Cache] = []

    def make(store: str, **changes: Any) -> Cache:
        made.append(Cache(store, **changes))
        return made[-1].attach()

    yield make
    for one in made:
        one.detach()
