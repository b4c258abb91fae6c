"""What a bench prints: the figures of all contestants beside each other, and the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from load_tests.bars import Bar
from load_tests.peers.runs import Medians
from load_tests.workloads import WORKLOADS

WIDTH = 150
"""Where the output is no terminal."""


def print_figures(medians: Mapping[str, Medians], console: Console | None = None) -> None:
    table = Table(title="medians")
    table.add_column("contestant")
    for workload in WORKLOADS:
        table.add_column(f"{workload.name}\n{workload.unit}/s", justify="right")
    for heading in ("first token\nms, single", "ready\ns", "peak PSS\nGB", "replica\nGB"):
        table.add_column(heading, justify="right")
    for name, each in medians.items():
        speeds = [each.speed(workload.name, workload.unit) for workload in WORKLOADS]
        sizes = [None if size is None else size / 1e9 for size in (each.peak_tree_bytes, each.peak_replica_bytes)]
        cells = [*speeds, each.first_token_ms("single"), each.ready_s, *sizes]
        table.add_row(name, *(_cell(cell) for cell in cells))
    (console or _console()).print(table)


def print_bars(bars: Sequence[Bar], console: Console | None = None) -> None:
    table = Table(title="bars")
    for heading in ("bar", "value", "limit", "", "detail"):
        table.add_column(heading, justify="right" if heading in {"value", "limit"} else "left", overflow="fold")
    for bar in bars:
        verdict = "[green]met[/]" if bar.ok else "[red]missed[/]"
        table.add_row(bar.bar, _cell(bar.value), _cell(bar.limit), verdict, bar.detail)
    (console or _console()).print(table)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
