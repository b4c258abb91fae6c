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
import json, sys
from cluster import app
from cluster.config import from_tree

def asked(environ):
    router = app.build(from_tree({}), cores=2, secret=bytes, environ=environ)._bound_deployment
    return [each.ray_actor_options for each in (router, router.init_kwargs["workers"]._bound_deployment)]

print(json.dumps([asked({"OCTAVO_CACHE_DIR": "there", "HOME": "here"}), asked(None)]))
"""
"""In a process of its own: Serve warns while it is imported."""


@pytest.fixture(scope="module")
def asked() -> list[list[dict[str, Any]]]:
    """Of a Ray of others and of one of our own: the options of the router's actor and of a replica's."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=50, stdout=subprocess.PIPE, text=True)
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def test_a_ray_of_others_is_told_the_variables(asked: list[list[dict[str, Any]]]) -> None:
    for options in asked[0]:
        variables = options["runtime_env"]["env_vars"]
        assert variables["OCTAVO_CACHE_DIR"] == "there"
        assert "HOME" not in variables
        assert ONE_LOOP.items() <= variables.items()


def test_a_ray_of_our_own_starts_no_process_twice(asked: list[list[dict[str, Any]]]) -> None:
    """Ray starts a process that is to have variables of its own, or anything else of a runtime environment, from one
    that sets them up first and imports Ray for that: most of a second of a replica's start."""
    assert not any(options.get("runtime_env") for options in asked[1])


def test_variables_are_lent_to_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "before")
    monkeypatch.delenv("NEW", raising=False)
    with _environment({"THERE": "ours", "NEW": "ours"}):
        assert (os.environ["THERE"], os.environ["NEW"]) == ("before", "ours")
    assert os.environ["THERE"] == "before"
    assert "NEW" not in os.environ
