"""The bars of the router: what a judge says of runs that were noted, and that what was not measured is never met."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from load_tests.bars import Bar
from load_tests.bench_router import SUITE
from load_tests.notes import Notes, difference, judge_terminals, ratio
from load_tests.rig_bench import Outcome
from load_tests.rigs import (
    router_batching,
    router_beside_serve,
    router_fairness,
    router_index,
    router_latency,
    router_overload,
    router_prefixes,
    router_speed,
    router_storm,
    router_with_model,
)
from load_tests.rigs.bar_command import Settings
from load_tests.rigs.lean_client import DRAIN_S, LeanClient, LeanCounts
from load_tests.rigs.lean_crew import age_ms, counts_of
from load_tests.rigs.router_rig import ROOT

JUDGES = {
    "speed": router_speed.judge,
    "serve": router_beside_serve.judge,
    "latency": router_latency.judge,
    "batching": router_batching.judge,
    "prefixes": router_prefixes.judge,
    "model": router_with_model.judge,
    "overload": router_overload.judge,
    "storm": router_storm.judge,
    "fairness": router_fairness.judge,
    "index": router_index.judge,
}


BENCH = (sys.executable, "-m", "load_tests.bench_router", "--quick")


def by_name(bars: list[Bar]) -> dict[str, Bar]:
    assert len({bar.bar for bar in bars}) == len(bars)
    return {bar.bar: bar for bar in bars}


def test_every_family_has_a_judge_here() -> None:
    assert JUDGES.keys() == SUITE.families.keys()


@pytest.mark.parametrize("family", JUDGES)
def test_what_was_not_measured_meets_no_bar(family: str) -> None:
    bars = JUDGES[family](Notes())
    assert bars
    assert not any(bar.ok for bar in bars)


def test_medians_and_missing_figures() -> None:
    notes = Notes()
    for value in (3.0, None, 1.0, 2.0):
        notes.add("run", figure=value)
    assert notes.median("run", "figure") == 2.0
    assert notes.worst("run", "figure") == 3.0
    assert notes.total("run", "figure") == 6.0
    assert notes.median("run", "another") is None
    assert notes.worst("other run", "figure") is None
    assert ratio(1.0, 0) is None
    assert ratio(None, 1.0) is None
    assert difference(3.0, 1.0) == 2.0
    assert difference(None, 1.0) is None


def test_each_request_has_one_terminal() -> None:
    good = {"what": "a", "sent": 5, "ended": 5}
    assert judge_terminals([good]).ok
    assert judge_terminals([good, {"what": "pure"}]).ok
    lost = judge_terminals([good, {"what": "b", "sent": 5, "ended": 4}])
    assert (lost.value, lost.ok) == (1, False)
    assert "b: 1" in lost.detail
    assert not judge_terminals([{"what": "c", "sent": 5, "ended": 5, "extra": 1}]).ok
    assert judge_terminals([{**good, "idle_s": 0.0}]).ok
    assert not judge_terminals([{**good, "idle_s": None}]).ok
    assert not judge_terminals([]).ok


def test_speed_is_rate_and_age_and_cost() -> None:
    notes = Notes()
    figures = {"tokens_per_s": 31_000.0, "age_p99_ms": 12.0, "router_us_per_token": 26.0}
    for _ in range(3):
        notes.add("session, paced", **figures)
        notes.add("session, in time", tokens_per_s=31_000.0, age_p99_ms=12.0)
        notes.add("session, one token", requests_per_s=1_999.0)
    bars = by_name(router_speed.judge(notes))
    assert bars["session: tokens/s, 64 streams, in time"].ok
    assert bars["session: p99 age of a token, ms"].ok
    assert not bars["session: CPU of the router, µs a token"].ok
    assert not bars["session: one-token requests/s"].ok


@pytest.mark.parametrize("capacity", [40_000.0, 22_000.0, 9_000.0, 10.0])
async def test_the_largest_rate_in_time_is_found(monkeypatch: pytest.MonkeyPatch, capacity: float) -> None:
    """A system that was offered too much told of tokens of any age, and nothing of what it can do."""
    runs: list[float] = []

    async def at(_: Settings, call: str, rate: float, seconds: float) -> dict[str, Any]:
        runs.append(rate)
        age_ms = 12.0 if rate <= capacity else 150.0
        return {"tokens_per_s": min(rate, 1.1 * capacity), "age_p50_ms": 5.0, "age_p99_ms": age_ms}

    monkeypatch.setattr(router_speed, "_at", at)
    notes = Notes()
    await router_speed._paced(Settings(), notes, "session")
    [found] = notes.of("session, in time", "tokens_per_s")
    assert len(runs) <= 6
    if capacity > 30_000:
        assert (found, runs) == (30_000, [30_000])
    else:
        assert capacity / 1.12 <= found <= capacity
    bars = by_name(router_speed.judge(notes))
    assert bars["session: tokens/s, 64 streams, in time"].ok == bars["session: p99 age of a token, ms"].ok


async def test_nothing_in_time_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at(*_: object) -> dict[str, Any]:
        return {"tokens_per_s": 1_000.0, "age_p50_ms": 5.0, "age_p99_ms": None}

    monkeypatch.setattr(router_speed, "_at", at)
    notes = Notes()
    await router_speed._paced(Settings(), notes, "generate")
    assert notes.median("generate, in time", "tokens_per_s") == 0.0


def test_answers_are_over_before_clients_give_up() -> None:
    """At a tenth of the rate they took 18 s, and were counted as requests without a terminal."""
    assert router_speed.output_at(30_000) == 1_024
    assert router_speed.output_at(3_000) / (3_000 / router_speed.STREAMS) <= DRAIN_S / 2
    assert router_speed.output_at(1) == 1


def test_streams_do_not_all_end_at_once() -> None:
    job = {"streams": 4, "seed": 1, "requests": 0, "clock": None, "prompt": 2, "output": 100, "is_staggered": True}
    client = LeanClient(job)
    assert [client.request()[1].max_tokens for _ in range(6)] == [25, 50, 75, 100, 100, 100]
    client = LeanClient({**job, "is_staggered": False})
    assert [client.request()[1].max_tokens for _ in range(2)] == [100, 100]


def test_added_latency_is_beside_the_data_port() -> None:
    notes = Notes()
    notes.add("port", p50_ms=1.0, p99_ms=2.0)
    notes.add("proxy", p50_ms=1.25, p99_ms=2.0)
    notes.add("session", p50_ms=1.5, p99_ms=6.0)
    bars = by_name(router_latency.judge(notes))
    assert "add 0.25 ms" in bars["session: added to the first token, p50, ms"].detail
    assert bars["session: added to the first token, p50, ms"].value == 0.5
    assert bars["session: added to the first token, p50, ms"].ok
    assert not bars["session: added to the first token, p99, ms"].ok


def test_what_is_added_is_within_a_repetition() -> None:
    notes = Notes()
    for port, session in ((1.0, 1.5), (5.0, 5.9), (9.0, 9.1)):
        notes.add("port", p50_ms=port)
        notes.add("session", p50_ms=session)
    bars = by_name(router_latency.judge(notes))
    assert bars["session: added to the first token, p50, ms"].value == 0.5


def test_a_batcher_that_refuses_everything_misses_a_bar() -> None:
    notes = Notes()
    notes.add("1.5 x capacity without it, on", missed=0, in_time=0)
    notes.add("1.5 x capacity without it, off", missed=100, in_time=200)
    bars = by_name(router_batching.judge(notes))
    assert bars["batcher: deadlines missed at 1.5 x load, on / off"].ok
    assert not bars["batcher: answers in time at 1.5 x load, on / off"].ok


def test_the_batcher_is_judged_where_there_is_a_queue_and_where_there_is_none() -> None:
    notes = Notes()
    notes.add("0.9 x capacity, on", prefill_tokens=100, first_p99_ms=50.0)
    notes.add("0.9 x capacity, off", prefill_tokens=140, first_p99_ms=5_000.0)
    notes.add("0.9 x capacity without it, on", prefill_tokens=50, first_p99_ms=51.0)
    notes.add("0.9 x capacity without it, off", prefill_tokens=55, first_p99_ms=50.0)
    bars = by_name(router_batching.judge(notes))
    assert bars["batcher: prefill tokens, off / on"].ok
    assert "x 1.1 at 0.9 of the latter" in bars["batcher: prefill tokens, off / on"].detail
    assert bars["batcher: p99 first token, on / off"].ok
    assert not bars["batcher: p99 first token, on / off, at 0.9 x capacity without it"].ok


def test_overload_is_judged_by_capacity_lateness_and_memory() -> None:
    notes = Notes()
    notes.add("overload", goodput_per_s=55.0, late=1, growth=1.0, idle_s=0.1, router_mb=70.0, errors={"X": 3})
    bars = by_name(router_overload.judge(notes))
    assert bars["overload: goodput, share of capacity"].ok
    assert not bars["overload: late and answered OK"].ok
    assert router_overload.growth([1.0] * 40 + [2.0] * 20) == 2.0
    assert router_overload.growth([]) is None


def test_a_storm_after_which_something_is_left() -> None:
    notes = Notes()
    for call in router_storm.CALLS:
        notes.add(f"storm, {call}", sent=5_000, cancelled=2_000, idle_s=0.2, errors={})
    assert all(bar.ok for bar in router_storm.judge(notes))
    notes.add("storm, session", sent=1, cancelled=0, idle_s=None, errors={})
    assert not by_name(router_storm.judge(notes))["storm, session: s until nothing is left"].ok


def test_fairness_is_beside_a_run_without_the_greedy_one() -> None:
    notes = Notes()
    notes.add("calm, the four", total_p99_ms=300.0, first_p99_ms=40.0)
    notes.add("greedy, the four", total_p99_ms=390.0, first_p99_ms=85.0)
    notes.add("greedy", modest_sent=100, modest_ok=100)
    bars = by_name(router_fairness.judge(notes))
    assert bars["fairness: p99 of four modest tenants, x without the greedy one"].value == 1.3
    first = bars["fairness: p99 first token of the four, later by x the time of an answer alone"]
    assert (first.value, first.ok) == (0.15, True)
    assert bars["fairness: requests of the four that failed"].ok


def test_failures_of_several_clients_are_added_up() -> None:
    """Those of the greedy one took the place of the others'."""
    one = {"sent": 5, "ended": 5, "extra": 0, "ok": 2, "errors": {"QUEUE_FULL": 2, "DEADLINE_PASSED": 1}}
    other = {"sent": 9, "ended": 9, "extra": 1, "ok": 2, "errors": {"QUEUE_FULL": 7}}
    assert router_fairness.summed([one, other]) == {
        "sent": 14,
        "ended": 14,
        "extra": 1,
        "ok": 4,
        "errors": {"QUEUE_FULL": 9, "DEADLINE_PASSED": 1},
    }


