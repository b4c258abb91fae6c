"""Percentiles out of buckets against exact ones; merging; bounds."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.generator.histogram import GROWTH, HIGHEST_S, LOWEST_S, Histogram

SHARES = (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0)
VALUES = st.lists(st.floats(min_value=LOWEST_S * 1.01, max_value=HIGHEST_S), min_size=1, max_size=200)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def exact(values: list[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def assert_like_exact(histogram: Histogram, values: list[float]) -> None:
    for share in SHARES:
        assert histogram.percentile(share) == pytest.approx(exact(values, share), rel=GROWTH**0.5 - 1 + 1e-9)
    assert histogram.count == len(values)
    assert (histogram.min, histogram.max) == (min(values), max(values))
    assert histogram.mean == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_percentiles_are_within_one_percent_of_exact_ones(spread: float) -> None:
    rng = random.Random(5)
    values = [rng.lognormvariate(-3, spread) for _ in range(5_000)]
    assert_like_exact(histogram_of(values), values)


@given(VALUES)
def test_percentiles_hold_for_any_values(values: list[float]) -> None:
    assert_like_exact(histogram_of(values), values)


@given(VALUES, VALUES)
def test_merged_is_the_same_as_counted_together(first: list[float], second: list[float]) -> None:
    merged = histogram_of(first)
    merged.merge(histogram_of(second))
    assert_like_exact(merged, first + second)
    assert list(merged.curve()) == list(histogram_of(first + second).curve())


def test_merging_nothing_changes_nothing() -> None:
    histogram = histogram_of([0.1, 0.2])
    before = histogram.to_json()
    histogram.merge(Histogram())
    assert histogram.to_json() == before


def test_memory_is_bounded_whatever_comes() -> None:
    rng = random.Random(7)
    histogram = histogram_of([10.0 ** rng.uniform(-9, 9) for _ in range(50_000)])
    assert histogram.num_buckets <= 1 + math.ceil(math.log(HIGHEST_S / LOWEST_S) / math.log(GROWTH)) + 1


def test_what_is_shorter_than_the_clock_can_tell_counts_too() -> None:
    histogram = histogram_of([0.0, -1e-9, 5e-7])
    assert histogram.count == 3
    assert histogram.percentile(1.0) == 5e-7


def test_nothing_has_no_percentile() -> None:
    assert Histogram().percentile(0.5) is None
    assert Histogram().mean is None
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], is 50"):
        Histogram().percentile(50)


@given(st.lists(st.floats(min_value=0, max_value=1e6), max_size=50))
def test_json_brings_all_of_it_back(values: list[float]) -> None:
    histogram = histogram_of(values)
    again = Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    assert list(again.curve()) == list(histogram.curve())
    assert again.to_json() == Histogram.from_json(again.to_json()).to_json()
