"""A real Prometheus, from Debian, for tests: it scrapes and evaluates every second, and alerts at once."""

import json
import math
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from graphs.metrics_doc import RULES
from graphs.services import free_port
from tests.conftest import start_server, stop_server


def program(name: str) -> str:
    """Where `prometheus` or `promtool` is; docker/install_test_programs.sh brings them. Skips the test without."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: docker/install_test_programs.sh")
    return found


def promtool(*arguments: str) -> str:
    ended = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=60, cwd=RULES.parent, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def impatient(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The same rules, of which no alert waits before it fires."""
    groups = [
        {**group, "rules": [{key: value for key, value in rule.items() if key != "for"} for rule in group["rules"]]}
        for group in rules["groups"]
    ]
    return {"groups": groups}


class Prometheus:
    """Runs with `config`, which is `scrape_config`'s with other intervals, in `folder`, until `stop`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        folder.mkdir()
        (folder / "rules.yml").write_text(yaml.safe_dump(impatient(yaml.safe_load(RULES.read_text()))))
        often = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump({**config, "global": often}))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        arguments = [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        program("prometheus")
        self._server = start_server("prometheus", arguments, port)

    def stop(self) -> None:
        stop_server(self._server)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; fails with Prometheus's own words."""
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, query: str) -> list[float]:
        """Of every series that the query returns now, but for those that are no number."""
        found = [float(series["value"][1]) for series in self.get("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """Labels of the alerts that fire, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    def healthy(self) -> list[str]:
        """Names of the rules that were evaluated without an error."""
        groups = self.get("rules")["groups"]
        return [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "ok"]


def watched(rule: Mapping[str, Any]) -> str:
    """What a rule looks at: a recorded expression, or what an alert compares with a number."""
    if "record" in rule:
        return str(rule["expr"])
    match = re.fullmatch(r"(.+) (?:>|==) [0-9.]+", rule["expr"])
    assert match, f"{rule['alert']}: not an expression, an operator and a number"
    return match[1]
