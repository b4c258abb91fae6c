"""Rows of bars: what is met, what is not, and what a missing figure does."""

from __future__ import annotations

import json
from pathlib import Path

from load_tests.bars import Bar, Best, at_least, at_most, exit_code, largest, ratio, smallest, write_bars


def test_a_limit_belongs_to_what_meets_it() -> None:
    assert at_least("speed", 1.05, 1.05).ok
    assert not at_least("speed", 1.0499, 1.05).ok
    assert at_most("memory", 1.2, 1.2).ok
    assert not at_most("memory", 1.2001, 1.2).ok


def test_rounding_for_people_decides_nothing() -> None:
    row = at_least("speed", 1.049999, 1.05)
    assert row.value == 1.05
    assert not row.ok


def test_what_was_not_measured_is_not_met() -> None:
    assert at_least("speed", None, 1.0) == Bar("speed", None, 1.0, False, "")
    assert not at_most("memory", None, 1.0).ok


def test_the_best_of_those_that_were_measured() -> None:
    figures = {"a": 3.0, "b": None, "c": 5.0}
    assert largest(figures) == Best("c", 5.0)
    assert smallest(figures) == Best("a", 3.0)
    assert largest({"b": None}) is None
    assert smallest({}) is None


def test_a_ratio_needs_both_sides() -> None:
    assert ratio(6.0, Best("c", 4.0)) == 1.5
    assert ratio(None, Best("c", 4.0)) is None
    assert ratio(6.0, None) is None


def test_one_missed_bar_fails_the_run() -> None:
    met, missed = at_least("a", 2.0, 1.0), at_least("b", 0.0, 1.0)
    assert exit_code([]) == 0
    assert exit_code([met, met]) == 0
    assert exit_code([met, missed]) == 1


def test_the_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "results" / "peers.json"
    write_bars([at_least("a", 2.0, 1.0, "× 2"), at_most("b", None, 1.0)], path)
    assert json.loads(path.read_text()) == [
        {"bar": "a", "value": 2.0, "limit": 1.0, "ok": True, "detail": "× 2"},
        {"bar": "b", "value": None, "limit": 1.0, "ok": False, "detail": ""},
    ]
