"""Scenarios: those that are shipped can be run, and what cannot be run is refused with the rule and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from load_tests.generator.fields import ScenarioError, Span
from load_tests.generator.scenario import FOLDER, Scenario, parse_scenario, read_scenario
from load_tests.generator.target import check_target
from load_tests.generator.threshold import Threshold

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))


def table(**changes: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "arrivals": {"process": "poisson", "rate": 5, "duration_s": 2},
        "kinds": [{"name": "one", "output": [1, 9]}],
        **changes,
    }


def parse(**changes: Any) -> Scenario:
    return parse_scenario(table(**changes), FOLDER)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenarios_can_be_run(name: str) -> None:
    scenario = parse_scenario(*read_scenario(name))
    assert scenario.name == name
    assert scenario.about


def test_the_kinds_of_traffic_that_are_promised_are_shipped() -> None:
    promised = {"chat", "rag", "multi_turn", "long_context", "many_tenants", "cancel_storm", "slow_readers"}
    assert promised | {"deadline_mix", "poison", "trace"} <= set(SHIPPED)


def test_a_table_becomes_frozen_values() -> None:
    scenario = parse(slo={"first_token_s": 1}, call={"kind": "generate"})
    assert scenario.kinds[0].output == Span(1, 9)
    assert scenario.kinds[0].prompt.own == Span(32, 32)
    assert scenario.slo.first_token_s == 1.0
    assert scenario.call.kind == "generate"
    with pytest.raises(AttributeError):
        scenario.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": 5}, "name must be a string, is 5"),
        ({"names": 5}, "names is not a key; there are "),
        ({"kinds": []}, "kinds must have at least one"),
        ({"kinds": [{"name": "a"}, {"name": "a"}]}, "kinds must have different names"),
        ({"kinds": [{"name": "a", "weight": 0}]}, r"kinds\[0\].weight must be > 0, is 0.0"),
        ({"kinds": [{"name": "a", "output": [9, 1]}]}, r"kinds\[0\].output must be a number >= 0, or two in ascending"),
        ({"kinds": [{"name": "a", "prompt": {"form": "song"}}]}, r"prompt.form must be one of .*, is 'song'"),
        ({"kinds": [{"name": "a", "prompt": {"picked": 2}}]}, r"picked must be in \[0, documents = 0\], is 2"),
        ({"kinds": [{"name": "a", "poisons": ["arsenic"]}]}, "poisons must be among empty_prompt, .*, is 'arsenic'"),
        ({"kinds": [{"name": "a", "cancel_share": 1.5}]}, r"cancel_share must be in \[0, 1\], is 1.5"),
        ({"kinds": [{}]}, r"kinds\[0\].name must be given"),
        ({"processes": True}, "processes must be a whole number, is True"),
        ({"processes": 65}, r"processes must be in \[1, 64\], is 65"),
        ({"arrivals": {"process": "poisson", "duration_s": 2}}, r"arrivals.rate must be in \(0, 100000\], is 0.0"),
        ({"arrivals": {"process": "poisson", "rate": 1, "duration_s": 9999}}, r"duration_s must be in \(0, 3600\]"),
        ({"arrivals": {"process": "trace", "duration_s": 1}}, "arrivals.file must be given for a trace"),
        ({"call": {"tenant_header": "x-tenant"}}, "tenant_header needs call.kind = 'generate'"),
        ({"limits": {"requests": 0}}, r"limits.requests must be in \[1, 10000000\], is 0"),
        ({"slo": {"total_s": 0}}, "slo.total_s must be > 0, is 0.0"),
        ({"thresholds": ["speed > 9"]}, "must be about one of sent, .*, is about 'speed'"),
        ({"thresholds": ["errors"]}, "must look like 'first_token_s.p99 <= 0.5', is 'errors'"),
        ({"trace": []}, "trace must be given as arrivals.file"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_rule_and_the_value(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ScenarioError, match=complaint):
        parse(**changes)


def test_changes_are_part_of_the_scenario_and_checked_like_it(tmp_path: Path) -> None:
    read, folder = read_scenario("chat", {"arrivals.rate": 7.5, "seed": 9, "limits.requests": 5})
    scenario = parse_scenario(read, folder)
    assert (scenario.arrivals.rate, scenario.seed, scenario.limits.requests) == (7.5, 9, 5)
    with pytest.raises(ScenarioError, match=r"arrivals\.rate must be"):
        read_scenario("chat", {"arrivals.rate": -1.0})
    with pytest.raises(ScenarioError, match=r"there is no scenario 'chatter' .*; there are .*chat, "):
        read_scenario("chatter")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ScenarioError, match="is not TOML"):
        read_scenario(str(broken))


def test_a_threshold_holds_or_not_and_never_for_what_was_not_measured() -> None:
    threshold = Threshold.parse("first_token_s.p99<=0.5")
    assert str(threshold) == "first_token_s.p99 <= 0.5"
    assert threshold.holds({"first_token_s.p99": 0.5})
    assert not threshold.holds({"first_token_s.p99": 0.51})
    assert not threshold.holds({"first_token_s.p99": None})
    assert not Threshold.parse("age_s.p99 >= 0").holds({"age_s.p99": None})


@pytest.mark.parametrize("target", ["127.0.0.1:50051", "localhost:1", "[::1]:50051", "127.9.9.9:65535"])
def test_loopback_may_be_loaded(target: str) -> None:
    check_target(target, allows_remote=False)


@pytest.mark.parametrize("target", ["10.0.0.1:50051", "example.org:443", "0.0.0.0:50051", "localhost.example.org:1"])
def test_other_machines_only_when_told(target: str) -> None:
    with pytest.raises(ScenarioError, match="must be a loopback address without --allow-remote"):
        check_target(target, allows_remote=False)
    check_target(target, allows_remote=True)


@pytest.mark.parametrize("target", ["", "50051", "host:", "host:0", "host:65536", "host:-1", ":1"])
def test_what_is_no_address_is_refused(target: str) -> None:
    with pytest.raises(ScenarioError, match="target must be HOST:PORT"):
        check_target(target, allows_remote=True)
