"""`octavo demo`: what it shows, and that a whole run ends well and leaves no process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from octavo.v1 import status_service_pb2 as pb
from rich.console import Console

from cluster.demo import WAVES, Answer, Question
from cluster.demo_view import JsonView, LinesView, TerminalView
from cluster.served import ServeFailedError, served
from tests.cluster import MARK, marked

QUESTIONS = [Question(1, "What is 1 + 1?"), Question(2, "And [bold]this[/]?")]


def answer(number: int, text: str, **changes) -> Answer:
    fields = {
        "number": number,
        "wave": 1,
        "question": QUESTIONS[number - 1].text,
        "text": text,
        "first_token_s": 0.0625,
        "tokens_per_s": 12.34,
        "prompt_tokens": 100,
        "cached_tokens": 96,
        "generated_tokens": 5,
        "replica": "Worker-abcd1234",
        "trace_id": "0" * 31 + str(number),
    }
    return Answer(**{**fields, **changes})


ANSWERS = [answer(1, "2, or \x1b[31m10\nin binary"), answer(2, "Yes.", tokens_per_s=None, cached_tokens=0)]


def show(kind, *, width: int = 100, is_terminal: bool = False) -> str:
    """What a view prints of a run with two answers."""
    file = io.StringIO()
    out = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    view = kind(out, Console(file=io.StringIO()))
    replica = pb.ReplicaStatus(id="Worker-abcd1234", model="m", engine="paged", kernels="onednn", dtype="bf16")
    view.cluster_ready(pb.GetStatusResponse(version="1.2.3", replicas=[replica]), "127.0.0.1:1", 3.21)
    view.wave_begun(1, QUESTIONS)
    for question, each in zip(QUESTIONS, ANSWERS, strict=True):
        view.said(question, each.text[:2])
        view.said(question, each.text[2:])
        view.answered(each)
    view.wave_ended()
    view.done(ANSWERS, 9.0)
    return file.getvalue()


def test_lines_have_every_answer_and_its_accounts():
    text = show(LinesView)
    assert "Octavo 1.2.3 at 127.0.0.1:1, ready after 3.2 s" in text
    assert "replica abcd1234: m, engine paged, kernels onednn, bf16" in text
    assert "[1] What is 1 + 1?\n    2, or  [31m10 in binary\n" in text
    assert "\x1b" not in text, "an answer must not steer the terminal"
    row = next(line for line in text.splitlines() if line.startswith("1 "))
    assert " ".join(row.split()) == f"1 What is 1 + 1? 62 ms 12.3 100 96 abcd1234 {'0' * 31}1"
    assert "2 answers in 9 s" in text
    assert "96 of 200 prompt tokens came out of the caches" in text


def test_a_terminal_shows_the_answers_side_by_side():
    text = show(TerminalView, width=100, is_terminal=True)
    line = next(line for line in text.splitlines() if "1. What is 1 + 1?" in line)
    assert "2. And [bold]this[/]?" in line
    assert "0" * 31 + "2" in text
    narrow = show(TerminalView, width=80, is_terminal=True)
    assert "0" * 31 + "2" in narrow, "the trace id is whole in 80 columns too"


def test_json_is_one_object_a_line():
    events = [json.loads(line) for line in show(JsonView).splitlines()]
    assert [event["event"] for event in events] == ["ready", "answer", "answer", "done"]
    assert events[0]["replicas"][0]["kernels"] == "onednn"
    assert events[1]["text"] == ANSWERS[0].text
    assert events[2]["tokens_per_s"] is None


def test_a_cluster_that_does_not_start_passes_its_reason_and_exit_code_on():
    with (
        pytest.raises(ServeFailedError, match="'no-such-model' is none of these") as caught,
        served(["--model", "no-such-model", "--port", "0"], timeout_s=60, note=lambda text: None),
    ):
        raise AssertionError("it must not get ready")
    assert caught.value.child_exit_code == 3


def test_a_whole_run_answers_everything_and_leaves_nothing(tmp_path: Path):
    """On the engine `fake`: the answers make no sense, everything else is what `make demo` does."""
    mark = uuid.uuid4().hex
    command = ["-m", "cluster.cli", "demo", "--model", "fake", "--engine", "fake", "--max-tokens", "8", "--json"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "OCTAVO_ENGINE__FAKE_STEP_S": "0.005", MARK: mark},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    answers = [event for event in events if event["event"] == "answer"]
    assert [event["event"] for event in events] == ["ready", *["answer"] * len(answers), "done"]
    assert len(events[0]["replicas"]) == 2
    assert sorted(each["question"] for each in answers) == sorted(text for wave in WAVES for text in wave)
    assert len({each["trace_id"] for each in answers}) == len(answers)
    assert {each["replica"] for each in answers} == {replica["id"] for replica in events[0]["replicas"]}
    for each in answers:
        assert each["generated_tokens"] == 8
        assert (each["cached_tokens"] > 0) == (each["wave"] > 1), "the second wave shares the first one's blocks"
    end = time.monotonic() + 5
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == {}
