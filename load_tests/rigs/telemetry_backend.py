"""A tracing back end takes a cluster's spans by OTLP over gRPC: asked by its API, it has every request's whole trace.

Arize Phoenix (load_tests/phoenix.py); without it the bars are missed, since nothing was measured. Under a minute.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from octavo.names import Span as Name

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes
from load_tests.phoenix import Phoenix, Span, is_installed, receiving
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import serving
from load_tests.rigs.telemetry_load import CONFIG, Load

ONCE: Final = (Name.SESSION_REQUEST, Name.ACCEPT, Name.DELIVER)
"""Spans that every answered request has once; the others once an attempt."""
EACH_ATTEMPT: Final = (Name.QUEUE, Name.DISPATCH, Name.ENGINE_QUEUE, Name.PREFILL, Name.DECODE)
ARRIVE_S = 60.0
"""For the last spans to be taken and stored."""
TRACED = 0.5
"""Of all requests, with every step that one of them is in: the back end stores some hundred spans a second."""
MIN_TRACES = 20


async def measure(settings: Settings, notes: Notes) -> None:
    if not is_installed():
        print("backend: Phoenix is not installed: bash load_tests/peers/phoenix.sh", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder, receiving(Path(folder)) as phoenix:
        variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": phoenix.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "500"}
        async with serving(CONFIG, variables=variables) as cluster, Load(cluster.address, traced=TRACED) as load:
            await asyncio.sleep(settings.seconds(15.0, 5.0))
        await asyncio.to_thread(note, phoenix, load.trace_ids, notes)


def note(phoenix: Phoenix, trace_ids: Sequence[str], notes: Notes) -> None:
    """Wait until all of these traces are whole, and note which are not."""
    give_up = time.monotonic() + ARRIVE_S
    while True:
        traces = phoenix.traces()
        broken = {each: fault for each in trace_ids if (fault := faults(traces.get(each, [])))}
        if not broken or time.monotonic() > give_up:
            break
        time.sleep(1.0)
    spans = Counter(span.name for trace in traces.values() for span in trace)
    notes.add("backend", traces=len(trace_ids), broken=sorted(broken.values()), spans=dict(spans))


def faults(trace: Sequence[Span]) -> str:
    """Say what a request's trace lacks of a whole tree, "" for nothing. Its root has a parent that is not here: the
    client's, which sends no spans."""
    counts = Counter(span.name for span in trace)
    attempts = max(counts[Name.DISPATCH], 1)
    wrong = [name for name in ONCE if counts[name] != 1]
    wrong += [name for name in EACH_ATTEMPT if counts[name] != attempts]
    ids = {span.span_id for span in trace}
    wrong += [f"{span.name} without parent" for span in trace if span.parent_id not in ids and span.name != ONCE[0]]
    return ", ".join(wrong)


def judge(notes: Notes) -> list[Bar]:
    broken = notes.of("backend", "broken")
    return [
        at_least("backend: requests whose traces were asked for", notes.total("backend", "traces"), MIN_TRACES),
        at_most(
            "backend: of them without a whole trace",
            sum(map(len, broken)) if broken else None,
            0,
            "; ".join(fault for faults_ in broken for fault in faults_)[:300],
        ),
    ]


if __name__ == "__main__":
    sys.exit(main("telemetry_backend", measure, judge))
