"""Python examples, against a real router's front; `python_client.py` runs in `test_client_wheel.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.router.rig import answering, running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = "Octets."


async def run(example: str, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / example),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def test_reflection_lists_services_and_their_methods() -> None:
    async with running() as rig:
        code, stdout, stderr = await run("reflection.py", rig.address)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    services = [line for line in lines if not line.startswith(" ")]
    assert services == sorted(services)
    assert {"grpc.health.v1.Health", "octavo.v1.InferenceService", "octavo.v1.StatusService"} <= set(services)
    assert "    Generate(GenerateRequest) returns (stream GenerateResponse)" in lines
    assert "    Session(stream SessionRequest) returns (stream SessionResponse)" in lines


async def test_reflection_calls_generate() -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        request = json.dumps({"prompt": {"text": "Hi"}, "max_tokens": 16, "sampling": {"temperature": 0}})
        code, stdout, stderr = await run("reflection.py", rig.address, "octavo.v1.InferenceService/Generate", request)
    assert (code, stderr) == (0, "")
    answers = [json.loads(line) for line in stdout.splitlines()]
    assert "".join(delta["text"] for each in answers for delta in each.get("deltas", ())) == TEXT
    assert answers[-1]["usage"]["promptTokens"] == 2


async def test_reflection_calls_with_a_stream_of_requests() -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        start = {"request_id": "one", "request": {"prompt": {"text": "Hi"}, "max_tokens": 16}}
        code, stdout, stderr = await run(
            "reflection.py", rig.address, "octavo.v1.InferenceService/Session", json.dumps({"starts": [start]})
        )
    assert (code, stderr) == (0, "")
    events = [event for line in stdout.splitlines() for event in json.loads(line).get("events", ())]
    assert "".join(event["delta"]["text"] for event in events if "delta" in event) == TEXT
    assert "terminal" in events[-1]


async def test_reflection_calls_without_a_stream_and_tells_errors() -> None:
    async with running() as rig:
        code, stdout, _ = await run("reflection.py", rig.address, "octavo.v1.ModelService/ListModels")
        assert code == 0
        assert [model["name"] for model in json.loads(stdout)["models"]] == ["toy"]
        request = json.dumps({"model": "nobody", "prompt": {"text": "Hi"}})
        code, _, stderr = await run("reflection.py", rig.address, "octavo.v1.InferenceService/Generate", request)
    assert code == 1
    assert stderr.startswith("NOT_FOUND: ")


async def test_a_trace_is_followed_and_an_error_told() -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        code, stdout, stderr = await run("errors_and_traces.py", rig.address)
    assert (code, stderr) == (0, "")
    text, trace, error, violation = stdout.splitlines()
    assert text == TEXT
    assert trace.removeprefix("trace ") in rig.backend.works[0].request.traceparent
    assert error == "INVALID_ARGUMENT INVALID_FIELD, try again: no"
    assert violation.startswith("  sampling.temperature: must ")
