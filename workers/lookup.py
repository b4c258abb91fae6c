"""Prompt lookup: guesses that an answer goes on as it, or its prompt, did where its last tokens stood the last time.

Costs no model: extraction, summaries, code edits and repetitions hit, all else misses. Knows token ids only; whether a
guess is right is the runner's to find out, so a wrong one costs time and changes nothing. Saxena (2023), "Prompt lookup
decoding".
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

NGRAMS = (3, 2)
"""How many last tokens are looked up; the longer first, as it errs less."""


class PromptLookup:
    """Implements `Proposer` for one sequence, whose tokens only grow. Memory and time are linear in them."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._followers: dict[tuple[int, ...], int] = {}
        """By n-gram, the position that followed its last occurrence, other than at the very end."""
        self._num_indexed = 0
        """Positions below this one are in `_followers`."""

    def propose(self, tokens: Seq[int], limit: int) -> list[int]:
        self._index(tokens)
        for n in NGRAMS:
            follower = self._followers.get(tuple(tokens[-n:]))
            if follower is not None:
                return _copy(tokens, follower, min(limit, self._max_tokens))
        return []

    def _index(self, tokens: Seq[int]) -> None:
        for position in range(self._num_indexed, len(tokens)):
            for n in NGRAMS:
                if position >= n:
                    self._followers[tuple(tokens[position - n : position])] = position
        self._num_indexed = len(tokens)


def _copy(tokens: Seq[int], start: int, count: int) -> list[int]:
    """Return `count` tokens from `start` on; behind the end lies what was copied before, so a period goes on."""
    period = len(tokens) - start
    return [tokens[start + i % period] for i in range(count)]
