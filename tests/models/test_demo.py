"""`octavo demo`, first act: what it shows. A whole run is in tests/integration/test_demo_run.py."""

from __future__ import annotations

import io
import json

import pytest
from octavo.v1 import status_service_pb2 as pb
from rich.console import Console

from cluster.demo import Answer, Question
from cluster.demo_view import JsonView, LinesView, TerminalView
from cluster.served import ServeFailedError, served

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
    view.all_answered(ANSWERS)
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
    assert "All of it took 9 s" in text
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
        served(["--model", "no-such-model", "--port", "0"], timeout_s=150, note=lambda text: None),
    ):
        raise AssertionError("it must not get ready")
    assert caught.value.child_exit_code == 3
