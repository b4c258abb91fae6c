"""One step of the engine is held up by half a second: who was in it shows it, nobody else does, and the p99 moves.

A few requests at a time, all sampled, go on for some seconds; then the same again, and in the middle of it a step is
told to take 0.5 s longer. Spans are held to each other, and a real Prometheus is asked what the dashboard asks: the
99th percentile of the time from token to token. --quick: the fake engine instead of the model.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from octavo.metrics import TIME_PER_OUTPUT_TOKEN
from octavo.names import Span as SpanName

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure, ratio
from load_tests.prometheus import SCRAPE_S, Prometheus, is_installed, panel_questions, scraping
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import serving
from load_tests.rigs.telemetry_trees import EXPORT_S
from load_tests.rigs.traced_asks import Asker, asking
from load_tests.slow_steps import hold_up, members, slow_steps, wrongly_told
from load_tests.span_collector import Span, SpanCollector
from load_tests.trace_trees import SERVERS, Answer, trees_of

STALL_S: Final = 0.5
AT_ONCE: Final = 8
CHARACTERS, TOKENS = 120, 8
WARM_S: Final = 1.0
QUIET_S: Final = 20.0
"""Before each round, so that a panel's window has nothing of what was before."""
MODEL = 'model = "default"\n[engine]\n'
QUICK = 'model = "fake"\n[engine]\nengine = "fake"\nfake_step_s = 0.01\n'


async def measure(settings: Settings, notes: Notes) -> None:
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as name, SpanCollector() as collector:
        folder = Path(name)
        stall = folder / "stall"
        config = (QUICK if settings.is_quick else MODEL) + f'stall_file = "{stall}"\n'
        async with (
            serving(config, variables=collector.variables) as cluster,
            asking(cluster.address) as asker,
            _prometheus(cluster.ready["metrics"], folder) as prometheus,
        ):
            await _load(asker, WARM_S, None)
            await asyncio.to_thread(collector.await_spans, lambda spans: len(spans) > 0, EXPORT_S)
            for _ in settings.rounds():
                await asyncio.sleep(QUIET_S if prometheus is not None else 2 * SCRAPE_S)
                num_before = len(collector.spans())
                answers, _ = await _load(asker, settings.seconds(6.0, 4.0), None)
                before = await _p99(prometheus)
                others, at_ns = await _load(asker, settings.seconds(4.0, 3.0), stall)
                after = await _p99(prometheus)
                answers += others
                spans = await asyncio.to_thread(_all_spans, collector, answers, num_before)
                note(notes, answers, spans, at_ns, p99=(before, after))


@asynccontextmanager
async def _prometheus(target: str, folder: Path) -> AsyncIterator[Prometheus | None]:
    if not is_installed():
        print("slow_step: the program `prometheus` is not installed", file=sys.stderr)
        yield None
        return
    with scraping(target, folder) as prometheus:
        yield prometheus


async def _load(asker: Asker, duration_s: float, stall: Path | None) -> tuple[list[Answer], int]:
    """Ask for so long, some at once; in the middle of it have a step held up by writing `stall`. Return the answers and
    when that was, in nanoseconds since 1970."""
    end, answers = time.monotonic() + duration_s, list[Answer]()

    async def go_on(number: int) -> None:
        while time.monotonic() < end:
            way = ("session", "generate")[number % 2]
            answers.append(await asker.ask(way, characters=CHARACTERS + 10 * number, num_tokens=TOKENS))

    async def meddle() -> int:
        if stall is None:
            return 0
        await asyncio.sleep(duration_s / 2)
        return await hold_up(stall, STALL_S)

    at_ns, *_ = await asyncio.gather(meddle(), *(go_on(number) for number in range(AT_ONCE)))
    return answers, at_ns or 0


async def _p99(prometheus: Prometheus | None) -> float | None:
    """Return what the overview shows, in seconds, once all is scraped."""
    if prometheus is None:
        return None
    await asyncio.sleep(2.5 * SCRAPE_S)
    name = f"{TIME_PER_OUTPUT_TOKEN.text_name}_bucket"
    (question,) = [
        each
        for each in panel_questions()
        if each.where == "overview" and name in each.expression and "0.99" in each.expression
    ]
    series = await asyncio.to_thread(prometheus.ask, question.expression)
    return series[0].points[-1][1] if series else None


def _all_spans(collector: SpanCollector, answers: list[Answer], num_before: int) -> list[Span]:
    """Return the spans after the first `num_before`, once those of all answers are there."""
    wanted = {answer.trace_id for answer in answers}

    def is_whole(spans: list[Span]) -> bool:
        new = spans[num_before:]
        names = (*SERVERS, SpanName.DECODE)
        return sum(span.name in names and span.trace_id in wanted for span in new) >= 2 * len(wanted)

    collector.await_spans(is_whole, EXPORT_S)
    time.sleep(1.0)  # steps come in messages of their own
    return collector.spans()[num_before:]


def note(
    notes: Notes, answers: list[Answer], spans: list[Span], at_ns: int, p99: tuple[float | None, float | None]
) -> None:
    """`p99`: before and after the step that was held up at `at_ns`."""
    before, after = p99
    trees, no_trees = trees_of(answers, spans)
    whole = list(trees.values())
    slow = slow_steps(spans, STALL_S, at_ns)
    for step in slow:
        print(f"slow_step: a step took {step.duration_s:.3f} s with {len(step.links)} members", flush=True)
    notes.add(
        "slow_step",
        sent=len(answers),
        ended=len(answers),
        spans=len(spans),
        no_trees=len(no_trees),
        slow_steps=len(slow),
        members=sum(len(members(step, whole)) for step in slow),
        wrongly_told=sum(len(wrongly_told(step, whole)) for step in slow),
        p99_before_s=before,
        p99_after_s=after,
        p99_ratio=ratio(after, before),
    )


def judge(notes: Notes) -> list[Bar]:
    slow, rounds = notes.of("slow_step", "slow_steps"), len(notes.of("slow_step", "sent"))
    asked = (
        f"{notes.total('slow_step', 'sent') or 0:.0f} requests, {notes.total('slow_step', 'members') or 0:.0f} in it"
    )
    p99 = [figure(notes.median("slow_step", name), "s") for name in ("p99_before_s", "p99_after_s")]
    ratios = notes.of("slow_step", "p99_ratio")
    return [
        at_most("slow_step: requests without a whole tree", notes.total("slow_step", "no_trees"), 0),
        at_most(
            "slow_step: rounds in which not exactly one step shows it",
            sum(number != 1 for number in slow) if slow else None,
            0,
            f"{rounds} rounds",
        ),
        at_least(
            "slow_step: requests in the step that was held up", min(notes.of("slow_step", "members"), default=None), 1
        ),
        at_most(
            "slow_step: requests that show it and were not in it, or the other way round",
            notes.total("slow_step", "wrongly_told"),
            0,
            asked,
        ),
        at_least(
            "slow_step: p99 of the time from token to token, as a multiple of that before",
            statistics.median(ratios) if len(ratios) == rounds and ratios else None,
            1.5,
            " -> ".join(p99) + "; rounds " + ", ".join(f"{each:.2f}" for each in ratios),
        ),
    ]


if __name__ == "__main__":
    sys.exit(main("telemetry_slow_step", measure, judge))
