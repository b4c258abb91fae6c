"""Which clusters chaos strikes: three replicas of the fake engine and two replicas of the real model, two routers each.

The fake engine's answers are a function of their prompts. Those of the real model, in fp32, are what the same requests
got undisturbed; requests whose answers rounding could change are not asked (`resume_margin.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from load_tests.chaos.strikes import NODE_LOST, STRIKES
from load_tests.rigs.resume_asks import Ask, fake_asks, oracle_asks
from load_tests.rigs.router_rig import ROOT

ORACLE = ROOT / "tests" / "oracle" / "answers.json"
COMMON = {
    "RAY_AUTH_MODE": "disabled",
    "OCTAVO_SERVE__NUM_ROUTERS": "2",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",
    "OTEL_METRICS_EXPORTER": "none",
}
STEP_S, FAKE_LENGTHS = 0.02, (10, 150)
FILLERS, FILLER_PROMPT, FILLER_TOKENS = 24, 800, 300
MODEL_LENGTHS, LONG_PROMPT = (24, 48), 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`clients` have `streams` answers open each. `make_asks` gets how many; `make_fillers` makes what fills memory."""

    options: tuple[str, ...]
    variables: Mapping[str, str]
    replicas: int
    clients: int
    streams: int
    asks: int
    quick_asks: int
    make_asks: Callable[[int, random.Random], list[Ask]]
    make_fillers: Callable[[random.Random], list[Ask]]
    fillers_at_once: int
    """While their answers are learnt: no more than memory holds."""
    routers: int = 2
    nodes: int = 0
    """0: a Ray of its own, with one. The replicas fit as many, one on each."""
    kinds: Sequence[str] = tuple(kind for kind in STRIKES if kind != NODE_LOST)


def _fake_asks(number: int, rng: random.Random) -> list[Ask]:
    return [ask for _ in range(number) for ask in fake_asks(1, rng.randint(*FAKE_LENGTHS), rng)]


def _fake_fillers(rng: random.Random) -> list[Ask]:
    """1,200 blocks to begin with and 1,650 in the end, where three replicas have 1,536: some must give way."""
    return fake_asks(FILLERS, FILLER_TOKENS, rng, prompt_tokens=FILLER_PROMPT)


def _model_asks(number: int, _: random.Random) -> list[Ask]:
    return [ask for ask in _oracle_asks() if len(ask.prompt) <= LONG_PROMPT][:number]


def _model_fillers(_: random.Random) -> list[Ask]:
    """Each takes most of the blocks of a replica."""
    return [ask for ask in _oracle_asks() if len(ask.prompt) > LONG_PROMPT][:3]


def _oracle_asks() -> list[Ask]:
    return oracle_asks(json.loads(ORACLE.read_text()), 80, MODEL_LENGTHS)


FAMILIES: Mapping[str, Family] = {
    "fake": Family(
        options=("--model", "fake", "--engine", "fake", "--replicas", "3"),
        variables=COMMON
        | {
            "OCTAVO_ENGINE__FAKE_STEP_S": str(STEP_S),
            "OCTAVO_ENGINE__MAX_NUM_SEQUENCES": "32",
            "OCTAVO_ENGINE__MAX_MODEL_LEN": "4096",
            "OCTAVO_ENGINE__NUM_BLOCKS": "512",
        },
        replicas=3,
        nodes=3,
        kinds=tuple(STRIKES),
        clients=8,
        streams=4,
        asks=160,
        quick_asks=32,
        make_asks=_fake_asks,
        make_fillers=_fake_fillers,
        fillers_at_once=8,
    ),
    "model": Family(
        options=("--replicas", "2"),
        variables=COMMON
        | {
            "OCTAVO_ENGINE__DTYPE": "fp32",
            "OCTAVO_ENGINE__THREADS": "1",
            "OCTAVO_ENGINE__MAX_MODEL_LEN": "2048",
            "OCTAVO_ENGINE__NUM_BLOCKS": "128",
        },
        replicas=2,
        clients=4,
        streams=2,
        asks=64,
        quick_asks=16,
        make_asks=_model_asks,
        make_fillers=_model_fillers,
        fillers_at_once=1,
    ),
}
