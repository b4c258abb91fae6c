"""The bars of the CPU engine against its peers: medians of all contestants in, rows out. Pure.

Every ratio is to the best peer of the same run; a peer is a family of configurations, of which its best one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from load_tests.bars import Bar, Best, at_least, at_most, largest, ratio, smallest
from load_tests.peers.contestants import BF16, INT8, LLAMA_BEST, LLAMA_SAME, TORCH, TORCH_BF16, VLLM
from load_tests.peers.runs import Medians
from load_tests.workloads import WORKLOADS, Workload

OURS = {"bf16": BF16, "int8": INT8}
"""Column of the table of bars to who is judged by it: weights as they are, and activations rounded less than to bf16,
or to int8."""
SPEED = {
    "single": {"bf16": 1.05, "int8": 1.1},
    "conc16": {"bf16": 1.6, "int8": 2.2},
    "prefix": {"bf16": 1.7, "int8": 2.4},
    "longin": {"bf16": 1.3, "int8": 2.0},
}
SAME_FILE_SINGLE = 1.3
FIRST_TOKEN = {"bf16": 0.9, "int8": 0.7}
ON_PLAIN_MACHINE = (TORCH, TORCH_BF16)
"""Without AVX-512 and without a compiler; the faster of them counts, and the row says which it is."""
PLAIN_MACHINE = 0.5
REPLICA_BYTES = 1.2e9
START_S = {"first": 8.0, "later": 5.0}
SHARE_OF_OTHERS = 0.1
"""Of the cluster's processor time: what event loops, router and Ray may take beside the engine."""
PERPLEXITY = {"bf16": 0.001, "int8": 0.005}
PEERS = (VLLM, LLAMA_SAME, LLAMA_BEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was measured. Whatever is missing fails its bars."""

    medians: Mapping[str, Medians]
    """By contestant."""
    verdicts: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """By contestant of ours: what the oracle says of a sample of its answers."""
    perplexity_increase: Mapping[str, float] = field(default_factory=dict)
    """By column: relative to fp32 transformers on the same weights."""
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """"first" and "later": seconds from the creation of a replica's actor to its first token, and what it imported."""

    def peers(self) -> dict[str, Medians]:
        return {name: each for name, each in self.medians.items() if each.family in PEERS}

    def speeds(self, workload: Workload) -> dict[str, float | None]:
        return {name: peer.speed(workload.name, workload.unit) for name, peer in self.peers().items()}

    def of(self, name: str) -> Medians:
        return self.medians.get(name, Medians(()))


def compare(findings: Findings) -> list[Bar]:
    """Return a row for each bar."""
    return [
        *_families(findings),
        *_speed(findings),
        *_first_token(findings),
        *_plain_machine(findings),
        *_resources(findings),
        *_starts(findings),
        *_answers(findings),
    ]


def _families(findings: Findings) -> list[Bar]:
    """A peer that cannot run lowers every bar, so it must be seen."""
    rows = []
    for family in PEERS:
        configurations = {name: peer for name, peer in findings.peers().items() if peer.family == family}
        running = [name for name, peer in configurations.items() if any(run.measurements for run in peer.runs)]
        reasons = [f"{name}: {peer.failure}" for name, peer in configurations.items() if peer.failure is not None]
        detail = "; ".join([f"ran: {', '.join(running) or 'none'}", *reasons])
        rows.append(at_least(f"peer runs: {family}", len(running), 1, detail))
    return rows


def _speed(findings: Findings) -> list[Bar]:
    rows = []
    for workload in WORKLOADS:
        speeds = findings.speeds(workload)
        best = largest(speeds)
        for column, limit in SPEED[workload.name].items():
            ours = findings.of(OURS[column].name).speed(workload.name, workload.unit)
            detail = _beside(ours, best, f"{workload.unit}/s")
            rows.append(at_least(f"{workload.name}, {column}, x best peer", ratio(ours, best), limit, detail))
    same = largest(
        {name: peer.speed("single", "tokens") for name, peer in findings.peers().items() if peer.family == LLAMA_SAME}
    )
    ours = findings.of(BF16.name).speed("single", "tokens")
    detail = _beside(ours, same, "tokens/s")
    rows.append(at_least("single, bf16, x llama.cpp on the same file", ratio(ours, same), SAME_FILE_SINGLE, detail))
    return rows


def _first_token(findings: Findings) -> list[Bar]:
    best = smallest({name: peer.first_token_ms("single") for name, peer in findings.peers().items()})
    rows = []
    for column, limit in FIRST_TOKEN.items():
        ours = findings.of(OURS[column].name).first_token_ms("single")
        detail = _beside(ours, best, "ms, 1 stream, 64-token prompt")
        rows.append(at_most(f"first token, {column}, x best peer", ratio(ours, best), limit, detail))
    return rows


def _plain_machine(findings: Findings) -> list[Bar]:
    rows = []
    for workload in WORKLOADS:
        best = largest(findings.speeds(workload))
        unit = workload.unit
        ours = largest({own.name: findings.of(own.name).speed(workload.name, unit) for own in ON_PLAIN_MACHINE})
        native = findings.of(BF16.name).speed(workload.name, unit)
        speed, detail = None, _beside(None, best, f"{unit}/s")
        if ours is not None:
            speed, detail = ours.value, f"{ours.name} {_beside(ours.value, best, f'{unit}/s')}"
            detail += "" if native is None else f"; {ours.value / native:.2f} of {BF16.name}"
        bar = f"{workload.name}, no compiler and no AVX-512, x best peer"
        rows.append(at_least(bar, ratio(speed, best), PLAIN_MACHINE, detail))
    return rows


def _resources(findings: Findings) -> list[Bar]:
    trees = {name: peer.peak_tree_bytes for name, peer in findings.peers().items()}
    beside = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in trees.items() if size is not None)
    rows = []
    for column, contestant in OURS.items():
        ours = findings.of(contestant.name)
        size, tree = ours.peak_replica_bytes, ours.peak_tree_bytes
        whole = "not measured" if tree is None else f"{tree / 1e9:.2f}"
        detail = f"GB of PSS at its peak; the whole cluster {whole}; whole process trees of peers: {beside or 'none'}"
        limit = REPLICA_BYTES / 1e9
        rows.append(at_most(f"memory of a replica, {column}", None if size is None else size / 1e9, limit, detail))
        cached = [ours.most_cached(workload.name) for workload in WORKLOADS if not workload.shared]
        known = [count for count in cached if count is not None]
        count = sum(known) if len(known) == len(cached) else None
        rows.append(at_most(f"cached tokens outside prefix, {column}", count, 0))
        share = ours.share_of_others("conc16")
        detail = "of the cluster's processor time during conc16"
        rows.append(at_most(f"all that is not the engine, {column}", share, SHARE_OF_OTHERS, detail))
    return rows


