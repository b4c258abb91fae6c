"""One choice of a work while it lives in the engine: its tokens, its blocks, and how far it has come.

Owns the integers of its life, and asserts them: ``num_computed <= num_scheduled <= num_tokens``. Knows token ids, not
text; decides nothing: the scheduler does.

    tokens   prompt | received | generated | placeholders
             0 ........ num_computed ........ num_scheduled ........ num_tokens
             |- keys and values stored -|- in a launched step -|- to be scheduled -|

A placeholder stands for a token that a launched step will bring: `len(tokens)` does not count it, `num_tokens` does.
"""

from __future__ import annotations

from dataclasses import replace

from workers.plan import Constraint, Proposer
from workers.prefix import PrefixHasher
from workers.types import Finish, FinishReason, GenerateWork, SamplingParams


class Sequence:
    """Choice `index` of `work`. `arrival` orders sequences of equal priority; `arrived_at` is in seconds."""

    __slots__ = (
        "__weakref__",
        "_chain",
        "arrival",
        "arrived_at",
        "block_table",
        "constraint",
        "first_token_at",
        "index",
        "is_due",
        "is_ended",
        "leader",
        "max_stored_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_extra_steps",
        "num_idle_steps",
        "num_overtaken",
        "num_placeholders",
        "num_preemptions",
        "num_scheduled",
        "num_spared",
        "num_void",
        "proposer",
        "quiet_until",
        "rank",
        "sampling",
        "started_at",
        "stop_token_ids",
        "tokens",
        "work",
    )

    def __init__(
        self,
        work: GenerateWork,
        *,
        index: int = 0,
        arrival: int = 0,
        arrived_at: float = 0.0,
        constraint: Constraint | None = None,
        leader: Sequence | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        self.work = work
        self.index = index
        self.arrival = arrival
        received = work.received[index] if work.received else ()
        self.tokens: list[int] = [*work.prompt, *received]
        self.block_table: list[int] = []
        self.sampling: SamplingParams = (
            replace(work.sampling, seed=(work.sampling.seed + index) % 2**64) if index else work.sampling
        )
        self.leader = leader
        """The choice of the same work that computes the prompt for all; None: this one does."""
        assert constraint is None or proposer is None, "what a constraint allows is not known beyond the next token"
        self.proposer = proposer
        self.constraint = constraint
        if constraint is not None:
            for token in received:
                constraint.advance(token)
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_placeholders = 0
        self.quiet_until = 0
        """While `num_scheduled` is smaller, its next step is one token, into a block that is its own, and the answer is
        not complete by then: nothing is to be decided; see `workers.decoding`."""
        self.max_stored_tokens = len(work.prompt) + work.max_tokens - 1
        """How many tokens may come to have keys and values: all of prompt and answer but the last."""
        self.stop_token_ids = work.stop_token_ids
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache when it first ran; None before, and after it has been reported."""
        self.num_spared = 0
        """Tokens that it will hardly have to compute by itself, as it looked when it began to wait."""
        self.num_void = 0
        """Chunks in flight that were planned on tokens which have been taken back since."""
        self.num_preemptions = 0
        self.num_extra_steps = 0
        """Steps in which it took part, less the tokens that it generated: most steps bring it one."""
        self.num_idle_steps = 0
        """Steps in which it could have computed something and got nothing."""
        self.num_overtaken = 0
        """How many sequences of a lower rank were admitted while this one lacked blocks."""
        self.arrived_at = arrived_at
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.is_ended = False
        self.is_due = False
        """Whether it goes before all that are not; see `workers.precedence`, which sets it."""
        self.rank = self.own_rank
        """Who goes first: the smaller one. Its own rank, or that of one that waits for it."""
        self._chain: list[bytes] = []

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.work.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_placeholders

    @property
    def num_answer_tokens(self) -> int:
        """Received and generated tokens and placeholders: what `max_tokens` counts."""
        return self.num_tokens - len(self.work.prompt)

    @property
    def adapter(self) -> str:
        return self.work.adapter

    @property
    def own_rank(self) -> tuple[bool, int, int]:
        """A due sequence first, then by priority (lower goes first), then by arrival."""
        return (not self.is_due, self.work.priority, self.arrival)

    @property
    def is_in_flight(self) -> bool:
        """Whether a step that computes some of its tokens has been scheduled and not committed."""
        return self.num_scheduled > self.num_computed

    @property
    def num_to_schedule(self) -> int:
        """Tokens to compute before the next one can be drawn; 0 while nothing may be drawn: the answer has its tokens,
        or those of launched steps must be known first, which a constraint depends on and guesses follow."""
        # Asked of every sequence in every step: not by way of the other properties.
        if self.num_placeholders and (self.constraint is not None or self.proposer is not None):
            return 0
        num_tokens = len(self.tokens) + self.num_placeholders
        work = self.work
        return 0 if num_tokens - len(work.prompt) >= work.max_tokens else num_tokens - self.num_scheduled

    @property
    def num_logprobs(self) -> int | None:
        """None: its tokens go without log probabilities; k: with those of the k likeliest at their place."""
        return self.work.num_logprobs

    def banned_at(self, position: int) -> frozenset[int]:
        """Return the tokens that must not be drawn for `position`: stop tokens before `min_tokens` of the answer."""
        is_early = position < len(self.work.prompt) + self.work.min_tokens
        return self.work.stop_token_ids if is_early else frozenset()

    def finish(self, reason: FinishReason, now: float, error: tuple[str, str] = ("", "")) -> Finish:
        """Return why it ends now and where its time went. `error`: an `octavo.names.Reason` and a message."""
        started = now if self.started_at is None else self.started_at
        first = now if self.first_token_at is None else self.first_token_at
        received = self.work.received[self.index] if self.work.received else ()
        num_tokens = len(self.tokens) - len(self.work.prompt) - len(received)
        return Finish(
            reason=reason,
            stop_token_id=self.tokens[-1] if reason is FinishReason.STOP else None,
            error_reason=error[0],
            error_message=error[1],
            queue_s=started - self.arrived_at,
            prefill_s=first - started,
            decode_s=now - first,
            num_preemptions=self.num_preemptions,
            num_steps=num_tokens + self.num_extra_steps,
            num_tokens=num_tokens,
            ended_at=now,
        )

    def schedule(self, num_tokens: int) -> bool:
        """Account for a chunk of `num_tokens`; return whether a token is drawn from it."""
        self.num_scheduled += num_tokens
        known = len(self.tokens) + self.num_placeholders
        assert self.num_computed <= self.num_scheduled <= known
        samples = self.num_scheduled == known
        self.num_placeholders += samples
        return samples

    def draft(self, num_tokens: int) -> None:
        """Account for `num_tokens` guesses behind a chunk that samples."""
        assert self.num_scheduled == len(self.tokens)
        self.num_placeholders += num_tokens
        self.num_scheduled += num_tokens
        self.check()

    def start(self, num_computed: int) -> None:
        """Begin to run with the keys and values of `num_computed` tokens in its blocks."""
        assert not self.is_in_flight
        self.num_computed = self.num_scheduled = num_computed
        self.quiet_until = 0
        self.check()

    def commit(self, num_tokens: int, *, samples: bool, num_drafted: int = 0, num_accepted: int = 0) -> None:
        """Account for a chunk that has been computed: what is stored of `num_drafted` guesses is what was accepted."""
        self.num_computed += num_tokens + num_accepted
        self.num_scheduled -= num_drafted - num_accepted
        self.num_placeholders -= samples + num_drafted
        assert self.num_placeholders >= 0

    def append(self, token: int) -> FinishReason | None:
        """Add a generated token; return the reason if it is the last one."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.advance(token)
        return self.ending()

    def ending(self) -> FinishReason | None:
        """Return why the answer is complete as it stands; None if it is not."""
        work = self.work
        num_answer_tokens = len(self.tokens) - len(work.prompt)
        if self.tokens[-1] in work.stop_token_ids and num_answer_tokens > work.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_answer_tokens >= work.max_tokens else None

    def roll_back(self) -> None:
        """Forget what was computed beyond the last known token but one, so that a next token can be drawn. Chunks in
        flight, one for each placeholder, went on from what is forgotten: they are void."""
        self.num_void += self.num_placeholders
        self.num_placeholders = 0
        self.num_computed = min(self.num_computed, len(self.tokens) - 1)
        self.num_scheduled = self.num_computed
        self.quiet_until = 0
        self.check()

    def is_void(self) -> bool:
        """Say whether the chunk that comes back next is void; it counts as come back then."""
        if not self.num_void:
            return False
        self.num_void -= 1
        return True

    def block_hashes(self, hasher: PrefixHasher) -> list[bytes]:
        """Return the hashes of all full blocks of known tokens."""
        size, chain = hasher.block_size, self._chain
        if len(self.tokens) // size > len(chain):
            parent = chain[-1] if chain else hasher.root(self.work.salt, self.work.adapter)
            chain += hasher.blocks(parent, self.tokens[len(chain) * size :])
        return chain

    def check(self) -> None:
        """Assert the inequality of its life."""
        assert 0 <= self.num_computed <= self.num_scheduled <= self.num_tokens