def test_the_best_share_computes_each_prefix_once() -> None:
    assert router_prefixes.best_share(10 * 528) == 2 * 512 / (10 * 528)
    assert router_prefixes.best_share(0) is None


def test_an_emptied_cache_is_noticed_from_the_first_wait_after_which_it_always_was() -> None:
    noticed = router_with_model.noticed_within
    assert noticed([0.5, 1.0, 1.9], [False, True, True]) == 1.0
    assert noticed([0.5, 1.0, 1.9, 0.5, 1.0], [True, True, True, True, False]) == 1.9
    assert noticed([0.5, 1.9], [True, False]) is None
    assert noticed([], []) is None


def test_ages_are_counted_by_token() -> None:
    job = {"streams": 1, "clock": [100, 1_000, 5_000], "seed": 1, "warm_up_s": 0.0, "duration_s": 60.0, "requests": 0}
    client = LeanClient({**job, "prompt": 4, "output": 2})
    client.begin()
    now = time.monotonic()
    client.arrived([100 + (int(now * 5_000) - 50) % 1_000, 100 + (int(now * 5_000) - 5) % 1_000], now)
    assert client.counts.tokens_timed == 2
    assert age_ms(client.counts.ages, 0.5) == pytest.approx(1.0, abs=0.25)
    assert age_ms(client.counts.ages, 0.99) == pytest.approx(10.0, abs=0.25)
    assert age_ms({}, 0.5) is None


