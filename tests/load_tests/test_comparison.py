"""From medians to the rows of issue 4's table: who is compared with whom, and what a gap in the figures does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from rich.console import Console

from load_tests.bars import Bar
from load_tests.measurement import Measurement
from load_tests.peers.bench import both_starts
from load_tests.peers.comparison import Findings, compare
from load_tests.peers.contestants import LLAMA_BEST, LLAMA_SAME, VLLM
from load_tests.peers.runs import Run, by_contestant
from load_tests.peers.tables import print_bars, print_figures
from load_tests.workloads import WORKLOADS


def measurement(workload: str, speed: float, first_ms: float, cached: int | None = 0) -> Measurement:
    return Measurement(
        workload=workload,
        requests=4,
        wall_s=1.0,
        output_tokens_per_s=speed,
        requests_per_s=speed,
        first_token_p50_ms=first_ms,
        first_token_max_ms=first_ms,
        per_token_p50_ms=1.0,
        cached_tokens=cached,
    )


def run(name: str, family: str, speed: float, *, repetition: int = 0, first_ms: float = 100.0, cached: int = 0) -> Run:
    return Run(
        contestant=name,
        family=family,
        repetition=repetition,
        load_before=0.1,
        busy_before=0.0,
        ready_s=2.0,
        peak_tree_bytes=2_000_000_000,
        peak_replica_bytes=1_000_000_000,
        measurements=[measurement(workload.name, speed, first_ms, cached) for workload in WORKLOADS],
    )


PEERS = [
    run("vllm-fp32", VLLM, 20.0, first_ms=80.0),
    run("llama-q4_1", LLAMA_SAME, 90.0),
    run("llama-q4_0", LLAMA_BEST, 100.0),
]


def rows(runs: list[Run], **others: object) -> Mapping[str, Bar]:
    bars = compare(Findings(medians=by_contestant(runs), **others))  # type: ignore[arg-type]
    assert len({bar.bar for bar in bars}) == len(bars), "two rows of one name"
    return {bar.bar: bar for bar in bars}


def test_ratios_are_to_the_best_peer() -> None:
    found = rows([*PEERS, run("octavo-bf16", "Octavo", 165.0), run("octavo-int8", "Octavo", 210.0)])
    assert found["conc16, bf16, x best peer"] == Bar(
        "conc16, bf16, x best peer", 1.65, 1.6, True, "165 tokens/s; llama-q4_0 100"
    )
    assert not found["prefix, bf16, x best peer"].ok
    assert not found["conc16, int8, x best peer"].ok
    assert found["longin, int8, x best peer"].ok
    same = found["single, bf16, x llama.cpp on the same file"]
    assert (same.value, same.limit, same.ok) == (1.833, 1.3, True)


def test_first_token_is_beside_the_fastest() -> None:
    ours = [run("octavo-bf16", "Octavo", 1.0, first_ms=70.0), run("octavo-int8", "Octavo", 1.0, first_ms=60.0)]
    found = rows([*PEERS, *ours])
    assert found["first token, bf16, x best peer"].value == 0.875
    assert found["first token, bf16, x best peer"].ok
    assert not found["first token, int8, x best peer"].ok


def test_medians_are_over_repetitions() -> None:
    runs = [run("octavo-int8", "Octavo", speed, repetition=i) for i, speed in enumerate((300.0, 90.0, 220.0))]
    assert rows([*PEERS, *runs])["conc16, int8, x best peer"].value == 2.2


def test_a_peer_that_cannot_run_is_a_row_that_says_why() -> None:
    broken = Run(
        contestant="vllm-fp32", family=VLLM, repetition=0, load_before=0.1, busy_before=0.0, failure="needs AVX-512"
    )
    found = rows([broken, *PEERS[1:]])
    row = found[f"peer runs: {VLLM}"]
    assert not row.ok
    assert "vllm-fp32: needs AVX-512" in row.detail
    assert found[f"peer runs: {LLAMA_SAME}"].ok


def test_cached_tokens_count_outside_prefix_only() -> None:
    found = rows([*PEERS, run("octavo-int8", "Octavo", 1.0, cached=16)])
    assert found["cached tokens outside prefix, int8"].value == 48
    assert not found["cached tokens outside prefix, int8"].ok


def test_memory_and_starts() -> None:
    starts = {
        "first": {"seconds": 7.5, "detail": "", "imported": ["gguf"]},
        "later": {"seconds": 5.5, "detail": "", "imported": []},
    }
    found = rows([*PEERS, run("octavo-int8", "Octavo", 1.0)], starts=starts)
    assert found["memory of a replica, int8"].ok
    assert found["start of a replica, first time"].ok
    assert not found["start of a replica, later time"].ok
    assert found["imports of a replica"].ok


def test_what_is_not_the_engine_takes_a_share_of_the_processor() -> None:
    spent = [{"conc16": {"engine": 90.0, "others": others, "driver": 50.0}} for others in (10.0, 30.0, 6.0)]
    ours = [
        dataclasses.replace(run("octavo-int8", "Octavo", 1.0, repetition=i), cpu_s=each) for i, each in enumerate(spent)
    ]
    found = rows([*PEERS, *ours, run("octavo-bf16", "Octavo", 1.0)])
    assert found["all that is not the engine, int8"].value == 0.1
    assert found["all that is not the engine, int8"].ok
    assert not found["all that is not the engine, bf16"].ok


def test_starts_are_those_under_serve() -> None:
    """The bar is about a replica's actor; a bare one, without Serve around it, only tells what it imported."""
    served = {"first": {"seconds": 6.0, "detail": "a"}, "later": {"seconds": 4.0, "detail": "b"}, "load_before": 0.1}
    bare = {which: {"seconds": 1.0, "detail": "c", "imported": []} for which in ("first", "later")}
    starts = both_starts(served, bare)
    assert starts["first"] == {"seconds": 6.0, "detail": "a", "imported": []}
    found = rows([], starts=starts)
    assert found["start of a replica, later time"].value == 4.0
    assert found["imports of a replica"].ok
    for only in (both_starts(served, None), both_starts(None, bare), both_starts(None, None)):
        found = rows([], starts=only)
        assert not (found["start of a replica, first time"].ok and found["imports of a replica"].ok)


