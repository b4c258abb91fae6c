"""Who goes before whom, so that nobody waits for ever.

Owns the ranks of sequences; the smaller one goes first: priority (lower first), then arrival, with two exceptions.

- *Due*: a sequence that got nothing in `MAX_IDLE_STEPS` steps, all its life counted, or was preempted `MAX_PREEMPTIONS`
  times goes before everybody until it ends. One at a time is due, of several the one that arrived first, so that low
  priorities under overload get one place, not all of them. While it lacks blocks nobody is admitted.
- *Inherited*: whoever fills a block, or computes a prompt, that a sequence of a smaller rank waits for goes as early as
  that one (no priority inversion).

The bound. Let L be the largest prompt + max_tokens, M how many may run at once, and e the sequences here that arrived
before S. Whatever arrives later, S ends within

    MAX_IDLE_STEPS + (MAX_PREEMPTIONS + 1) * L + (e + 1) * (M + 2) * L        steps:

until it is due it is idle, or computes what it may lose to a preemption; at most e others are due before it; and each
of these, and S, waits at most for one who fills its prefix (L) and for what runs to end (M * L: each step draws a token
for every sequence that decodes, and computes some of the first prompt that is not), then computes its own L. Blocks
that an outsider holds or fills, who is no sequence, are outside the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from operator import attrgetter

from workers.sequence import Sequence

MAX_IDLE_STEPS = 256
MAX_PREEMPTIONS = 8

by_rank = attrgetter("rank")


class Precedence:
    def __init__(self) -> None:
        self._due: Sequence | None = None
        self._heirs: list[Sequence] = []
        """Those whose rank is not their own."""
        self._may_be_overdue = False
        """Whether a sequence that runs may be: nobody is who got something in every step."""

    def settle(
        self, waiting: list[Sequence], running: list[Sequence], blocker: Callable[[Sequence], Hashable | None]
    ) -> None:
        """Rank all for the step to come, and bring both queues, sorted by rank before, into the new order.

        `blocker` says who computes right now what a waiting sequence waits for.
        """
        is_changed = bool(self._heirs)
        for heir in self._heirs:
            heir.rank = heir.own_rank
        self._heirs = []
        if (waiting or self._may_be_overdue) and (self._due is None or self._due.is_ended):
            overdue = [
                s
                for s in chain(waiting, running)
                if s.num_idle_steps >= MAX_IDLE_STEPS or s.num_preemptions >= MAX_PREEMPTIONS
            ]
            self._due = min(overdue, key=lambda s: s.arrival, default=None)
            self._may_be_overdue = bool(overdue)
            if self._due is not None:
                self._due.is_due = is_changed = True
                self._due.rank = self._due.own_rank
        if is_changed:
            waiting.sort(key=by_rank)
            running.sort(key=by_rank)
        if self._inherit(waiting, running, blocker):
            waiting.sort(key=by_rank)
            running.sort(key=by_rank)

    def count(self, served: Iterable[Sequence], waiting: Iterable[Sequence], running: Iterable[Sequence]) -> None:
        """Count a step against all that wanted some of it and got nothing; `served` got something."""
        self._may_be_overdue = True
        lucky = set(map(id, served))
        for sequence in waiting:
            sequence.num_idle_steps += 1
        for sequence in running:
            if id(sequence) not in lucky and sequence.num_to_schedule:
                sequence.num_idle_steps += 1

    def _inherit(
        self, waiting: list[Sequence], running: list[Sequence], blocker: Callable[[Sequence], Hashable | None]
    ) -> bool:
        """Pass ranks on to whoever is waited for; return whether there was one with a larger rank."""
        last = running[-1].rank if running else None
        for sequence in waiting:
            if not sequence.is_due and (last is None or sequence.rank > last):
                break  # all that run go before it, and before all that follow
            filler = blocker(sequence)
            if isinstance(filler, Sequence) and filler.rank > sequence.rank:
                filler.rank = sequence.rank
                self._heirs.append(filler)
        return bool(self._heirs)
