"""How the demo's second act looks: panels that turn red and go on in a terminal, plain lines elsewhere, and JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from cluster.demo import View
from cluster.demo_crash import LIMIT_S, CrashView, Outcome, Victim
from cluster.demo_stream import Stream
from cluster.demo_trace import Branch, outline
from cluster.demo_view import REFRESH_PER_S, JsonView, LinesView, TerminalView, printable, short

MIN_WIDTH = 36
"""Of a panel."""
MAX_TEXT_LINES = 3
COLOURS = ("cyan", "yellow", "blue", "magenta")
"""Of the replicas, in the order in which they are seen; red and green say something else."""


class CrashLines:
    """Plain lines: who was killed, who goes on where, and what came of it."""

    def __init__(self, lines: LinesView) -> None:
        self._lines = lines

    def begun(self, streams: Sequence[Stream]) -> None:
        self._lines.line("")
        self._lines.line(f"{len(streams)} long answers at once; they share one system prompt, which no cache has:")

    def killed(self, victim: Victim) -> None:
        self._lines.line(f"    {_killed(victim)}")

    def went_on(self, stream: Stream) -> None:
        self._lines.line(f"    [{stream.number}] {_went_on(stream)}")

    def ended(self) -> None:
        """Lines are there already."""

    def outcome(self, outcome: Outcome) -> None:
        for stream in outcome.streams:
            self._lines.line(f"[{stream.number}] {stream.subject}: {_where(stream)}")
            self._lines.line(f"    {printable(stream.text)}")
        self._told(outcome)

    def _told(self, outcome: Outcome) -> None:
        for text in told(outcome):
            self._lines.line(text)


class CrashPanels(CrashLines):
    """Panels side by side, in the colours of their replicas."""

    def __init__(self, lines: LinesView) -> None:
        super().__init__(lines)
        self._console = lines.out
        self._streams: Sequence[Stream] = ()
        self._victim: Victim | None = None
        self._colours: dict[str, str] = {}
        self._live: Live | None = None

    def begun(self, streams: Sequence[Stream]) -> None:
        super().begun(streams)
        self._streams = streams
        self._live = Live(get_renderable=self._panels, console=self._console, refresh_per_second=REFRESH_PER_S)
        self._live.start(refresh=True)

    def killed(self, victim: Victim) -> None:
        self._victim = victim

    def went_on(self, stream: Stream) -> None:
        """The panels say it."""

    def ended(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def outcome(self, outcome: Outcome) -> None:
        self._told(outcome)

    def _panels(self) -> RenderableType:
        now = time.monotonic()
        width, height = self._console.size
        columns = max(1, width // MIN_WIDTH)
        rows = -(-len(self._streams) // columns)
        lines = min(MAX_TEXT_LINES, max(1, (height - 3) // rows - 2))
        panels = [self._panel(stream, now, width // columns - 1, lines) for stream in self._streams]
        victim = self._victim
        head = Text(" " if victim is None else _killed(victim), style="bold red", no_wrap=True, overflow="ellipsis")
        return Group(head, Columns(panels))

    def _panel(self, stream: Stream, now: float, width: int, lines: int) -> Panel:
        colour = self._colour(stream.replica)
        rate = stream.tokens_per_s(now)
        speed = "" if rate is None else f", {rate:.0f} tokens/s"
        if stream.is_waiting:
            state = Text(f"{short(stream.replica)} is gone; waiting", style="bold red")
        else:
            state = Text(_where(stream), style=colour)
        room = (width - 4) * lines
        return Panel(
            Text(_fitting(printable(stream.text).strip(), room), style="dim" if stream.is_waiting else ""),
            title=Text(f"{stream.number}. {stream.subject}{speed}", no_wrap=True, overflow="ellipsis"),
            title_align="left",
            subtitle=state,
            subtitle_align="left",
            border_style="bold red" if stream.is_waiting else "green" if stream.is_ended else colour,
            width=width,
            height=lines + 2,
        )

    def _colour(self, replica: str) -> str:
        return self._colours.setdefault(replica, COLOURS[len(self._colours) % len(COLOURS)]) if replica else "dim"


class CrashJson:
    """One JSON object for the kill, each stream, the trace and the figures."""

    def __init__(self, view: JsonView) -> None:
        self._view = view

    def begun(self, streams: Sequence[Stream]) -> None:
        """Each stream is written when all have ended."""

    def killed(self, victim: Victim) -> None:
        self._view.write({"event": "killed", **dataclasses.asdict(victim)})

    def went_on(self, stream: Stream) -> None:
        self._view.write({"event": "went_on", "number": stream.number, **_loss(stream)})

    def ended(self) -> None:
        """Nothing is open."""

    def outcome(self, outcome: Outcome) -> None:
        for stream, place in zip(outcome.streams, outcome.differences, strict=True):
            self._view.write({"event": "stream", **_record(stream), "first_difference": place})
        if outcome.traced is not None:
            trace = [dataclasses.asdict(branch.span) for branch in _all(outcome.trace)]
            self._view.write({"event": "trace", "trace_id": outcome.traced.trace_id, "spans": trace})
        names = ("dtype", "num_identical", "longest_pause_s", "prompt_tokens", "cached_tokens")
        figures = {name: getattr(outcome, name) for name in (*names, "total_s", "undisturbed_s")}
        self._view.write({"event": "second_act", "streams": len(outcome.streams), **figures})


def views(out: Console, errors: Console, *, as_json: bool) -> tuple[View, CrashView]:
    """Return how both acts are seen at `out`."""
    if as_json:
        json_view = JsonView(out, errors)
        return json_view, CrashJson(json_view)
    if out.is_terminal:
        panels = TerminalView(out, errors)
        return panels, CrashPanels(panels)
    lines = LinesView(out, errors)
    return lines, CrashLines(lines)


def told(outcome: Outcome) -> Iterator[str]:
    """Return what came of the second act, as sentences and a tree."""
    total, pause = len(outcome.streams), outcome.longest_pause_s
    yield ""
    yield (
        f"{outcome.num_identical} of {total} answers are, token by token, those of the same run undisturbed "
        f"({outcome.dtype}, greedy); {len(outcome.moved)} of them had two replicas."
    )
    if outcome.num_identical < total:
        places = ", ".join(str(place + 1) for place in outcome.differences if place is not None)
        yield f"The others differ from token {places} on: sums over other chunks round otherwise."
    limit = "" if pause <= LIMIT_S else f", more than the {LIMIT_S:.0f} s that it should be at most"
    yield f"The longest pause of a stream was {pause:.2f} s{limit}."
    saved, prompt = outcome.cached_tokens, outcome.prompt_tokens
    yield (
        f"{saved} of {prompt} prompt tokens ({100 * saved / max(1, prompt):.0f} %) were not computed: "
        f"a replica computes the shared system prompt once."
    )
    if outcome.traced is not None:
        yield from _told_trace(outcome.traced, outcome.trace)


def _told_trace(stream: Stream, trace: Sequence[Branch]) -> Iterator[str]:
    yield f"Answer {stream.number} over both replicas, trace {stream.trace_id}:"
    if not trace:
        yield "    its spans did not come here (another collector is set, or octavo[otel] is not installed)"
    for line in outline(trace):
        yield f"    {line}"


def _killed(victim: Victim) -> str:
    return f"kill -9: replica {short(victim.replica)}, pid {victim.pid}, which carried {victim.num_streams} of them"


def _went_on(stream: Stream) -> str:
    return f"goes on at replica {short(stream.replica)} after {stream.went_on_after_s or 0.0:.2f} s"


def _where(stream: Stream) -> str:
    """Say which replicas a stream was on."""
    path = " → ".join(map(short, stream.replicas))
    return path if stream.went_on_after_s is None else f"{path} after {stream.went_on_after_s:.2f} s"


def _fitting(text: str, room: int) -> str:
    """Return the end of `text` if there is no room for all of it."""
    return text if len(text) <= room else f"…{text[-room + 1 :]}"


def _loss(stream: Stream) -> dict[str, Any]:
    return {
        "replica": stream.replica,
        "tokens_at_loss": stream.tokens_at_loss,
        "went_on_after_s": stream.went_on_after_s,
    }


def _record(stream: Stream) -> dict[str, Any]:
    usage = stream.usage
    assert usage is not None, "it has ended"
    return {
        "number": stream.number,
        "subject": stream.subject,
        "text": stream.text.strip(),
        **_loss(stream),
        "replicas": stream.replicas,
        "longest_pause_s": stream.longest_pause_s,
        "tokens_per_s": stream.tokens_per_s(0.0),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "generated_tokens": usage.generated_tokens,
        "trace_id": stream.trace_id,
    }


def _all(branches: Sequence[Branch]) -> Iterator[Branch]:
    for branch in branches:
        yield branch
        yield from _all(branch.children)
