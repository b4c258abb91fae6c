"""What is happening, shown on a terminal while a run goes on, and nowhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from load_tests.generator.crew import Progress
from load_tests.generator.plot import number, seconds


class ProgressView:
    """`show` may be called any time while it is entered; it does nothing where standard error is no terminal."""

    def __init__(self, title: str, duration_s: float) -> None:
        self._title = title
        self._duration_s = duration_s
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        if self._console.is_terminal:
            self._live.update(render(self._title, self._duration_s, progress), refresh=True)


def render(title: str, duration_s: float, progress: Progress) -> Table:
    """Return one picture of a run."""
    every, elapsed = progress.all, max(progress.elapsed_s, 1e-9)
    table = Table(title=f"{title}  {elapsed:.0f} of {duration_s:.0f} s", title_justify="left")
    columns = {
        "sent": str(every.sent),
        "open": str(progress.num_open),
        "ok": str(every.ok),
        "cancelled": str(every.cancelled),
        "refused": str(every.refused),
        "failed": str(every.failed),
        "requests/s": number(every.ok / elapsed),
        "tokens/s": number(progress.num_tokens / elapsed),
        "first token p50": _seconds(every.first_token.percentile(0.5)),
        "p99": _seconds(every.first_token.percentile(0.99)),
        "end to end p99": _seconds(every.total.percentile(0.99)),
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else seconds(value)
