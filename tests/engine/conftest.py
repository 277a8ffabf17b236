"""One cluster of real engines, as `make demo` and `dynamo serve` start it, shared by all tests here."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from graphs import demo
from graphs.services import free_port
from graphs.trial import Trial


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def trial(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trial]:
    watched = f"--Store.metrics-port={free_port()}"
    async with Trial(tmp_path_factory.mktemp("trial"), print, [*demo.OVERRIDES, watched]) as one:
        yield one


@pytest.fixture(autouse=True)
def new_conversation(request: pytest.FixtureRequest) -> None:
    if "trial" in request.fixturenames:
        request.getfixturevalue("trial").messages.clear()
