"""A whole run of the demo, both acts, on the engine `fake`: the answers make no sense, all else is as with a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from octavo.names import Attribute
from octavo.names import Span as SpanName

from cluster.demo import WAVES
from cluster.demo_crash import DUE_SHARE, SUBJECTS
from tests.cluster import MARK, marked

pytestmark = pytest.mark.cluster

TOKENS, STREAM_TOKENS = 8, 128


def test_a_whole_run_loses_a_replica_and_no_token_and_leaves_nothing(tmp_path: Path):
    mark = uuid.uuid4().hex
    command = ["-m", "cluster.cli", "demo", "--model", "fake", "--engine", "fake", "--json"]
    lengths = ["--max-tokens", str(TOKENS), "--stream-tokens", str(STREAM_TOKENS)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, *command, *lengths],
        env={**inherited, "RAY_AUTH_MODE": "disabled", "OCTAVO_ENGINE__FAKE_STEP_S": "0.012", MARK: mark},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    replicas = [replica["id"] for replica in events[0]["replicas"]]
    assert len(replicas) == 2
    assert_first_act(of(events, "answer"), replicas)
    assert_second_act(events, replicas)
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("ready", "done")
    assert kinds.index("killed") > kinds.index("answer")
    end = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == {}


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def assert_first_act(answers: list[dict[str, Any]], replicas: list[str]) -> None:
    assert sorted(each["question"] for each in answers) == sorted(text for wave in WAVES for text in wave)
    assert len({each["trace_id"] for each in answers}) == len(answers)
    assert {each["replica"] for each in answers} == set(replicas)
    for each in answers:
        assert each["generated_tokens"] == TOKENS
        assert (each["cached_tokens"] > 0) == (each["wave"] > 1), "the second wave shares the first one's blocks"


def assert_second_act(events: list[dict[str, Any]], replicas: list[str]) -> None:
    (killed,), streams, (figures,) = of(events, "killed"), of(events, "stream"), of(events, "second_act")
    assert [stream["subject"] for stream in streams] == list(SUBJECTS)
    first = Counter(stream["replicas"][0] for stream in streams)
    assert killed["replica"] in replicas
    assert killed["num_streams"] == first[killed["replica"]] == max(first.values())
    moved = [stream for stream in streams if len(stream["replicas"]) > 1]
    assert len(moved) == killed["num_streams"]
    assert {event["number"] for event in of(events, "went_on")} == {stream["number"] for stream in moved}
    for stream in moved:
        assert stream["replicas"][0] == killed["replica"]
        assert stream["replica"] != killed["replica"]
        assert STREAM_TOKENS // DUE_SHARE <= stream["tokens_at_loss"] < STREAM_TOKENS, "in its middle"
        assert 0 < stream["went_on_after_s"] <= stream["longest_pause_s"] <= figures["longest_pause_s"]
    for stream in streams:
        assert STREAM_TOKENS // DUE_SHARE < stream["generated_tokens"] <= STREAM_TOKENS, "some draw an end of sequence"
        assert stream["first_difference"] is None
    assert figures["num_identical"] == len(streams)
    assert figures["cached_tokens"] == sum(stream["cached_tokens"] for stream in streams)
    assert 0 < figures["cached_tokens"] < figures["prompt_tokens"], "somebody computed the shared prompt"
    assert_trace(of(events, "trace")[0], {stream["trace_id"]: stream for stream in moved})


def assert_trace(trace: dict[str, Any], moved: dict[str, dict[str, Any]]) -> None:
    """The request's span has both dispatches, of which the lost replica could say nothing and the other one all."""
    stream, spans = moved[trace["trace_id"]], trace["spans"]
    (request,) = [span for span in spans if span["name"] == SpanName.SESSION_REQUEST]
    dispatches = [span for span in spans if span["name"] == SpanName.DISPATCH]
    assert [span["attributes"][Attribute.REPLICA] for span in dispatches] == stream["replicas"]
    assert [span["attributes"][Attribute.ATTEMPT] for span in dispatches] == [1, 2]
    assert dispatches[0]["attributes"][Attribute.ERROR_TYPE] == "REPLICA_LOST"
    assert {span["parent_id"] for span in dispatches} == {request["span_id"]}
    phases = [span for span in spans if span["name"] in {SpanName.PREFILL, SpanName.DECODE}]
    assert {span["parent_id"] for span in phases} == {dispatches[1]["span_id"]}
    assert {span["service"] for span in phases} == {"octavo-worker"}
    told = {span["name"]: span["attributes"] for span in phases}
    left = stream["generated_tokens"] - stream["tokens_at_loss"]
    assert 0 < told[SpanName.DECODE][Attribute.OUTPUT_TOKENS] <= left
