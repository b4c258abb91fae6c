"""Where the time of a cluster under load goes: means of its own metrics, and how busy each of its processes is.

before = Spent.now(cluster)
... load ...
report = Spent.now(cluster).since(before)
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from load_tests import process_tree
from load_tests.rigs.elastic_cluster import Cluster

MEANS = {
    "request_ms": "gen_ai_server_request_duration_seconds",
    "router_queue_ms": "octavo_request_queue_duration_seconds",
    "prefill_ms": "octavo_request_prefill_duration_seconds",
    "decode_ms": "octavo_request_decode_duration_seconds",
    "step_ms": "octavo_engine_step_duration_seconds",
}
"""Histograms whose mean is told, in ms."""
PHASES = "octavo_engine_step_phase_time_seconds_total"
RUNNING = "octavo_engine_running"
MIN_BUSY = 0.02
"""Processes that are idler are not told of."""
SCRAPE_S = 10.0


@dataclass(frozen=True, slots=True)
class Spent:
    """Counters of all processes together and processor times by process and thread, at one time."""

    at: float
    totals: Mapping[str, float]
    threads: Mapping[str, Mapping[int, float]]

    @classmethod
    def now(cls, cluster: Cluster) -> Self:
        with urllib.request.urlopen(cluster.ready["metrics"], timeout=SCRAPE_S) as response:
            text = response.read().decode()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == PHASES:
                    phase = next(value for label, value in sample.labels.items() if label.endswith("phase"))
                    totals[phase] = totals.get(phase, 0.0) + sample.value
                elif not sample.name.endswith("_bucket"):
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        processes = [process.pid for process in process_tree.tree(cluster.pid)]
        threads = {f"{_title(pid)} {pid}": process_tree.thread_times_s(pid) for pid in processes}
        return cls(time.monotonic(), totals, threads)

    def since(self, before: Spent) -> dict[str, Any]:
        """Return means per request and step, what a step was made of, and the busiest threads of each process."""
        seconds = self.at - before.at

        def more(name: str) -> float:
            return self.totals.get(name, 0.0) - before.totals.get(name, 0.0)

        means = {
            what: round(1e3 * more(f"{name}_sum") / count, 3) if (count := more(f"{name}_count")) else None
            for what, name in MEANS.items()
        }
        num_steps = more("octavo_engine_step_duration_seconds_count")
        phases = {
            f"{phase}_ms": round(1e3 * more(phase) / num_steps, 3) if num_steps else None
            for phase in ("schedule", "run", "sample", "emit")
        }
        busy = {}
        for name, threads in self.threads.items():
            former = before.threads.get(name, {})
            shares = sorted(((s - former.get(thread, 0.0)) / seconds for thread, s in threads.items()), reverse=True)
            if sum(shares) > MIN_BUSY:
                busy[name] = [round(share, 3) for share in shares[:3]]
        return {
            **means,
            **phases,
            "steps_per_s": round(num_steps / seconds, 1),
            "running": self.totals.get(RUNNING),
            "busy": busy,
        }


def _title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    return Path(words[0]).name if words[0].startswith("/") else words[0].strip()
