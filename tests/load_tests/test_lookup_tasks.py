"""What prompt lookup is measured on, and the sums of its table."""

from __future__ import annotations

import pytest

from load_tests.lookup_tasks import KINDS, lookup_tasks
from load_tests.rigs.lookup import Answer, markdown, summarise


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_distinct_and_always_the_same(kind: str) -> None:
    tasks = list(lookup_tasks(kind))
    assert tasks == list(lookup_tasks(kind))
    assert len({task.messages[0]["content"] for task in tasks}) == len(tasks) == 4


def test_a_code_edit_names_what_the_function_has() -> None:
    for task in lookup_tasks("code edit"):
        wish, _, source = task.messages[0]["content"].partition("\n\n")
        old = wish.split("`")[1]
        assert f"def {task.name}(" in source
        assert old in source


def test_rates_are_of_the_tokens_behind_each_first_one() -> None:
    plain = summarise("quote", 0, [Answer((1, 2, 3), 1.0, 0, 0, 2), Answer((1, 2, 3, 4), 1.5, 0, 0, 3)], None)
    assert (plain.tokens, plain.tokens_per_s, plain.speedup, plain.tokens_per_step) == (7, 2.0, 1.0, 1.0)
    assert plain.acceptance is None
    guessed = summarise("quote", 4, [Answer((1, 2, 3), 0.5, 4, 1, 1), Answer((1, 2, 3, 4), 0.75, 4, 1, 2)], plain)
    assert (guessed.tokens_per_s, guessed.speedup, guessed.tokens_per_step) == (4.0, 2.0, round(5 / 3, 3))
    assert (guessed.drafted, guessed.accepted, guessed.acceptance) == (8, 2, 0.25)
    assert markdown([plain, guessed]).splitlines()[2:] == [
        "| quote | 0 | 7 | 2.0 | 1.00 | 1.00 | 0 | 0 | - |",
        "| quote | 4 | 7 | 4.0 | 2.00 | 1.67 | 8 | 2 | 25 % |",
    ]
