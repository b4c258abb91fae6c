"""`octavo trace` on a running cluster: it explains what real requests went through."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal

import pytest
from octavo.client import Client

from tests.cluster import ClusterProcess
from tests.integration.calls import await_status, connected, has_ready, is_idle, octavo_trace

PARENT = "00-5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e-00f067aa0ba902b7-01"

pytestmark = pytest.mark.cluster


async def test_a_request_that_a_killed_replica_had_begun_is_explained(fake_cluster: ClusterProcess) -> None:
    """Two attempts: what the first one did, why it was lost, where the rest went, and a sum that adds up."""
    async with connected(fake_cluster.address) as channel, Client(fake_cluster.address) as client:
        status = await await_status(channel, has_ready(2))
        generation = client.generate(
            list(range(3, 63)), max_tokens=300, timeout=60, request_id="resumed", traceparent=PARENT
        )
        num_tokens = 0
        async for delta in generation:
            if not num_tokens:
                (running,) = await client.find_requests("resumed")
                assert running.is_running
                replica = running.attempts[-1].decision.replica
                (pid,) = (each.pid for each in status.replicas if each.id == replica)
            before, num_tokens = num_tokens, num_tokens + len(delta.token_ids)
            if before < 30 <= num_tokens:
                os.kill(pid, signal.SIGKILL)
        assert num_tokens == 300
        code, out, err = await octavo_trace(fake_cluster.address, "resumed")
        assert (code, err) == (0, "")
        by_trace = await octavo_trace(fake_cluster.address, PARENT[3:35], "--json")
        await await_status(channel, lambda found: has_ready(2)(found) and is_idle(found))

    (record,) = map(json.loads, by_trace[1].splitlines())
    assert record["request_id"] == "resumed"
    first, second = record["attempts"]
    assert first["decision"]["replica"] == replica != second["decision"]["replica"]
    assert first["num_tokens"] + second["num_tokens"] == 300
    assert first["num_tokens"] >= 30
    assert "engine" not in first
    assert second["engine"]["num_steps"] >= second["num_tokens"]

    assert "request resumed: model fake, over Session" in out
    assert re.search(r"OK after [\d.]+ s, with the first token after [\d.]+ m?s: 300 tokens, length", out)
    assert f"placed on {replica}, " in out
    assert len(re.findall(r"-> \S+ +cost \d+ = \d+ of this prompt to compute", out)) == 2
    assert f"decoded: {first['num_tokens']} tokens came before it was lost" in out
    assert f"lost (REPLICA_LOST): replica {replica} was lost" in out
    assert f"decoded: {second['num_tokens']} tokens in {second['engine']['num_steps']} steps" in out
    assert re.search(r"sent: 300 tokens coalesced in \d+ messages", out)
    assert "preempted 0 times" in out
    assert_adds_up(out)


def assert_adds_up(text: str) -> None:
    """The last line is a sum, and it is right."""
    terms, _, total = text.rstrip().splitlines()[-1].rpartition(" = ")
    found = re.findall(r"([\d.]+) (ms|s)\b", terms)
    assert len(found) >= 4
    sum_s = sum(float(number) / (1000 if unit == "ms" else 1) for number, unit in found)
    number, unit = total.split()
    assert sum_s == pytest.approx(float(number) / (1000 if unit == "ms" else 1), abs=0.001 * len(found))


async def test_the_slowest_are_listed_and_what_is_unknown_is_said(fake_cluster: ClusterProcess) -> None:
    async with connected(fake_cluster.address) as channel, Client(fake_cluster.address) as client:
        await await_status(channel, has_ready(2))
        await asyncio.gather(
            client.complete([5] * 20, max_tokens=800, request_id="slow-one"),
            client.complete([6] * 20, max_tokens=5, request_id="quick-one"),
        )
    code, out, err = await octavo_trace(fake_cluster.address, "--slowest", "3")
    assert (code, err) == (0, "")
    heading, *rows, _, last = out.splitlines()
    assert heading.split()[:2] == ["took", "queued"]
    assert len(rows) == 3
    code, out, err = await octavo_trace(fake_cluster.address, "--slowest", "100")  # other tests have asked it as well
    assert (code, err) == (0, "")
    heading, *rows, _, last = out.splitlines()
    took = [float(number) * (1 if unit == "s" else 0.001) for number, unit in (row.split()[:2] for row in rows)]
    assert took == sorted(took, reverse=True)
    names = [row.split()[-1] for row in rows]
    code, told, err = await octavo_trace(fake_cluster.address, "slow-one", "--json")
    slow_s = json.loads(told)["duration_s"]
    if "slow-one" in names:
        assert "quick-one" not in names[: names.index("slow-one")]
    else:
        assert len(rows) == 100
        assert took[-1] >= slow_s * 0.99  # rows are rounded
    assert re.fullmatch(r"of \d+ requests that 1 router remembers; `octavo trace REQUEST` explains one", last)

    code, out, err = await octavo_trace(fake_cluster.address, "nobody knows this")
    assert (code, out) == (1, "")
    assert "none of the 1 routers that answered remembers a request or a trace 'nobody knows this'" in err
    assert "telemetry.max_kept_requests" in err
    code, _, err = await octavo_trace(fake_cluster.address)
    assert code == 2
    assert "give the id of a request or a trace, or --slowest" in re.sub(r"[\s│]+", " ", err)


async def test_a_real_models_prefill_and_decode_are_explained(model_cluster: ClusterProcess) -> None:
    text = "Once upon a time there was a small dog who lived in a big house near the sea. " * 3
    async with Client(model_cluster.address) as client:
        for name in ("told-first", "told-again"):
            answer = await client.complete(text, max_tokens=12, temperature=0, ignore_eos=True, request_id=name)
    assert answer.usage is not None
    records = []
    for name in ("told-first", "told-again"):
        code, out, err = await octavo_trace(model_cluster.address, name, "--json")
        assert (code, err) == (0, "")
        records.append(json.loads(out))
    (first,), (again,) = (record["attempts"] for record in records)
    num_prompt = answer.usage.prompt_tokens
    assert records[0]["prompt_tokens"] == num_prompt
    assert first["cached_tokens"] < again["cached_tokens"] == answer.usage.cached_tokens < num_prompt
    assert again["decision"]["matched_tokens"] > 0
    for attempt in (first, again):
        assert attempt["engine"]["num_steps"] >= attempt["num_tokens"] == 12
        assert attempt["engine"]["prefill_s"] > 0
    assert again["engine"]["prefill_s"] < first["engine"]["prefill_s"]
    code, out, err = await octavo_trace(model_cluster.address, "told-again")
    cached = again["cached_tokens"]
    assert f"prefilled: {cached} of {num_prompt} prompt tokens were cached, {num_prompt - cached} computed" in out
    assert f"decoded: 12 tokens in {again['engine']['num_steps']} steps of the engine" in out
    assert_adds_up(out)
