"""Accounts for what steps bring: tokens become part of their sequences, and deltas for whoever asked.

Owns the deltas that wait to be drained, and counts. Blocks are the tables' and ends the scheduler's to account for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from octavo.names import Reason

from workers import decoding
from workers.plan import Chunk, StepOutput, StepPlan
from workers.sequence import Sequence
from workers.tables import BlockTables
from workers.types import Finish, FinishReason, TokenDelta, TokenLogprobs


class Commits:
    """`end` is `Scheduler.end`: told of the last token of an answer."""

    def __init__(self, tables: BlockTables, end: Callable[..., None]) -> None:
        self._tables = tables
        self._end = end
        self._deltas: list[TokenDelta] = []
        self.num_computed_tokens = 0
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def drain(self) -> list[TokenDelta]:
        """Return the deltas since the last call, in order."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """See `Scheduler.commit`."""
        self.num_computed_tokens += plan.num_tokens
        self.num_generated_tokens += len(plan.chunks)  # a token each; what brings more or none says so
        decoding.commit_chunks(plan, output, self._deltas, self._tables, partial(self._commit_chunk, now))

    def emit(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        finish: Finish | None,
    ) -> None:
        """Add a delta of `sequence`."""
        index = sequence.index
        num_cached_tokens = None if index else sequence.num_cached_tokens
        sequence.num_cached_tokens = None
        self._deltas.append(TokenDelta(sequence.work.work_id, index, token_ids, logprobs, finish, num_cached_tokens))

    def _commit_chunk(
        self, now: float, chunk: Chunk, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
    ) -> None:
        sequence = chunk.sequence
        if sequence.is_ended or sequence.is_void():
            self.num_generated_tokens -= 1
            return
        assert chunk.start == sequence.num_computed
        accepted, reason, error = 0, None, ("", "")
        for token in tokens:
            try:
                reason = sequence.append(token)
            except Exception as own_error:  # its constraint's; nobody else shall suffer for it
                reason = FinishReason.ERROR
                error = (Reason.INTERNAL, f"the constraint of this request failed ({type(own_error).__name__})")
                break
            accepted += 1
            if reason is not None:
                break
        if accepted != 1:
            self.num_generated_tokens += accepted - 1
            sequence.num_extra_steps += 1 - accepted
        draft, num_stored = chunk.draft, 0
        if draft:
            num_stored = max(0, min(accepted - 1, len(draft)))
            assert tokens[:num_stored] == draft[:num_stored]
            self.num_drafted_tokens += len(draft)
            self.num_accepted_tokens += num_stored
        sequence.commit(chunk.num_tokens, samples=chunk.samples, num_drafted=len(draft), num_accepted=num_stored)
        if chunk.samples and not tokens:
            sequence.roll_back()
        self._tables.publish(sequence, chunk.start)
        if draft:
            self._tables.shrink(sequence)
        if accepted and sequence.first_token_at is None:
            sequence.first_token_at = now
        if reason is not None:
            self._end(sequence, reason, now, error=error, token_ids=tokens[:accepted], logprobs=logprobs[:accepted])
        elif accepted:
            self.emit(sequence, tokens, logprobs, None)
