"""`octavo status` and its `--watch`: what the tables say, what rates are, and that a router may be away for a while."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sys

import pytest
from octavo.client import CallError, ConnectionFailedError
from octavo.v1 import status_service_pb2 as pb
from rich.console import Console, RenderableType

from cluster.cli_status import Rates, status_record, status_view
from cluster.cli_watch import Watch, watch
from tests.client.scripted_router import ScriptedRouter


def text_of(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=220, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line_of(text: str, beginning: str) -> list[str]:
    """Return the cells of the one line that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(beginning))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def make_status(*, ended: int = 10, hits: int = 50, queries: int = 100, epoch: int = 1) -> pb.GetStatusResponse:
    router = pb.RouterStatus(id="R1", state="serving", uptime_s=75, num_queued_requests=3, num_ended_total=ended)
    other = pb.RouterStatus(id="R2", state="draining", own_address="10.0.0.2:7", num_ended_total=5)
    replica = pb.ReplicaStatus(
        id="a1",
        model="m",
        state="ready",
        engine="paged",
        kernels="native-avx2",
        dtype="int8",
        num_running=4,
        num_waiting=2,
        num_blocks=100,
        num_free_blocks=25,
        tokens_per_s=123.4,
        prefix_cache_hits=hits,
        prefix_cache_queries=queries,
        epoch=epoch,
    )
    starting = pb.ReplicaStatus(id="b2", model="m", state="starting", detail="packing", starting_s=3.2)
    model = pb.ModelStatus(
        name="m",
        num_ready=1,
        has_outlook=True,
        target=2,
        min_replicas=1,
        max_replicas=4,
        reason="9 sequences for 8 places",
        decided_at=1_000.0,
        ready_in_s=2.0,
        num_queued=7,
        oldest_wait_s=0.25,
        num_running=6,
    )
    return pb.GetStatusResponse(
        version="1.2", router=router, routers=[router, other], replicas=[replica, starting], models=[model]
    )


def test_the_view_has_models_with_their_decisions_all_routers_and_replicas_that_start() -> None:
    text = text_of(status_view(make_status(), now=1_012.0))
    assert line_of(text, "m ") == [
        *("m", "1 of 2, next in 2 s", "1 to 4", "7", "6", "0.2 s", "2 since 12 s: 9 sequences for 8 places"),
    ]
    assert line_of(text, "R1")[:2] == ["R1", "serving for 1 min 15 s"]
    assert line_of(text, "R2")[1] == "draining for 0 s"
    assert line_of(text, "R2")[-1] == "10.0.0.2:7"
    replica = ["a1", "m", "ready", "paged native-avx2 int8", "4+2", "75/100 ██████░░", "50 %", "123", "0"]
    assert line_of(text, "a1") == replica
    assert line_of(text, "b2")[2] == "starting (packing for 3 s)"


def test_the_view_says_what_is_wrong_and_who_decided() -> None:
    status = make_status()
    status.models[0].override = 2
    assert "(an operator asks for 2)" in text_of(status_view(status, now=1_000.0))
    status.models[0].failure = "the file is truncated"
    assert line_of(text_of(status_view(status)), "m ")[-1] == "the file is truncated"
    silent = pb.GetStatusResponse(router=status.router, models=[pb.ModelStatus(name="m", num_ready=2)])
    text = text_of(status_view(silent))
    assert line_of(text, "m ")[-1] == "octavo-signal is silent"
    assert "no replica" in text
    assert line_of(text, "R1")


def test_rates_are_what_counters_gained_and_none_after_a_new_start() -> None:
    rates = Rates.between(make_status(), make_status(ended=25, hits=60, queries=200), 2.0)
    assert rates == Rates(ended={"R1": 7.5, "R2": 0.0}, cached={"a1": 0.1})
    text = text_of(status_view(make_status(), rates))
    assert "7.5" in line_of(text, "R1")
    assert "10 %" in line_of(text, "a1")
    assert not Rates.between(make_status(), make_status(hits=1, queries=200, epoch=2), 2.0).cached
    assert not Rates.between(make_status(), make_status(), 2.0).cached


def test_the_record_has_every_field_and_null_for_what_is_absent() -> None:
    record = json.loads(json.dumps(status_record(make_status())))
    (model,) = record["models"]
    assert (model["target"], model["override"], model["ready_in_s"], model["start_s"]) == (2, None, 2.0, None)
    assert [router["id"] for router in record["routers"]] == ["R1", "R2"]


def test_what_was_seen_stays_while_nobody_answers() -> None:
    seen = Watch()
    seen.take(make_status(), 100.0)
    seen.fail(ConnectionFailedError("cannot reach there"))
    text = text_of(seen.view(103.0))
    assert "no answer for 3 s: cannot reach there" in text
    assert line_of(text, "a1")
    seen.take(make_status(ended=20), 105.0)
    text = text_of(seen.view(105.0))
    assert "no answer" not in text
    assert "2.0" in line_of(text, "R1")


@pytest.mark.parametrize("as_json", [True, False])
async def test_watching_goes_on_when_a_router_is_away_but_not_without_a_first_answer(as_json: bool) -> None:
    answers: list[pb.GetStatusResponse | CallError] = [make_status(), ConnectionFailedError("away"), make_status()]
    is_over = asyncio.Event()

    async def ask() -> pb.GetStatusResponse:
        if not answers:
            is_over.set()
            await asyncio.sleep(60)
        answer = answers.pop(0)
        if isinstance(answer, CallError):
            raise answer
        return answer

    console = Console(file=io.StringIO(), width=220, force_terminal=True)
    task = asyncio.create_task(watch(ask, period_s=0.01, as_json=as_json, console=console))
    await is_over.wait()
    task.cancel()
    assert await task == 0
    answers.append(ConnectionFailedError("never there"))
    with pytest.raises(ConnectionFailedError):
        await watch(ask, period_s=0.01, as_json=as_json, console=console)


async def test_watch_prints_lines_until_it_is_interrupted(router: ScriptedRouter) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster.cli", "status", "--watch", "--json", "--interval", "0.1"),
        *("--address", router.address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(2):
        assert json.loads(await process.stdout.readline())["replicas"][0]["id"] == "r1"
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
