"""What the Serve application asks of Ray for the processes of routers and replicas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.boot import ONE_LOOP
from cluster.ray_connection import _environment

PROGRAM = """
import dataclasses, json, sys
from cluster import app
from cluster.config import from_tree

def asked(tree, environ, *failed):
    deployments = built(tree, environ)
    for each in failed:
        if isinstance(each, dict):
            tree, each = each, ["Worker-a"]
        versions = {name: of["version"] for name, of in deployments.items()}
        deployments = built(tree, environ, versions=versions, failed=each)
    return deployments

def built(tree, environ, **there):
    router = app.build(from_tree(tree), cores=8, secret=bytes, environ=environ, **there)._bound_deployment
    workers = [each._bound_deployment for each in router.init_kwargs["workers"].values()]
    return {
        each.name: {
            "options": each.ray_actor_options,
            "version": each.version,
            "scaling": each._deployment_config.autoscaling_config.policy.policy_kwargs if each is not router else {},
            "threads": each.init_kwargs["config"].threads if each is not router else 0,
            "observer": dataclasses.asdict(each.init_kwargs["setup"].observer) if each is router else {},
        }
        for each in (router, *workers)
    }

print(json.dumps([asked(*each) for each in json.load(sys.stdin)]))
"""
"""In a process of its own: Serve warns while it is imported."""

TWO = {"a": {"replicas": {"num_replicas": 2}}, "b": {"model": "fake", "scaling": {"max_replicas": 4}}}
OTHER_A = {**TWO, "a": {"replicas": {"num_replicas": 2}, "engine": {"max_num_sequences": 3}}}
OTHER_B = {**TWO, "b": {"model": "fake", "scaling": {"max_replicas": 4, "downscale_delay_s": 7}}}
LOUD = {"level": "debug"}
ASKED: list[tuple[Any, ...]] = [
    ({}, {"OCTAVO_CACHE_DIR": "there", "HOME": "here"}),
    ({}, None),
    ({"models": TWO}, None),
    ({"models": TWO}, None),
    ({"models": OTHER_A}, None),
    ({"models": OTHER_B}, None),
    ({"models": TWO, "log": LOUD}, None),
    ({"models": TWO}, None, ["Worker-b"]),
    ({"models": TWO}, None, ["Worker-b"], []),
    ({"models": TWO}, None, ["Worker-b"], ["Worker-b"]),
    ({"models": OTHER_A}, None, {"models": TWO}),
    ({"log": {"requests": True}, "telemetry": {"max_tenants": 7, "max_kept_requests": 9}}, None),
]
"""A configuration, variables, and then what had failed each time that it was applied again; the last but one is another
configuration, applied when Worker-a had failed."""

Asked = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def asked() -> Asked:
    """What Serve is asked for by each of `ASKED`, by the names of the deployments."""
    command, given = [sys.executable, "-c", PROGRAM], json.dumps(ASKED)
    done = subprocess.run(command, check=True, timeout=150, input=given, stdout=subprocess.PIPE, text=True)
    found: Asked = json.loads(done.stdout)
    return found


def test_a_ray_of_others_is_told_the_variables(asked: Asked) -> None:
    for deployment in asked[0].values():
        variables = deployment["options"]["runtime_env"]["env_vars"]
        assert variables["OCTAVO_CACHE_DIR"] == "there"
        assert "HOME" not in variables
        assert ONE_LOOP.items() <= variables.items()


def test_a_ray_of_our_own_starts_no_process_twice(asked: Asked) -> None:
    """Ray starts a process that is to have variables of its own, or anything else of a runtime environment, from one
    that sets them up first and imports Ray for that: most of a second of a replica's start."""
    assert not any(deployment["options"].get("runtime_env") for deployment in asked[1].values())


def test_every_model_has_a_deployment_and_all_share_a_node(asked: Asked) -> None:
    assert list(asked[1]) == ["Router", "Worker"]
    several = asked[2]
    assert list(several) == ["Router", "Worker-a", "Worker-b"]
    assert {several[name]["options"]["num_cpus"] for name in ("Worker-a", "Worker-b")} == {8 / (2 + 4 + 1)}
    assert {several[name]["threads"] for name in ("Worker-a", "Worker-b")} == {8 // (2 + 4)}
    bounds = {name: several[name]["scaling"] for name in ("Worker-a", "Worker-b")}
    assert [bounds["Worker-a"]["scaling"][key] for key in ("min_replicas", "max_replicas")] == [2, 2]
    assert [bounds["Worker-b"]["scaling"][key] for key in ("min_replicas", "max_replicas")] == [1, 4]
    assert bounds["Worker-b"]["model"] == "b"


def test_only_what_changed_gets_another_version(asked: Asked) -> None:
    """Serve would give each deployment a random one: everything would start anew whenever an application is applied."""

    def changed(before: int, after: int) -> set[str]:
        return {name for name in asked[after] if asked[before][name]["version"] != asked[after][name]["version"]}

    assert changed(2, 3) == set()
    assert changed(2, 4) == {"Worker-a"}
    assert changed(2, 5) == set()  # bounds are for Serve, not for processes
    assert changed(2, 6) == {"Router", "Worker-a", "Worker-b"}
    assert changed(2, 7) == {"Worker-b"}  # it had failed: Serve tries the same version no more
    assert changed(7, 8) == set()
    assert changed(7, 9) == {"Worker-b"}


def test_what_a_failed_change_was_to_replace_keeps_its_version(asked: Asked) -> None:
    """It went on serving, and the file that it was started from was applied again: it was replaced all the same, as
    what had failed, and once more the next time."""
    assert asked[10]["Worker-a"]["version"] == asked[2]["Worker-a"]["version"]
    assert asked[10]["Worker-b"]["version"] == asked[2]["Worker-b"]["version"]


def test_variables_are_lent_to_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "before")
    monkeypatch.delenv("NEW", raising=False)
    with _environment({"THERE": "ours", "NEW": "ours"}):
        assert (os.environ["THERE"], os.environ["NEW"]) == ("before", "ours")
    assert os.environ["THERE"] == "before"
    assert "NEW" not in os.environ


def test_routers_are_told_what_to_keep_and_to_log(asked: Asked) -> None:
    told = {"max_kept_requests": 9, "max_tenants": 7, "logs_requests": True, "logs_prompts": False}
    assert asked[-1]["Router"]["observer"] == told
