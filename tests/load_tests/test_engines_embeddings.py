"""How the bench of embeddings makes its texts and judges; measuring itself needs sentence-transformers."""

from __future__ import annotations

from itertools import chain

from load_tests.notes import Notes
from load_tests.rigs.engines_embeddings import BATCH, MAX_WORDS, MIN_WORDS, judge, make_batches


def test_texts_are_as_many_and_as_long_as_said_and_new_in_each_repetition() -> None:
    batches = make_batches(0, 3, BATCH)
    assert [len(texts) for texts in batches] == [BATCH] * 3
    assert all(MIN_WORDS <= len(text.split()) <= MAX_WORDS for texts in batches for text in texts)
    assert batches == make_batches(0, 3, BATCH)
    assert not {*chain(*batches)} & {*chain(*make_batches(1, 3, BATCH))}


def test_repetitions_are_compared_within_themselves() -> None:
    notes = Notes()
    for ours, theirs in ((130, 100), (260, 200), (90, 90)):
        notes.add("octavo", embeddings_per_s=ours, first_ms=12.0)
        notes.add("direct", embeddings_per_s=theirs, first_ms=10.0)
        notes.add("both", difference=2e-6)
    assert [(bar.value, bar.ok) for bar in judge(notes)] == [(1.3, True), (1.2, True), (2e-6, True)]


def test_what_was_not_measured_meets_no_bar() -> None:
    assert [bar.ok for bar in judge(Notes())] == [False] * 3
