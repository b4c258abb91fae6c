"""`octavo embed` as a process, against a router whose back answers by script."""

from __future__ import annotations

import json

import pytest

from router.types import PoolTask
from tests.client.test_cli_client import NOBODY, octavo
from tests.router.rig import Work, running


def count_tokens(work: Work) -> None:
    work.dispatch()
    work.sink.pooled(0, [float(len(work.request.prompt)), 0.5])
    work.finish()


async def test_vectors_come_in_order_a_line_each() -> None:
    async with running() as rig:
        rig.backend.script = count_tokens
        outcome = await octavo(rig.address, "embed", "one", "-", "three", "--pooling", "cls", "--normalize", stdin="fo")
        assert (outcome.code, outcome.stderr) == (0, "")
        lines = [json.loads(line) for line in outcome.stdout.splitlines()]
        assert lines == [
            {"index": 0, "embedding": [3.0, 0.5]},
            {"index": 1, "embedding": [2.0, 0.5]},
            {"index": 2, "embedding": [5.0, 0.5]},
        ]
        assert {work.request.pool for work in rig.backend.works} == {PoolTask("cls", True)}


async def test_by_default_the_model_says_how() -> None:
    async with running() as rig:
        rig.backend.script = count_tokens
        assert (await octavo(rig.address, "embed", "a")).code == 0
        assert rig.backend.works[0].request.pool == PoolTask("model", None)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embed"], 2, "Missing argument"),
        (["embed", "a", "--pooling", "median"], 2, "--pooling"),
        (["embed", "a", "--address", "nonsense"], 2, "must be HOST:PORT"),
        (["embed", "a", "--address", NOBODY], 4, "is a cluster running there?"),
    ],
)
async def test_what_is_wrong_is_said(arguments: list[str], code: int, message: str) -> None:
    outcome = await octavo(NOBODY, *arguments)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert message in outcome.stderr


async def test_a_refusal_is_an_error() -> None:
    async with running() as rig:
        outcome = await octavo(rig.address, "embed", "")
        assert (outcome.code, outcome.stdout) == (1, "")
        assert "inputs[0]" in outcome.stderr
