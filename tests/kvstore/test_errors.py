"""Errors for the operator: one template for each kind of problem, with place, field, value and what was expected."""

import pickle
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ByteSize, ConfigDict, Field

from kvstore.errors import ConfigError, validated


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cpu_cores: int = 1


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    count: Annotated[int, Field(ge=1, le=9)] = 1
    seconds: Annotated[float, Field(gt=0, lt=5)] = 1.0
    capacity: ByteSize = ByteSize(1)
    mode: Literal["", "fast", "slow", "odd-even"] = "fast"
    is_on: bool = False
    parts: list[Inner] = []
    by_name: dict[str, Inner] = {}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConfigError("hot", "lots", "a size"), "hot: 'lots' given, expected a size"),
        (ConfigError("hot", 0, "a size"), "hot: '0' given, expected a size"),
        (ConfigError("hot", "", "a size"), "hot: missing, expected a size"),
        (ConfigError("", "{", "YAML").at("my.yaml:7"), "my.yaml:7: '{' given, expected YAML"),
        (ConfigError.missing("hot", "a size"), "hot: missing, expected a size"),
        (ConfigError.missing("hot", "a size", "--peers"), "hot: missing, required by --peers, expected a size"),
        (ConfigError.unknown("Store.hott", ["dir", "hot"]), "Store.hott: unknown, expected one of dir, hot; did you"),
        (ConfigError.unknown("fly", ["serve"], "a command:"), "fly: unknown, expected a command: serve"),
        (ConfigError.duplicate("hot", "hot", "line 2"), "hot: 'hot' is a duplicate of line 2, expected it once"),
        (ConfigError.conflicting("a.port", 80, "b", "another"), "a.port: '80' conflicts with b, expected another"),
    ],
)
def test_each_kind_of_problem_has_one_template(error: ConfigError, says: str) -> None:
    assert str(error).startswith(says)


def test_parents_and_place_come_before_the_field() -> None:
    error = ConfigError("hot", 5, "a size").within("Store").within("Common")
    assert error.field == "Common.Store.hot"
    assert str(error.at("my.yaml:3")) == "my.yaml:3: Common.Store.hot: '5' given, expected a size"
    assert error.at("other.yaml:1").place == "my.yaml:3"  # the nearest place is the most exact one


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("nats", "nats://user:secret@host", "a URL"),
        ConfigError.conflicting("nats", "nats://user:secret@host", "--etcd", "one"),
        ConfigError.missing("password", "a value", "nats://user:secret@host"),
        ConfigError("nats", "host", "a URL").at("nats://user:secret@host"),
    ],
)
def test_no_password_of_a_url_is_shown(error: ConfigError) -> None:
    assert "secret" not in str(error) + repr(error)
    assert "***@host" in str(error)


def test_an_error_is_one_line() -> None:
    error = ConfigError("a\nb", "c\x1b[2J\nd", "e\nf").at("g\nh")
    assert str(error).isprintable()


def test_a_process_can_send_an_error_to_another() -> None:
    error = ConfigError.conflicting("a", 1, "b", "c").at("f:1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "name: missing, expected a value: it has no default"),
        ({"name": 7}, "name: '7' given, expected a text, in quotes"),
        ({"count": 0}, "count: '0' given, expected at least 1"),
        ({"count": 10}, "count: '10' given, expected at most 9"),
        ({"count": "many"}, "count: 'many' given, expected a whole number"),
        ({"seconds": 0}, "seconds: '0' given, expected more than 0"),
        ({"seconds": 5}, "seconds: '5' given, expected less than 5"),
        ({"seconds": "s"}, "seconds: 's' given, expected a number"),
        ({"capacity": "lots"}, "capacity: 'lots' given, expected a size such as 500G or 1.5TiB"),
        ({"mode": "odd"}, "mode: 'odd' given, expected one of fast, slow, odd-even"),
        ({"is_on": "perhaps"}, "is-on: 'perhaps' given, expected true or false"),
        ({"parts": 3}, "parts: '3' given, expected a list"),
        ({"by_name": 3}, "by-name: '3' given, expected a mapping"),
        ({"parts": [{"cpu_cores": "x"}]}, "parts.0.cpu-cores: 'x' given, expected a whole number"),
        ({"by_name": {"a": {"cores": 1}}}, "by-name.a.cores: unknown, expected one of cpu-cores"),
        ({"cuont": 1}, "cuont: unknown, expected one of name, count, seconds, capacity, mode, is-on"),
    ],
)
def test_a_model_is_refused_in_the_same_words(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validated(Options, {"name": "a", **values} if values else {})
    assert str(refused.value).startswith(says)
