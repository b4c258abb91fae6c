"""From what an attack on one's own cluster showed to its bars."""

from __future__ import annotations

from load_tests.notes import Notes
from load_tests.rigs.trust_isolation import judge


def figures(auc: float, cached: int) -> dict[str, float]:
    return {"auc": auc, "rounds": 400, "asked_ms": 50.0, "new_ms": 90.0, "cached_tokens": cached}


def test_nothing_measured_meets_no_bar() -> None:
    assert not any(bar.ok for bar in judge(Notes()))


def test_an_attack_that_sees_within_and_guesses_across_is_isolation() -> None:
    notes = Notes()
    notes.add("within", **figures(0.97, 5_000))
    notes.add("across", **figures(0.51, 0))
    notes.add("forged", **figures(0.5, 0))
    notes.add("nobody", code="UNAUTHENTICATED")
    notes.add("back door", code="UNAUTHENTICATED")
    assert all(bar.ok for bar in judge(notes))


def test_each_leak_misses_its_bar() -> None:
    notes = Notes()
    notes.add("within", **figures(0.6, 0))
    notes.add("across", **figures(0.56, 1))
    notes.add("forged", **figures(0.5, 1))
    notes.add("nobody", code="OK")
    notes.add("back door", code="UNAUTHENTICATED")
    notes.add("back door", code="OK")
    assert not any(bar.ok for bar in judge(notes))
