"""What one engine step computes, and what came of it: the values between the scheduler and a runner.

    plan = scheduler.schedule()          decide
    ticket = runner.launch(plan)         apply
    scheduler.commit(plan, output)       account

A runner reads of a `Sequence` only: tokens, num_prompt_tokens, block_table, sampling, constraint, adapter, banned_at,
num_logprobs. It never writes to one. Knows no requests, no clock, no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from workers.types import TokenLogprobs

if TYPE_CHECKING:
    from workers.sequence import Sequence


class Chunk(NamedTuple):
    """One sequence's share of a step: compute the tokens at positions ``[start, start + num_tokens)``.

    Keys and values of positions below `start` are in the sequence's blocks; those of the chunk are written to
    ``block_table[position // block_size]`` at ``position % block_size``.

        tokens       0 ............ start .......... start + num_tokens ... len(tokens)
                     |-- in cache --|--- computed ---|
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether a next token is drawn from the logits of the chunk's last position."""
    draft: tuple[int, ...] = ()
    """Guesses at the tokens that follow. Only a chunk that samples has some, and only for a runner that verifies them.
    They are computed as if they were tokens of the sequence, behind those of the chunk:

        tokens       0 ............ start .......... start + num_tokens .......... + len(draft)
                     |-- in cache --|--- computed ---|----- draft, computed -----|

    and a token is drawn for each position from ``start + num_tokens`` to ``start + num_tokens + len(draft)``, each as
    if the draft before it were right (its tokens count for penalties; `banned_at` and the seed go by its position);
    what `accepted` leaves of the drawn ones is the chunk's output. So tokens are the same with any draft and without.
    """

    @property
    def num_rows(self) -> int:
        """How many tokens go through the model."""
        return self.num_tokens + len(self.draft)


@dataclass(frozen=True, slots=True)
class StepPlan:
    number: int
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks (from, to) whose keys and values are copied before anything of this step is written."""

    @property
    def num_tokens(self) -> int:
        """Rows, those of drafts too: what the step's budget counts."""
        return sum([chunk[2] for chunk in self.chunks]) + sum([len(chunk[4]) for chunk in self.chunks if chunk[4]])


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Aligned with `StepPlan.chunks`. A chunk that does not sample has no tokens; one that does has one or more."""

    tokens: Seq[tuple[int, ...]]
    logprobs: Seq[tuple[TokenLogprobs, ...]] = ()
    """Of each token of a sequence that has `num_logprobs`, else (); all () may be left out."""
    errors: Mapping[int, Exception] = field(default_factory=dict)
    """By chunk: why its sequence, and no other, cannot go on; it has no tokens."""
    pooled: Seq[tuple[float, ...]] = ()


class Ticket(Protocol):
    """A launched step."""

    @property
    def plan(self) -> StepPlan: ...

    def output(self) -> StepOutput:
        """Wait for the step and return what it produced."""


class Runner(Protocol):
    """The device side of an engine: holds weights and the KV cache. `verifies_drafts` says what else it may have."""

    def launch(self, plan: StepPlan) -> Ticket: ...

    def close(self) -> None: ...


def verifies_drafts(runner: Runner) -> bool:
    """Whether `runner` can be given chunks with a `draft`: it says so by an attribute of this name."""
    return bool(getattr(runner, "verifies_drafts", False))


def accepted(draft: Seq[int], drawn: Seq[int]) -> tuple[int, ...]:
    """Return the tokens that a verified draft brings: those drawn up to, and with, the first that was guessed wrong.

    ``drawn[i]`` was drawn as if ``draft[:i]`` were right; there is one more of them than of the draft.
    """
    assert len(drawn) == len(draft) + 1
    num_right = next((i for i, token in enumerate(draft) if token != drawn[i]), len(draft))
    return tuple(drawn[: num_right + 1])


class Proposer(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, tokens: Seq[int], limit: int) -> Seq[int]:
        """Return at most `limit` tokens that may follow `tokens`, which are those of the last call and more."""


class Constraint(Protocol):
    """What a sequence may say next (grammar, schema). Rebuilt after a preemption or resume by replaying the answer."""

    def mask(self) -> Seq[int]:
        """Return the token ids that are allowed next."""

    def advance(self, token_id: int) -> None: ...
