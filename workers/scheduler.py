"""Decides what each step computes, and accounts for what came of it.

Owns the sequences that wait and those that run, and says who gets blocks and who loses them. Knows no clock (`now` is
an argument), no device and no requests. A sequence is waiting (holds no block), running (holds the blocks of all its
known tokens) or ended.

A step has a budget of tokens: every running sequence that decodes gets one, chunks of prompts fill the rest, those of
running and of new sequences in one order of rank: priority, then arrival (`workers.precedence` sees that nobody waits
for ever). A new sequence is admitted when the blocks of all its tokens are there at once; a decode that finds no block
takes those of the running sequence with the last rank, which waits again and is recomputed. With `reserve` a sequence
is admitted when the blocks of its longest possible answer are there, and nothing is ever preempted.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from heapq import merge

from workers import decoding
from workers.blocks import BlockPool
from workers.commits import Commits
from workers.pace import PrefillPace
from workers.plan import Chunk, StepOutput, StepPlan
from workers.precedence import Precedence, by_rank
from workers.prefix import PrefixHasher
from workers.sequence import Sequence
from workers.tables import BlockTables
from workers.types import FinishReason, TokenLogprobs

MAX_OVERTAKES = 64
"""How many sequences of a lower rank may pass one that lacks blocks; then nobody passes it any more."""


class Scheduler:
    """Schedules onto `pool`; not thread safe. Deltas pile up in `commits`. `prefill_interval`: see `PrefillPace`."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        hasher: PrefixHasher,
        chunk_tokens: int,
        max_num_sequences: int,
        prefix_cache: bool = True,
        reserve: bool = False,
        prefill_interval: Callable[[], int] = lambda: 1,
    ) -> None:
        self._tables = BlockTables(pool, hasher, prefix_cache=prefix_cache, reserve=reserve)
        self._reserve = reserve
        self._chunk_tokens = chunk_tokens
        self._max_running = min(max_num_sequences, chunk_tokens)
        """So that every running sequence can decode in every step."""
        self._precedence = Precedence()
        self.waiting: list[Sequence] = []
        """By rank, like `running`."""
        self.running: list[Sequence] = []
        self.is_short_of_blocks = False
        """Whether a sequence waited in the last step because blocks were missing."""
        self._may_admit = True
        """Whether more sequences may be admitted in the step that is being planned."""
        self._pace = PrefillPace(prefill_interval, chunk_tokens)
        self._next_deadline = math.inf
        """No sequence has an earlier one."""
        self.num_steps = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        """In tokens: those of prompts whose first step was planned."""
        self.prefix_cache_hits = 0
        self.commits = Commits(self._tables, self.end)

    @property
    def owed_prefill_tokens(self) -> int:
        """Known tokens of accepted sequences that must be computed before their next token; of those that wait, without
        what was cached when they came or is computed for another."""
        owed = (len(s.tokens) - s.num_computed for s in self.running if not s.quiet_until)
        waiting = (max(s.num_tokens - s.num_spared, 1) for s in self.waiting)
        return sum(waiting) + sum(n for n in owed if n > 1)  # 1: it decodes

    def refusal(self, sequence: Sequence) -> str | None:
        """Return why this sequence could never run, in words for its client; None if it could run alone."""
        return self._tables.refusal(sequence)

    def add(self, sequence: Sequence) -> None:
        """Let `sequence` wait for its first step. It has a `refusal` of None and is not complete."""
        if sequence.work.deadline is not None:
            self._next_deadline = min(self._next_deadline, sequence.work.deadline)
        self._wait(sequence)

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        error: tuple[str, str] = ("", ""),
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Emit the last delta of `sequence` and free all that it holds. Ended already: no effect. `error` is one of
        `octavo.names.Reason` and a message."""
        if sequence.is_ended:
            return
        self._tables.release(sequence)
        self._tables.unclaim(sequence)
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.is_ended = True
        sequence.quiet_until = 0
        self.commits.emit(sequence, token_ids, logprobs, sequence.finish(reason, now, error))

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step. The caller launches the plan, unless it is empty, and then commits it."""
        self._expire(now)
        self._precedence.settle(self.waiting, self.running, self._tables.blocker)
        self.is_short_of_blocks = False
        self._may_admit = True
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        budget, num_decodes = self._decode(chunks, prefills), len(chunks)
        if prefills or not num_decodes or self._pace.admits(self.waiting):
            budget = self._prefill(now, budget, prefills, chunks)
        self._pace.count(has_prefill=len(chunks) > num_decodes)
        self._draft(budget, chunks)
        if chunks:
            self.num_steps += 1
            if self.waiting or len(chunks) < len(self.running):
                self._precedence.count((chunk.sequence for chunk in chunks), self.waiting, self.running)
        return StepPlan(self.num_steps, tuple(chunks), self._tables.begin_copies(self.num_steps))

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """Account for what `plan` computed. Sequences that ended meanwhile are passed over.

        A chunk that samples brings one token; several if the runner verified a draft; none if it took a token back,
        which is then drawn again.
        """
        self.end_copies(plan)
        self.commits.commit(plan, output, now)

    def end_copies(self, plan: StepPlan) -> None:
        """Let go of the blocks that `plan` copied from. `commit` does it; call it for a plan that failed."""
        self._tables.end_copies(plan.number)

    def check_integrity(self) -> None:
        """Assert all that must hold between steps, here and in the pool, whose only holders are these sequences."""
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=by_rank)
            assert not any(s.is_ended for s in queue)
        for s in self.waiting:
            assert not s.block_table
            assert s.num_computed == s.num_scheduled == 0
        for s in self.running:
            s.check()
        assert len(self.running) <= self._max_running
        self._tables.check_integrity(self.running)

    def _expire(self, now: float) -> None:
        if now < self._next_deadline:
            return
        next_deadline = math.inf
        for sequence in [*self.waiting, *self.running]:
            deadline = math.inf if sequence.work.deadline is None else sequence.work.deadline
            if deadline <= now:
                self.end(sequence, FinishReason.DEADLINE, now)
            else:
                next_deadline = min(next_deadline, deadline)
        self._next_deadline = next_deadline

    def _decode(self, chunks: list[Chunk], prefills: list[Sequence]) -> int:
        """Plan a token for every running sequence that lacks one only, and note those that lack more; return what is
        left of the budget."""
        if self._tables.has_room_for(len(self.running)):
            return self._chunk_tokens - decoding.plan_decodes(self.running, self._tables, chunks, prefills)
        decodes: list[Sequence] = []
        for sequence in self.running:
            num_tokens = sequence.num_to_schedule
            if num_tokens == 1:
                decodes.append(sequence)
            elif num_tokens:
                prefills.append(sequence)
        for sequence in decodes:
            if not sequence.block_table:
                continue  # preempted a moment ago
            if self._tables.extend(sequence, 1) or self._provide(sequence, 1):
                chunks.append(self._chunk(sequence, 1))
            elif sequence.block_table and not self._reserve:
                break  # the blocks of all that follow are in flight: let them land, so that they can be taken
        return self._chunk_tokens - len(decodes)

    def _prefill(self, now: float, budget: int, prefills: list[Sequence], chunks: list[Chunk]) -> int:
        """Plan what is left of prompts, those of waiting sequences too, in order of rank; return what is left of the
        budget. `prefills` may have been preempted meanwhile."""
        has_places = self._may_admit and len(self.running) < self._max_running
        overtaken: list[Sequence] = []
        running = [s for s in prefills if s.block_table]
        for sequence in merge(running, list(self.waiting) if has_places else (), key=by_rank):
            if budget == 0:
                break
            if sequence.block_table:
                is_ready = self._provide(sequence, min(sequence.num_to_schedule, budget))
            else:
                is_ready = self._may_admit and self._admit(sequence, now, overtaken)
            if is_ready:
                chunk = self._chunk(sequence, min(sequence.num_to_schedule, budget))
                budget -= chunk.num_tokens
                chunks.append(chunk)
        return budget

    def _draft(self, budget: int, chunks: list[Chunk]) -> None:
        """Guess on, with what the budget has left after all else and with blocks that nobody needs soon."""
        for i, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if sequence.proposer is None or not chunk.samples:
                continue
            limit = min(budget, sequence.work.max_tokens - sequence.num_answer_tokens)
            draft = tuple(sequence.proposer.propose(sequence.tokens, limit)) if limit else ()
            draft = draft[: self._tables.extend_for_draft(sequence, len(draft), spare=len(self.running))]
            sequence.draft(len(draft))
            budget -= len(draft)
            chunks[i] = chunk._replace(draft=draft)

    def _provide(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get the blocks that the next `num_tokens` of a running sequence are written to; return whether it has them.
        If not, it may have been preempted."""
        while not self._tables.extend(sequence, num_tokens):
            if not self._make_room(sequence):
                return False
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt the running sequence of the last rank; return whether `sequence` itself still runs and room was made.

        One whose step is in flight is never taken, nor one that goes before `sequence`; `sequence` itself only if no
        other will be left to take when the steps in flight are over.
        """
        if self._reserve:
            return False
        is_any_in_flight = False
        for victim in reversed(self.running):
            if victim.rank < sequence.rank or (victim is sequence and is_any_in_flight):
                return False
            if not victim.is_in_flight:
                self._preempt(victim)
                return victim is not sequence
            is_any_in_flight = True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._tables.release(sequence)
        sequence.start(0)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.is_short_of_blocks = True
        self._may_admit = False
        self.running.remove(sequence)
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        self._tables.claim(sequence)
        insort(self.waiting, sequence, key=by_rank)

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start = sequence.num_scheduled
        return Chunk(sequence, start, num_tokens, sequence.schedule(num_tokens))

    def _admit(self, sequence: Sequence, now: float, overtaken: list[Sequence]) -> bool:
        """Let a waiting sequence run if there is a place and its blocks are there; return whether it does.

        `overtaken` are those of this step that lacked blocks.
        """
        if len(self.running) >= self._max_running:
            self._may_admit = False
            return False
        found = self._tables.find(sequence)
        if found is None:
            return False  # it waits for blocks that another sequence is computing
        # One block is left for each running sequence, so that they can go on without preempting this one at once.
        num_cached = self._tables.take(sequence, found, spare=0 if self._reserve else len(self.running))
        if num_cached is None:
            self.is_short_of_blocks = True
            self._may_admit = not (sequence.is_due or sequence.num_overtaken >= MAX_OVERTAKES)
            overtaken.append(sequence)
            return False
        for passed in overtaken:
            passed.num_overtaken += 1
        self._start(sequence, num_cached, now)
        return True

    def _start(self, sequence: Sequence, num_cached: int, now: float) -> None:
        """Make a waiting sequence with its blocks a running one."""
        sequence.start(num_cached)
        self._tables.unclaim(sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=by_rank)
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.prefix_cache_queries += sequence.num_prompt_tokens
            self.prefix_cache_hits += sequence.num_cached_tokens
