"""`octavo status --watch`: a cluster's status asked for again and again, drawn in place or as one JSON object a line.

Rates are what counters have gained since the status before. A router that does not answer is asked again; what was seen
last stays there meanwhile, with how old it is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import typer
from octavo.client import CallError
from octavo.v1 import status_service_pb2 as pb
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.cli_status import Rates, status_record, status_view

Ask = Callable[[], Awaitable[pb.GetStatusResponse]]


class Watch:
    """What has been seen, and how it looks."""

    def __init__(self) -> None:
        self._seen: tuple[float, pb.GetStatusResponse] | None = None
        self._rates = Rates()
        self._error = ""

    @property
    def has_seen(self) -> bool:
        return self._seen is not None

    def take(self, status: pb.GetStatusResponse, now: float) -> None:
        """`now`: seconds, on a clock that never goes back."""
        if self._seen is not None:
            at, before = self._seen
            self._rates = Rates.between(before, status, now - at)
        self._seen, self._error = (now, status), ""

    def fail(self, error: CallError) -> None:
        self._error = error.message

    def view(self, now: float) -> RenderableType:
        """Return what was seen last. `take` has been called."""
        assert self._seen is not None
        at, status = self._seen
        view = status_view(status, self._rates)
        if not self._error:
            return view
        return Group(Text(f"no answer for {now - at:.0f} s: {self._error}", style="red"), view)


async def watch(ask: Ask, *, period_s: float, as_json: bool, console: Console) -> int:
    """Show the status every `period_s` until interrupted; returns the exit code. Raises CallError if none ever came."""
    with suppress(asyncio.CancelledError):  # what Ctrl-C becomes in here
        if as_json:
            await _print_lines(ask, period_s)
        else:
            await _draw(ask, period_s, console)
    return 0


async def _print_lines(ask: Ask, period_s: float) -> None:
    has_seen = False
    while True:
        try:
            record = status_record(await ask())
        except CallError as error:
            if not has_seen:
                raise
            record = {"error": error.message}
        has_seen = True
        typer.echo(json.dumps(record))
        await asyncio.sleep(period_s)


async def _draw(ask: Ask, period_s: float, console: Console) -> None:
    seen = Watch()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                seen.take(await ask(), time.monotonic())
            except CallError as error:
                if not seen.has_seen:
                    raise
                seen.fail(error)
            live.update(seen.view(time.monotonic()), refresh=True)
            await asyncio.sleep(period_s)
