"""The machine that figures come from: what it is, and how busy it is with other things. Linux only."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, object]:
    """Return processor, cores, memory and the vector instructions that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    memory = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory * 1024 / 1e9, 1),
        "instructions": sorted({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"} & instructions()),
    }


def instructions() -> set[str]:
    """Return the flags of the first processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.partition(": ")[2] for line in lines if line.startswith("flags")), "").split())


def load_average() -> float:
    """Return that of the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_cores(seconds: float) -> float:
    """Look for so long; return how many cores were busy on average."""
    before = _busy_s()
    time.sleep(seconds)
    return round((_busy_s() - before) / seconds, 2)


def await_quiet(limit: float, timeout_s: float) -> float:
    """Wait until fewer cores than `limit` are busy, or the time is up; return how many were."""
    give_up = time.monotonic() + timeout_s
    while (busy := busy_cores(1.0)) >= limit and time.monotonic() < give_up:
        pass
    return busy


def _busy_s() -> float:
    """Return the time of all cores together that was neither idle nor waiting for a disk."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS_PER_S
