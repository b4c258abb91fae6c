"""200 requests at once, and their spans: one whole tree each, every batch and step linked to all its members.

Half of them over Session, half over Generate, with prompts of text of many lengths; all are sampled. What is counted in
the spans must be what the answers' usage says. --quick: the fake engine instead of the model.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
import urllib.request
from typing import Final

from octavo.names import Span as SpanName

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import serving
from load_tests.rigs.traced_asks import Asker, asking
from load_tests.span_collector import Span, SpanCollector
from load_tests.trace_trees import SERVERS, Answer, Tree, miscounted, trees_of, unlinked_batches, unlinked_steps

NUM_REQUESTS: Final = 200
CHARACTERS: Final = (20, 900)
TOKENS: Final = (2, 40)
EXPORT_S: Final = 30.0
"""For the spans to come; they need a second."""
MAX_SHOWN: Final = 5
"""Of what is wrong."""
CONFIG = 'model = "default"\n[replicas]\nnum_replicas = 1\n'
QUICK = 'model = "fake"\n[engine]\nengine = "fake"\nfake_step_s = 0.01\n'


async def measure(settings: Settings, notes: Notes) -> None:
    with SpanCollector() as collector:
        async with serving(QUICK if settings.is_quick else CONFIG, variables=collector.variables) as cluster:
            async with asking(cluster.address) as asker:
                await asker.ask("session", characters=50, num_tokens=4)
                await asyncio.to_thread(collector.await_spans, lambda spans: _num_roots(spans) == 1, EXPORT_S)
                num_before = len(collector.spans())
                began = time.monotonic()
                answers = await asyncio.gather(*(_ask(asker, number) for number in range(NUM_REQUESTS)))
                wall_s = time.monotonic() - began
            await asyncio.to_thread(collector.await_spans, lambda spans: _num_roots(spans) > NUM_REQUESTS, EXPORT_S)
            await asyncio.sleep(2.0)  # what the replica exports comes in a message of its own
            num_dropped = await asyncio.to_thread(dropped, cluster.ready["metrics"])
        note(notes, answers, collector.spans()[num_before:], wall_s=wall_s, num_dropped=num_dropped)


async def _ask(asker: Asker, number: int) -> Answer:
    characters = CHARACTERS[0] + (CHARACTERS[1] - CHARACTERS[0]) * number // NUM_REQUESTS
    num_tokens = TOKENS[0] + (number * 7) % (TOKENS[1] - TOKENS[0])
    return await asker.ask(("session", "generate")[number % 2], characters=characters, num_tokens=num_tokens)


def _num_roots(spans: list[Span]) -> int:
    return sum(span.name in SERVERS for span in spans)


def dropped(address: str) -> float:
    """Return how many spans all processes of a cluster have lost, by their metrics."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("octavo_telemetry_dropped_spans"))


def note(notes: Notes, answers: list[Answer], spans: list[Span], *, wall_s: float, num_dropped: float) -> None:
    """Judge the spans by the answers."""
    trees, no_trees = trees_of(answers, spans)
    whole: list[Tree] = list(trees.values())
    wrong_counts = [text for a in answers if a.trace_id in trees for text in miscounted(a, trees[a.trace_id])]
    wrong_batches, wrong_steps = unlinked_batches(whole, spans), unlinked_steps(whole, spans)
    for text in [each for found in (no_trees, wrong_counts, wrong_batches, wrong_steps) for each in found[:MAX_SHOWN]]:
        print(f"trees: {text}", file=sys.stderr)
    coverages, leaves = [tree.coverage() for tree in whole], [tree.leaf_coverage for tree in whole]
    notes.add(
        "trees",
        sent=NUM_REQUESTS,
        ended=len(answers),
        wall_s=round(wall_s, 2),
        tokens=sum(answer.num_generated for answer in answers),
        spans=len(spans),
        steps=sum(span.name == SpanName.STEP for span in spans),
        batches=sum(span.name == SpanName.BATCH for span in spans),
        links=sum(len(span.links) for span in spans),
        trees=len(whole),
        no_trees=len(no_trees),
        wrong_counts=len(wrong_counts),
        wrong_batches=len(wrong_batches),
        wrong_steps=len(wrong_steps),
        dropped=num_dropped,
        coverage_least=min(coverages, default=None),
        leaf_coverage_least=min(leaves, default=None),
        leaf_coverage_median=statistics.median(leaves) if leaves else None,
    )


def judge(notes: Notes) -> list[Bar]:
    def total(figure: str) -> float | None:
        return notes.total("trees", figure)

    requests = f"{total('tokens') or 0:.0f} tokens, {total('spans') or 0:.0f} spans"
    steps = f"{total('steps') or 0:.0f} steps, {total('links') or 0:.0f} links, of batches too"
    least = notes.of("trees", "leaf_coverage_least")
    return [
        at_least("trees: requests with exactly one whole tree", total("trees"), NUM_REQUESTS, requests),
        at_most("trees: counts of tokens that are not the usage's", total("wrong_counts"), 0),
        at_most("trees: batches that lack a member", total("wrong_batches"), 0, f"{total('batches') or 0:.0f} batches"),
        at_most("trees: steps that lack a member", total("wrong_steps"), 0, steps),
        at_least(
            "trees: least part of a server span that its children cover",
            min(notes.of("trees", "coverage_least"), default=None),
            0.95,
        ),
        at_least(
            "trees: the same without the dispatch, which the replica's spans explain: median",
            notes.median("trees", "leaf_coverage_median"),
            0.95,
            f"least {figure(min(least, default=None))}; the rest is on the way between router and replica",
        ),
        at_most("trees: spans lost on the way", total("dropped"), 0),
    ]


if __name__ == "__main__":
    sys.exit(main("telemetry_trees", measure, judge))
