"""Prompt lookup alone: what is proposed, against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.lookup import NGRAMS, PromptLookup


def searched(tokens: list[int], limit: int) -> list[int]:
    """Find the last occurrence of the last tokens by looking everywhere."""
    for n in NGRAMS:
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                while len(text) - len(tokens) < limit:
                    text.append(text[end + len(text) - len(tokens)])
                return text[len(tokens) :]
    return []


def test_what_followed_the_last_time_is_proposed() -> None:
    text = [1, 2, 3, 40, 41, 42, 1, 2, 3, 50, 51, 52]
    assert PromptLookup(4).propose([*text, 1, 2, 3], 9) == [50, 51, 52, 1]
    assert PromptLookup(4).propose([*text, 1, 2, 3], 2) == [50, 51]
    assert PromptLookup(4).propose([*text, 9, 2, 3], 2) == [50, 51], "two tokens, where three are not found"
    assert PromptLookup(4).propose([*text, 9, 9, 3], 2) == []
    assert PromptLookup(4).propose([5], 2) == []


def test_a_period_is_carried_on() -> None:
    assert PromptLookup(7).propose([7, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup(3).propose([8, 8, 8], 3) == [8, 8, 8]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_a_growing_text_is_indexed_as_the_whole_would_be(tokens: list[int], limit: int, data: st.DataObject) -> None:
    lookup = PromptLookup(limit)
    end = 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        assert lookup.propose(tokens[:end], limit) == searched(tokens[:end], limit)
