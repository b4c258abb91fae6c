"""A step that is held up, on purpose."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.workers.toy_engine import ToyEngine, toy_answer, work
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.types import WorkId


def test_one_step_of_one_replica_takes_as_much_longer_as_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, slept = tmp_path / "stall", list[float]()

    def sleep_noted(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr("workers.stall.time", SimpleNamespace(sleep=sleep_noted))
    engines = [FakeEngine(EngineConfig(engine="fake", stall_file=str(file))) for _ in range(2)]
    watches = [engine.watch() for engine in engines]
    for engine in engines:
        engine.submit(work(1, [1, 2], 6))
    held_up = []
    for number in range(6):
        if number == 3:
            file.write_text("0.1")
        for i, (engine, watch) in enumerate(zip(engines, watches, strict=True)):
            engine.step()
            watch.ended()
            (record,) = watch.drain()
            if slept:
                held_up.append((i, record.plan.number, slept.pop(), record.run_s >= 0.1))
    assert held_up == [(0, 4, 0.1, True)]
    assert not file.exists()


def test_what_is_no_number_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "stall"
    file.write_text("")
    engine = FakeEngine(EngineConfig(engine="fake", stall_file=str(file)))
    engine.submit(work(1, [1, 2], 2))
    while engine.step():
        pass
    assert file.exists()


def test_tokens_and_drafts_are_those_of_the_runner(tmp_path: Path) -> None:
    engine = ToyEngine(lookup_tokens=2)
    assert type(engine._runner).__name__ == "ToyRunner", "without a file there is nothing in between"
    config = EngineConfig(engine="fake", lookup_tokens=2, stall_file=str(tmp_path / "stall"))
    assert FakeEngine(config).info.engine == "fake"
    task = work(1, [1, 2, 1, 2], 9)
    engine.submit(task)
    assert engine.run()[WorkId("r", 1)].tokens == toy_answer(task)