def _starts(findings: Findings) -> list[Bar]:
    rows = []
    for which, limit in START_S.items():
        start = findings.starts.get(which, {})
        detail = "s from creation of the replica's actor to its first token; " + str(
            start.get("detail", "not measured")
        )
        rows.append(at_most(f"start of a replica, {which} time", start.get("seconds"), limit, detail))
    imported = findings.starts.get("later", {}).get("imported")
    detail = ", ".join(imported) if imported else "of transformers and gguf, once weights are packed"
    rows.append(at_most("imports of a replica", None if imported is None else len(imported), 0, detail))
    return rows


def _answers(findings: Findings) -> list[Bar]:
    rows = []
    for contestant in (*OURS.values(), *ON_PLAIN_MACHINE):
        verdicts = findings.verdicts.get(contestant.name, [])
        wrong = sum(verdict["num_wrong"] for verdict in verdicts) if verdicts else None
        different = sum(verdict["num_different"] for verdict in verdicts)
        tokens = sum(verdict["num_tokens"] for verdict in verdicts)
        detail = f"{len(verdicts)} answers, {tokens} tokens, {different} are not the fp32 reference's choice"
        rows.append(
            at_most(f"tokens against the rule for {contestant.arithmetic}, {contestant.name}", wrong, 0, detail)
        )
    for column, limit in PERPLEXITY.items():
        increase = findings.perplexity_increase.get(column)
        if increase is not None and column == "bf16":
            increase = abs(increase)  # faithful weights are neither worse nor better
        rows.append(at_most(f"perplexity increase, {column}", increase, limit, "relative to fp32 transformers"))
    return rows


def _beside(ours: float | None, best: Best | None, unit: str) -> str:
    mine = "not measured" if ours is None else f"{ours:.4g}"
    theirs = "no peer measured" if best is None else f"{best.name} {best.value:.4g}"
    return f"{mine} {unit}; {theirs}"
