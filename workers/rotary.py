"""The angles that rotary embedding turns by; every model and both kinds of kernels take them from here."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from workers.errors import ModelFileError
from workers.weights.shape import Rope

Floats = npt.NDArray[np.float32]


def inverse_frequencies(rope: Rope, head_dim: int) -> Floats:
    """Return the angle per position [head_dim / 2] of each rotated pair.

    Raises ModelFileError if one is not finite, which would make NaN of every logit.
    """
    with np.errstate(all="ignore"):
        frequencies = _scaled(rope, head_dim)
    if not np.isfinite(frequencies).all():
        raise ModelFileError(f"rope: theta {rope.theta} with scaling {rope.scaling!r} makes angles that are not finite")
    return frequencies


def _scaled(rope: Rope, head_dim: int) -> Floats:
    """llama3: Meta's llama-models, apply_scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers in fp64: in fp32 their last bit depends on who computes them, and on which processor.
    powers: Floats = np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)
    frequencies: Floats = np.reciprocal(powers)
    if rope.scaling == "linear":
        return np.divide(frequencies, rope.factor, dtype=np.float32)
    if rope.scaling == "divisors":
        return np.divide(frequencies, rope.divisors, dtype=np.float32)
    if rope.scaling == "llama3":
        wavelengths = np.float32(2 * math.pi) / frequencies
        turns = np.float32(rope.original_max_positions) / wavelengths
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        share: Floats = np.clip((turns - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
        return (np.float32(1) - share) * frequencies / np.float32(rope.factor) + share * frequencies
    assert rope.scaling == "none"
    return frequencies
