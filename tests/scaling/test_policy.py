"""The policy in Serve's controller: asks beside the loop, holds what there is while nobody answers, never raises."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import policy
from cluster.policy import SignalPolicy


class Method:
    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    async def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Signal:
    """Stands in for the actor, and for Ray, which finds it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.desired = Method(3)
        self.num_nodes = Method(2)
        self.is_there = True
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_actor=self._find))
        monkeypatch.setattr(policy, "POLL_S", 0.0)
        monkeypatch.setattr(policy, "NODES_POLL_S", 0.0)

    def _find(self, name: str, *, namespace: str) -> Signal:
        if not self.is_there:
            raise ValueError(f"there is no {name} in {namespace}")
        return self


@pytest.fixture
def signal(monkeypatch: pytest.MonkeyPatch) -> Signal:
    return Signal(monkeypatch)


CONTEXT: Any = SimpleNamespace(current_num_replicas=1, target_num_replicas=2)
SCALING: dict[str, Any] = {"max_replicas": 5}


async def ask(asked: Any) -> int:
    """Let the controller turn a few times, and whoever is asked meanwhile have many turns; return the last answer."""
    number = 0
    for _ in range(5):
        number, state = asked(CONTEXT)
        assert state == {}
        for _ in range(20):
            await asyncio.sleep(0)
        await asyncio.sleep(0.005)
    return number


async def test_it_says_what_the_actor_says(signal: Signal) -> None:
    asked = SignalPolicy(model="toy", scaling=SCALING)
    assert asked(CONTEXT) == (2, {})  # before anybody has answered
    assert await ask(asked) == 3
    assert signal.desired.calls[0] == ("toy", SCALING, 1, 2)
    signal.desired.answer = 0
    assert await ask(asked) == 0


async def test_routers_are_as_many_as_nodes(signal: Signal) -> None:
    asked = policy.NodesPolicy()
    assert await ask(asked) == 2
    signal.num_nodes.answer = None  # it does not know
    assert await ask(asked) == 2


@pytest.mark.parametrize("way", ["gone", "fails", "silent"])
async def test_it_holds_what_there_is(way: str, signal: Signal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "ANSWER_S", 0.01)
    asked = SignalPolicy(model="toy", scaling=SCALING)
    if way == "gone":
        signal.is_there = False
    elif way == "fails":
        signal.desired.answer = RuntimeError("the actor has died")
    else:
        monkeypatch.setattr(signal.desired, "remote", lambda *_: asyncio.sleep(10))
    assert await ask(asked) == 2
    signal.is_there, signal.desired.answer = True, 4
    monkeypatch.setattr(signal, "desired", Method(4))
    monkeypatch.setattr(policy, "ANSWER_S", 60.0)
    await asyncio.sleep(0.02)
    assert await ask(asked) == 4


def test_it_never_raises(signal: Signal) -> None:
    """Not even where there is no loop."""
    assert SignalPolicy(model="toy", scaling=SCALING)(CONTEXT) == (2, {})


PROGRAM = """
import json
from cluster.autoscaling import ScalingConfig
from cluster.policy import model_scaling, router_scaling

fixed = model_scaling("toy", ScalingConfig(), num_replicas=2, max_num_sequences=8)
elastic = model_scaling("toy", ScalingConfig(max_replicas=9), num_replicas=2, max_num_sequences=8)
for made in (fixed, elastic, router_scaling()):
    policy = made.policy.get_policy()(**made.policy.policy_kwargs)  # as the controller does
    scaling = getattr(policy, "_scaling", {})
    print(json.dumps([type(policy).__name__, scaling, made.model_dump(mode="json", exclude={"policy"})]))
"""
"""In a process of its own: Serve warns while it is imported."""


def test_serve_gets_a_policy_that_decides_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    fixed, elastic, routers = (json.loads(line) for line in done.stdout.splitlines())
    for _, _, serve in (fixed, elastic, routers):
        assert (serve["min_replicas"], serve["max_replicas"]) == (0, 1024)
        assert [serve[key] for key in serve if key.endswith("delay_s")] == [0, 0, 0]
    name, scaling, serve = fixed
    assert (name, scaling["min_replicas"], scaling["max_replicas"]) == ("SignalPolicy", 2, 2)
    assert (scaling["target_sequences"], serve["initial_replicas"]) == (8.0, 2)
    assert (elastic[1]["min_replicas"], elastic[1]["max_replicas"]) == (1, 9)
    assert routers[0] == "NodesPolicy"
