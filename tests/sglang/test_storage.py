"""The backend inside SGLang's own HiCache controller and host pools, against a real target."""

from collections.abc import Callable

import pytest

from tests.conftest import RunningTarget
from tests.sglang.conftest import Cache, same

Make = Callable[..., Cache]
Start = Callable[..., RunningTarget]


@pytest.mark.parametrize("interface", [1, 0], ids=["zero-copy", "copied"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("kind", ["MHA", "MLA"])
def test_another_engine_finds_the_pages_bit_by_bit(
    cache: Make, start_target: Start, kind: str, layout: str, interface: int
) -> None:
    store = start_target().address
    writer = cache(store, kind=kind, layout=layout, interface_v1=interface)
    key, content = writer.key(20), writer.content(20)
    assert writer.write(key, content) == 20 * writer.page_tokens
    reader = cache(store, kind=kind, layout=layout, interface_v1=interface)
    assert same(reader.read(key), content)
    assert same(reader.read(reader.key(20, seed=2)), [])
