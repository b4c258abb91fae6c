"""Holds spans to what answers say: one whole tree a request, batches and steps linked to all their members. Pure.

    server span ── accept · queue · dispatch · deliver        what no child covers is time that nobody can explain
                                    └─ engine.queue · prefill · decode
    batch ──link──► dispatch ◄──link── step

Of requests that were answered at the first attempt; what is found wrong is said in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from octavo.names import Attribute
from octavo.names import Span as SpanName

from load_tests.span_collector import Span

SERVERS = (SpanName.GENERATE, SpanName.SESSION_REQUEST)
BELOW_SERVER = (SpanName.ACCEPT, SpanName.QUEUE, SpanName.DISPATCH, SpanName.DELIVER)
BELOW_DISPATCH = (SpanName.ENGINE_QUEUE, SpanName.PREFILL, SpanName.DECODE)
PARTS = (*BELOW_SERVER, *BELOW_DISPATCH)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client has of a request, by its usage; `trace_id` is the one that it sent."""

    trace_id: str
    parent_id: str
    num_prompt: int
    num_cached: int
    num_generated: int


@dataclass(frozen=True, slots=True)
class Tree:
    """The spans of one request. `parts` by name, those of `PARTS`."""

    server: Span
    parts: dict[str, Span]

    def coverage(self, names: Iterable[str] = BELOW_SERVER) -> float:
        """Return the share of the server span that spans of these names cover, overlaps counted once."""
        server, covered, until = self.server, 0, self.server.start_ns
        for span in sorted((self.parts[name] for name in names), key=lambda span: span.start_ns):
            start, end = max(span.start_ns, until), min(span.end_ns, server.end_ns)
            covered += max(0, end - start)
            until = max(until, end)
        return covered / max(1, server.end_ns - server.start_ns)

    @property
    def leaf_coverage(self) -> float:
        """The same without the dispatch, which the replica's spans have to explain."""
        return self.coverage(name for name in PARTS if name != SpanName.DISPATCH)


class TreeError(Exception):
    """A request has no tree, more than one, or not a whole one."""


def tree_of(answer: Answer, spans: Sequence[Span]) -> Tree:
    """Return a request's tree; `spans` are all of its trace. Raises TreeError."""
    servers = [span for span in spans if span.name in SERVERS and span.parent_id == answer.parent_id]
    if len(servers) != 1:
        raise TreeError(f"{len(servers)} server spans")
    (server,) = servers
    parts: dict[str, Span] = {}
    for name in PARTS:
        found = [span for span in spans if span.name == name]
        if len(found) != 1:
            raise TreeError(f"{len(found)} spans {name}")
        parent = server if name in BELOW_SERVER else parts[SpanName.DISPATCH]
        if found[0].parent_id != parent.span_id:
            raise TreeError(f"{name} is not below {parent.name}")
        parts[name] = found[0]
    if others := {span.name for span in spans} - {server.name, *PARTS}:
        raise TreeError(f"spans that nobody knows: {sorted(others)}")
    return Tree(server, parts)


def trees_of(answers: Iterable[Answer], spans: Iterable[Span]) -> tuple[dict[str, Tree], list[str]]:
    """Return the trees by trace id, and what is wrong with those that are none."""
    by_trace: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span)
    trees, wrong = {}, []
    for answer in answers:
        try:
            trees[answer.trace_id] = tree_of(answer, by_trace[answer.trace_id])
        except TreeError as error:
            wrong.append(f"{answer.trace_id}: {error}")
    return trees, wrong


def miscounted(answer: Answer, tree: Tree) -> Iterator[str]:
    """Yield where a tree counts tokens otherwise than the answer's usage."""
    prefill, decode = tree.parts[SpanName.PREFILL], tree.parts[SpanName.DECODE]
    for span, attribute, expected in (
        (tree.server, Attribute.INPUT_TOKENS, answer.num_prompt),
        (tree.server, Attribute.CACHED_INPUT_TOKENS, answer.num_cached),
        (tree.server, Attribute.OUTPUT_TOKENS, answer.num_generated),
        (prefill, Attribute.INPUT_TOKENS, answer.num_prompt),
        (prefill, Attribute.CACHED_INPUT_TOKENS, answer.num_cached),
        (decode, Attribute.OUTPUT_TOKENS, answer.num_generated),
    ):
        if span.attributes.get(attribute) != expected:
            told = span.attributes.get(attribute)
            yield f"{answer.trace_id}: {span.name} says {told} of {attribute}, the usage {expected}"


def unlinked_batches(trees: Iterable[Tree], spans: Iterable[Span]) -> list[str]:
    """Return what is wrong with batches: each dispatch is a member of exactly one, whose number it has, and each batch
    has as many links as requests. All requests of the batches are among the trees."""
    batches = [span for span in spans if span.name == SpanName.BATCH]
    members = Counter(link for batch in batches for link in batch.links)
    dispatches = {tree.parts[SpanName.DISPATCH].span_id: tree.parts[SpanName.DISPATCH] for tree in trees}
    wrong = [f"dispatch {key} is linked by {members[key]} batches" for key in dispatches if members[key] != 1]
    for batch in batches:
        number, size = (batch.attributes[name] for name in (Attribute.BATCH_ID, Attribute.BATCH_REQUESTS))
        mine = [dispatches[link] for link in batch.links if link in dispatches]
        if not len(mine) == len(batch.links) == size:
            wrong.append(f"batch {number} of {size} has {len(batch.links)} links, {len(mine)} of them known")
        wrong += [
            f"a dispatch of batch {span.attributes[Attribute.BATCH_ID]} is linked by batch {number}"
            for span in mine
            if span.attributes[Attribute.BATCH_ID] != number
        ]
    return wrong


def unlinked_steps(trees: Iterable[Tree], spans: Iterable[Span]) -> list[str]:
    """Return what is wrong with steps: each has as many links as sequences, and each request is linked by as many as it
    took part in, from the first to the last that its spans name. All sequences are of these trees, one for each."""
    steps = [span for span in spans if span.name == SpanName.STEP]
    by_member: dict[str, list[Span]] = defaultdict(list)
    for step in steps:
        for link in step.links:
            by_member[link].append(step)
    wrong = [
        f"step {step.attributes[Attribute.STEP]} of {step.attributes[Attribute.STEP_SEQUENCES]} has {len(step.links)}"
        for step in steps
        if not len(set(step.links)) == len(step.links) == step.attributes[Attribute.STEP_SEQUENCES]
    ]
    for tree in trees:
        dispatch = tree.parts[SpanName.DISPATCH]
        for part in (tree.parts[SpanName.PREFILL], tree.parts[SpanName.DECODE]):
            about = part.attributes
            if not about[Attribute.NUM_STEPS]:
                continue  # all its tokens came with the prompt's step
            first, last = about[Attribute.FIRST_STEP], about[Attribute.LAST_STEP]
            numbers = [step.attributes[Attribute.STEP] for step in by_member[dispatch.span_id]]
            inside = sorted(number for number in numbers if first <= number <= last)
            if len(inside) != about[Attribute.NUM_STEPS] or {inside[0], inside[-1]} != {first, last}:
                steps_of = f"{about[Attribute.NUM_STEPS]} steps from {first} to {last}"
                wrong.append(f"{dispatch.trace_id}: {part.name} of {steps_of} is linked by {len(inside)}")
    return wrong
