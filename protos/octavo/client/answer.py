"""What comes back from a cluster, as plain values: the pieces of an answer, its end and its accounts.

Knows how each value looks on the wire (`from_wire`), not how it got here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from octavo.v1 import types_pb2


class FinishReason(enum.StrEnum):
    """Why a choice ended: STOP (end of sequence, stop id or stop string), LENGTH (max_tokens or the context)."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    types_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


@dataclass(frozen=True, slots=True)
class Finish:
    """Why one choice ended, and for STOP what matched; neither set: the model's end-of-sequence token."""

    reason: FinishReason
    stop: str | None = None
    stop_token_id: int | None = None

    @classmethod
    def from_wire(cls, finish: types_pb2.Finish) -> Finish:
        matched = finish.WhichOneof("matched")
        return cls(
            _FINISH_REASONS.get(finish.reason, FinishReason.UNSPECIFIED),
            stop=finish.stop if matched == "stop" else None,
            stop_token_id=finish.stop_token_id if matched == "stop_token_id" else None,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log probability and the best alternatives, each (token id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_wire(cls, logprobs: types_pb2.TokenLogprobs) -> TokenLogprobs:
        top = tuple((each.token_id, each.logprob) for each in logprobs.top)
        return cls(logprobs.chosen.token_id, logprobs.chosen.logprob, top)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one choice. `text` may lag behind `token_ids`: it is held back while it may be part of a character
    or of a stop string. `token_offset` tokens of this choice came before it."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    token_offset: int = 0
    finish: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def from_wire(cls, delta: types_pb2.Delta) -> Delta:
        return cls(
            delta.text,
            tuple(delta.token_ids),
            delta.index,
            delta.token_offset,
            Finish.from_wire(delta.finish) if delta.HasField("finish") else None,
            tuple(map(TokenLogprobs.from_wire, delta.logprobs)) if delta.logprobs else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request used, in tokens, and where its time went, in seconds."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    replica: str

    @classmethod
    def from_wire(cls, usage: types_pb2.Usage) -> Usage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            generated_tokens=usage.generated_tokens,
            queue_s=usage.queue_s,
            prefill_s=usage.prefill_s,
            decode_s=usage.decode_s,
            replica=usage.replica,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica that could have taken the request, and its cost in tokens."""

    replica: str
    matched_tokens: int
    owed_tokens: float
    uncached_tokens: float
    decode_tokens: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Why a request went to its replica."""

    replica: str
    rule: str
    matched_tokens: int
    candidates: tuple[Candidate, ...]
    attempt: int

    @classmethod
    def from_wire(cls, decision: types_pb2.Decision) -> Decision:
        return cls(
            replica=decision.replica,
            rule=decision.rule,
            matched_tokens=decision.matched_tokens,
            candidates=tuple(
                Candidate(
                    replica=each.replica,
                    matched_tokens=each.matched_tokens,
                    owed_tokens=each.owed_tokens,
                    uncached_tokens=each.uncached_tokens,
                    decode_tokens=each.decode_tokens,
                    cost=each.cost,
                )
                for each in decision.candidates
            ),
            attempt=decision.attempt,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer, or what follows the request's `received_token_ids` of it; `finish` is None only while it is
    incomplete. `logprobs`, if they were asked for, has one entry for each of `token_ids`."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A request's whole answer: `n` choices, with `best_of` the best one first. `text`, `token_ids` and `finish` are
    those of the first."""

    choices: tuple[Choice, ...]
    usage: Usage | None
    decision: Decision | None
    request_id: str
    trace_id: str

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish(self) -> Finish | None:
        return self.choices[0].finish