def test_without_a_compiler_the_faster_counts_and_the_share_says_of_what() -> None:
    exact, bf16 = run("octavo-torch", "Octavo", 30.0), run("octavo-torch-bf16", "Octavo", 60.0)
    ours = [run("octavo-bf16", "Octavo", 200.0), exact]
    name = "conc16, no compiler and no AVX-512, x best peer"
    alone, both = rows([*PEERS, *ours])[name], rows([*PEERS, *ours, bf16])[name]
    assert (alone.value, alone.ok) == (0.3, False)
    assert alone.detail == "octavo-torch 30 tokens/s; llama-q4_0 100; 0.15 of octavo-bf16"
    assert (both.value, both.ok) == (0.6, True)
    assert both.detail == "octavo-torch-bf16 60 tokens/s; llama-q4_0 100; 0.30 of octavo-bf16"


def test_answers_and_perplexity() -> None:
    verdicts = {"octavo-int8": [{"num_wrong": 0, "num_different": 2, "num_tokens": 32}] * 2}
    found = rows(PEERS, verdicts=verdicts, perplexity_increase={"bf16": 0.002, "int8": 0.002})
    rule = found["tokens against the rule for int8, octavo-int8"]
    assert rule.ok
    assert rule.detail == "2 answers, 64 tokens, 4 are not the fp32 reference's choice"
    assert not found["perplexity increase, bf16"].ok
    assert found["perplexity increase, int8"].ok


def test_nothing_measured_meets_nothing() -> None:
    assert not any(bar.ok for bar in rows([]).values())


@pytest.mark.parametrize("runs", [[], PEERS])
def test_tables_print(runs: list[Run]) -> None:
    console = Console(width=150, record=True, quiet=True)
    medians = by_contestant(runs)
    print_figures(medians, console)
    print_bars(compare(Findings(medians=medians)), console)
