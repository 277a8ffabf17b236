"""Every worker command of every example, read by the stock worker's own parser: no engine, but the import of vLLM."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from components.worker.__main__ import compose, parse
from graphs.service import load_deployment

pytestmark = pytest.mark.engine

CONFIGS = Path(__file__).parent.parent.parent / "graphs" / "configs"
EXAMPLES = {
    "agg": "graphs.agg:Frontend",
    "quickstart": "graphs.agg_router:Frontend",
    "single_gpu": "graphs.agg_router:Frontend",
    "two_gpu": "graphs.agg_router:Frontend",
    "eight_gpu": "graphs.agg_router:Frontend",
    "external_store": "graphs.agg_router:Frontend",
    "disagg": "graphs.disagg_router:Frontend",
    "disagg_quickstart": "graphs.disagg_router:Frontend",
}


@pytest.fixture(scope="module")
def stock_parse() -> Callable[[list[str]], argparse.Namespace]:
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup
    from dynamo.vllm.backend_args import DynamoVllmArgGroup
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    ours = argparse.ArgumentParser(allow_abbrev=False)
    DynamoRuntimeArgGroup().add_arguments(ours)
    DynamoVllmArgGroup().add_arguments(ours)
    theirs = FlexibleArgumentParser(add_help=False)
    AsyncEngineArgs.add_cli_args(theirs, async_args_only=False)
    return lambda arguments: theirs.parse_args(ours.parse_known_args(arguments)[1])


@pytest.mark.parametrize("config", EXAMPLES)
def test_the_stock_worker_takes_every_argument(
    config: str, stock_parse: Callable[[list[str]], argparse.Namespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    deployment = load_deployment(EXAMPLES[config], CONFIGS / f"{config}.yaml", [], tmp_path)
    workers = [process for process in deployment.processes() if process.service.endswith("Worker")]
    for worker in workers:
        arguments = list(worker.command[3:])
        if "components.worker" in worker.command:
            options, _, rest = parse(arguments)
            arguments = compose(options, rest)[0][3:]
        assert stock_parse(arguments).model == deployment.of(worker.service).flags["model"]
    assert workers
    with pytest.raises(SystemExit):
        stock_parse([*arguments, "--max-modle-len", "5"])
