"""The quick way through a step for sequences that decode, most of its rows: a token each, of which nothing is decided.

A sequence is *quiet* below its `quiet_until`: its next token goes into a block that it has for itself, and the answer
is not complete with it. Whatever changes that (its block is shared, it gives its blocks back, a token is taken back)
sets `quiet_until` to 0, and the slow way, which is the rule, finds out how far it is quiet again. Both ways have the
same effects; this one is written out, since it runs once for each token of an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

from workers.plan import Chunk, StepOutput, StepPlan
from workers.sequence import Sequence
from workers.tables import BlockTables
from workers.types import TokenDelta, TokenLogprobs

_new = tuple.__new__
"""Makes a named tuple of all its fields in half the time that its own constructor takes."""

CommitChunk = Callable[[Chunk, tuple[int, ...], tuple[TokenLogprobs, ...]], None]


def plan_decodes(running: list[Sequence], tables: BlockTables, chunks: list[Chunk], prefills: list[Sequence]) -> int:
    """Plan a token for every running sequence that lacks one only, and note those that lack more; return how many
    decode. There is a block for each."""
    add, block_size = chunks.append, tables.block_size
    num_before = len(chunks)
    for sequence in running:
        start = sequence.num_scheduled
        if start < sequence.quiet_until:
            sequence.num_scheduled = start + 1
            sequence.num_placeholders += 1
        elif (num_tokens := sequence.num_to_schedule) == 1:
            has_block = tables.extend(sequence, 1)
            assert has_block
            samples = sequence.schedule(1)
            assert samples
            if sequence.constraint is None and sequence.proposer is None:
                sequence.quiet_until = min((start // block_size + 1) * block_size, sequence.max_stored_tokens)
        else:
            if num_tokens:
                prefills.append(sequence)
            continue
        add(_new(Chunk, (sequence, start, 1, True, ())))
    return len(chunks) - num_before


def commit_chunks(
    plan: StepPlan, output: StepOutput, deltas: list[TokenDelta], tables: BlockTables, commit_chunk: CommitChunk
) -> None:
    """Account for what `plan` computed, in its order: a token of a quiet sequence becomes a delta here, everything else
    goes to `commit_chunk`."""
    add, block_size = deltas.append, tables.block_size
    logprobs_of_all = output.logprobs or repeat((), len(plan.chunks))
    for chunk, tokens, logprobs in zip(plan.chunks, output.tokens, logprobs_of_all, strict=True):
        sequence, start, num_tokens, _, _ = chunk
        end = start + 1
        if (
            start < sequence.quiet_until
            and end < sequence.max_stored_tokens
            and num_tokens == 1
            and len(tokens) == 1
            and start == sequence.num_computed  # or else this was rolled back while it was in flight
            and sequence.first_token_at is not None
            and not logprobs
            and tokens[0] not in sequence.stop_token_ids
        ):
            sequence.tokens.append(tokens[0])
            sequence.num_computed = end
            sequence.num_placeholders -= 1
            if not end % block_size:
                tables.publish(sequence, start)
            add(_new(TokenDelta, (sequence.work.work_id, sequence.index, tokens, (), None, None, ())))
        else:
            commit_chunk(chunk, tokens, logprobs)
