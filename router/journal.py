"""The choices of one answer since their beginning, and how much of them its consumer has been sent.

Whoever attaches again gets the rest from wherever it was, always cut between tokens. With best_of it is known when all
have ended which of the generated choices are the answer, and in which order; until then there is nothing to take. Knows
no streams, no windows and no terminal. Bounded by max_tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from octavo.names import Reason
from octavo.v1 import types_pb2 as pb

from router.choice import Choice
from workers.errors import UnavailableError
from workers.types import Finish, TokenLogprobs

LOGPROBS_PER_TOKEN = 6
"""So many log probabilities take the room of a token, in a message."""


class Journal:
    """`choices` are generated, and `num_choices` of them are the answer. `num_logprobs`: as the request asks for them;
    `sends_logprobs`: its client does, too."""

    __slots__ = ("_choices", "_generated", "_num_logprobs", "_sends_logprobs", "num_choices", "token_weight")

    def __init__(
        self,
        choices: list[Choice],
        *,
        num_choices: int,
        num_logprobs: int | None = None,
        sends_logprobs: bool = False,
    ) -> None:
        self.num_choices = num_choices
        self.token_weight = 1 + (1 + (num_logprobs or 0)) // LOGPROBS_PER_TOKEN if sends_logprobs else 1
        """What a token takes of a message's room."""
        self._generated = choices
        self._choices = choices if num_choices == len(choices) else []
        """The answer: what is generated, or the best of it."""
        self._num_logprobs = num_logprobs
        self._sends_logprobs = sends_logprobs

    # What is generated.

    @property
    def num_generated(self) -> int:
        """Tokens of all choices, those included that best_of leaves out and those that were received before."""
        return sum(len(choice.token_ids) for choice in self._generated)

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self._generated)

    def ended(self) -> list[int]:
        """Return which choices have ended."""
        return [index for index, choice in enumerate(self._generated) if choice.finish is not None]

    def known(self, index: int) -> Sequence[int]:
        """Return the tokens of a choice, the received ones included."""
        return self._generated[index].token_ids

    def has_ended(self, index: int) -> bool:
        return self._generated[index].finish is not None

    def push(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bool:
        """Take tokens of a choice; return whether it has ended with a stop string. Raises UnavailableError if log
        probabilities are missing, which the request has asked for."""
        choice = self._generated[index]
        if self._num_logprobs is not None and len(logprobs) != len(token_ids):
            message = f"its replica sent {len(token_ids)} tokens with {len(logprobs)} log probabilities"
            raise UnavailableError(message, reason=Reason.REPLICA_LOST)
        num_taken = choice.push(token_ids)
        if self._num_logprobs is not None:
            choice.note_logprobs(logprobs[:num_taken], keeps=self._sends_logprobs)
        return choice.finish is not None

    def end(self, index: int, finish: Finish) -> None:
        """The engine has ended a choice; `rank` follows."""
        self._generated[index].end(finish)

    def rank(self) -> None:
        """With best_of: once all have ended, the best are the answer."""
        if not self._choices and self.is_whole:
            ranked = sorted(self._generated, key=lambda choice: -choice.sum_logprobs)
            self._choices = ranked[: self.num_choices]

    # What the consumer gets.

    @property
    def is_finish_sent(self) -> bool:
        """Whether the finish of every choice of the answer was taken."""
        return all(choice.is_finish_sent for choice in self._choices)

    @property
    def finish_reasons(self) -> list[str]:
        """Why the choices of the answer have ended, in the words of the GenAI conventions."""
        finishes = [choice.finish for choice in self._choices if choice.finish is not None]
        return ["length" if finish.reason == pb.FINISH_REASON_LENGTH else "stop" for finish in finishes]

    @property
    def texts(self) -> list[str]:
        """What each choice of the answer says so far."""
        return ["".join(choice.pieces) + choice.tail for choice in self._choices]

    def has_deltas(self, window: int | None) -> bool:
        """Whether `take` would give something; with a `window`, within so many tokens."""
        for choice in self._choices:
            if choice.num_sent < len(choice.token_ids):
                if window is None or window > 0:
                    return True
            elif choice.finish is not None and not choice.is_finish_sent:
                return True
        return False

    def take(self, limit: int, window: int | None, add: Callable[[], pb.Delta]) -> int | None:
        """Fill deltas from `add`, one a choice, with what is available: at most `limit` of a message's room, and at
        most `window` tokens. Return how many tokens, or None if there was no delta. (Filled in place: to make messages
        and copy them costs three times as much.)"""
        room = limit // self.token_weight
        room = left = room if window is None else min(room, window)
        has_taken = False
        for index, choice in self._in_turn(has_window=window is not None):
            num_tokens = choice.take(index, left, add)
            if num_tokens is not None:
                has_taken = True
                left -= num_tokens
        return room - left if has_taken else None

    def offsets(self, index: int) -> range:
        """Return what an attachment may say that it has of a choice: from the tokens that the client received before
        this request to all there are."""
        if not self._choices:
            return range(1)
        choice = self._choices[index]
        return range(choice.num_received, len(choice.token_ids) + 1)

    def resume(self, offsets: Sequence[int]) -> None:
        """The consumer has the first ``offsets[i]`` tokens of choice i."""
        for choice, offset in zip(self._choices, offsets, strict=False):
            choice.resume(offset)

    def skip(self) -> None:
        """Count everything that there is as sent."""
        for choice in self._choices:
            choice.skip()

    def _in_turn(self, *, has_window: bool) -> Iterable[tuple[int, Choice]]:
        """Return the choices with their indices; where a window may not let all through, the one that is furthest
        behind first, so that none waits for the end of another."""
        if not has_window or len(self._choices) == 1:
            return enumerate(self._choices)
        return sorted(enumerate(self._choices), key=lambda each: each[1].num_sent)
