"""The angles of rotary embedding: by their formulas, and out of numbers that no model has."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workers.errors import ModelFileError
from workers.rotary import inverse_frequencies
from workers.weights.shape import Rope

DIM = 8
PLAIN = [10000.0 ** (-i / DIM) for i in range(0, DIM, 2)]


def test_frequencies_are_powers_of_theta() -> None:
    found = inverse_frequencies(Rope(), DIM)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(PLAIN, rel=1e-6)


def test_linear_scaling_and_divisors() -> None:
    linear = inverse_frequencies(Rope(scaling="linear", factor=4.0), DIM)
    assert linear.tolist() == pytest.approx([each / 4 for each in PLAIN], rel=1e-6)
    divisors = (1.0, 2.0, 4.0, 8.0)
    divided = inverse_frequencies(Rope(scaling="divisors", divisors=divisors), DIM)
    assert divided.tolist() == pytest.approx([a / b for a, b in zip(PLAIN, divisors, strict=True)], rel=1e-6)


def test_llama3_scales_long_waves_and_some_between_in_part() -> None:
    rope = Rope(theta=1e6, scaling="llama3", factor=8.0, original_max_positions=8192)
    share = (8192 * 1e-3 / (2 * math.pi) - 1.0) / (4.0 - 1.0)
    between = (1 - share) * 1e-3 / 8 + share * 1e-3
    expected = [1.0, 10**-1.5, between, 10**-4.5 / 8]
    assert inverse_frequencies(rope, DIM).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_base_beyond_fp32_turns_nothing_but_the_first_pair() -> None:
    assert inverse_frequencies(Rope(theta=1e300), DIM).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=1e-300),
        Rope(scaling="linear", factor=1e-300),
        Rope(scaling="divisors", divisors=(1.0, 0.0, 1.0, 1.0)),
        Rope(scaling="divisors", divisors=(1.0, math.nan, 1.0, 1.0)),
        Rope(scaling="llama3", factor=8.0, low_frequency_factor=-math.inf),
    ],
)
def test_angles_that_are_not_finite_are_refused(rope: Rope) -> None:
    """Such a model was loaded, with warnings of numpy at most, and every request to it failed."""
    with pytest.raises(ModelFileError, match="makes angles that are not finite"):
        inverse_frequencies(rope, DIM)