def test_counts_are_those_that_a_client_wrote() -> None:
    counted = LeanCounts(sent=2, tokens=8, cpu_s=0.5, errors=Counter(X=1), ages=Counter({5: 2}))
    line = json.dumps({"event": "done", **{name: getattr(counted, name) for name in counted.__slots__}})
    assert counts_of(json.loads(line)) == counted


def test_a_rig_that_wrote_nothing_misses_and_spoils_the_whole() -> None:
    outcome = Outcome()
    report = {"rig": "router_index", "is_whole": True, "runs": [{"what": "a", "sent": 1, "ended": 1}], "bars": []}
    outcome.take(report)
    assert all(bar.ok for bar in outcome.judged())
    outcome.miss("speed", 2)
    assert not outcome.is_whole
    assert [bar.ok for bar in outcome.judged()] == [False, True]


def test_the_bench_runs_a_rig_and_writes_its_bars(tmp_path: Path) -> None:
    """The quickest one, in a process of its own."""
    command = [*BENCH, "--bars", "index", "--results", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=150, check=False)
    bars = json.loads((tmp_path / "router.json").read_text())
    assert [set(bar) for bar in bars] == [{"bar", "value", "limit", "ok", "detail"}] * 3
    assert bars[1]["value"] > 0
    assert "index: memory, MB" in (tmp_path / "router.txt").read_text()


def test_a_bench_that_is_stopped_judges_what_there_is(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*BENCH, "--bars", "overload,index", "--results", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "overload" in process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=150)
    assert process.returncode == 1
    bars = json.loads((tmp_path / "router.json").read_text())
    assert not any(bar["ok"] for bar in bars)
    runs = json.loads((tmp_path / "router_runs.json").read_text())
    assert not runs["is_whole"]
