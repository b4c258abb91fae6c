"""The C library's norms, rounding, activation and largest element against torch; both of its builds."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from workers.native import library

pytestmark = [
    pytest.mark.skipif(library.library() is None, reason="the C library is not built"),
    pytest.mark.parametrize("portable", [0, 1], ids=["best", "portable"]),
]

GROUP = 32
RMS_NORM, SILU_PRODUCT = 0, 1
NAN, INFINITY = float("nan"), float("inf")


def built() -> ctypes.CDLL:
    found = library.library()
    assert found is not None
    return found


def elementwise(
    portable: int, operation: int, x: torch.Tensor, other: torch.Tensor, *, eps: float = 0.0, in_place: bool = False
) -> torch.Tensor:
    out = x.clone() if in_place else torch.full_like(x, NAN)
    source = out if in_place else x
    built().octavo_elementwise(portable, operation, source.data_ptr(), other.data_ptr(), eps, len(x), out.data_ptr())
    return out


def round_row(portable: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [groups, GROUP], scales [groups] and sums [groups]."""
    num_groups = len(x) // GROUP
    values = torch.full((num_groups, GROUP), 99, dtype=torch.int8)
    scales, sums = torch.full((2, num_groups), NAN)
    built().octavo_round_row(portable, x.data_ptr(), len(x), values.data_ptr(), scales.data_ptr(), sums.data_ptr())
    return values, scales, sums


def argmax(portable: int, x: torch.Tensor) -> int:
    return int(built().octavo_argmax(portable, x.data_ptr(), len(x)))


@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 576, 2048, 2049])
@pytest.mark.parametrize("in_place", [False, True])
def test_rms_norm(portable: int, size: int, in_place: bool) -> None:
    torch.manual_seed(size)
    x, weight = torch.randn(size) * 7, torch.randn(size)
    actual = elementwise(portable, RMS_NORM, x, weight, eps=1e-5, in_place=in_place)
    torch.testing.assert_close(actual, rms_norm(x, (size,), weight, 1e-5), rtol=1e-6, atol=0)


def test_rms_norm_of_nothing_is_nothing(portable: int) -> None:
    assert torch.equal(elementwise(portable, RMS_NORM, torch.zeros(40), torch.ones(40), eps=1e-6), torch.zeros(40))


@pytest.mark.parametrize("size", [1, 8, 13, 1536])
def test_silu_product(portable: int, size: int) -> None:
    torch.manual_seed(size)
    gate, up = torch.randn(size) * 10, torch.randn(size)
    expected = (silu(gate.double()) * up.double()).float()
    torch.testing.assert_close(elementwise(portable, SILU_PRODUCT, gate, up), expected, rtol=4e-7, atol=0)


def test_silu_of_any_number(portable: int) -> None:
    """Close where silu is a normal float; zero, nearly, where its exponential is not; large ones unchanged."""
    gate = torch.cat((torch.linspace(-87, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])))
    actual = elementwise(portable, SILU_PRODUCT, gate, torch.ones_like(gate))
    torch.testing.assert_close(actual, silu(gate.double()).float(), rtol=4e-7, atol=0)
    gate = torch.tensor([-88.5, -90, -100, -1e4, -1e30, -3e37, 88.5, 90, 1e4, 3e38] * 2)
    actual = elementwise(portable, SILU_PRODUCT, gate, torch.ones_like(gate))
    torch.testing.assert_close(actual[:4], silu(gate[:4]), rtol=0, atol=1e-33)
    assert (actual[4:6].abs() <= 1.0).all()
    assert torch.equal(actual[6:10], gate[6:10])
    assert torch.equal(actual[:10], actual[10:])


@pytest.mark.parametrize("size", [8, 3])
def test_silu_shows_what_is_not_finite(portable: int, size: int) -> None:
    ones = torch.ones(size)
    assert elementwise(portable, SILU_PRODUCT, ones * NAN, ones).isnan().all()
    assert elementwise(portable, SILU_PRODUCT, ones, ones * NAN).isnan().all()
    assert not elementwise(portable, SILU_PRODUCT, ones * INFINITY, ones).isfinite().any()
    assert not elementwise(portable, SILU_PRODUCT, ones * -INFINITY, ones).isfinite().any()


def test_rounding_to_int8(portable: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, GROUP) * torch.logspace(-20, 20, 40)[:, None]
    values, scales, sums = round_row(portable, x.flatten())
    torch.testing.assert_close(scales, x.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (values.abs().amax(1) == 127).all()
    assert ((values * scales[:, None] - x).abs() <= 0.5001 * scales[:, None]).all()
    torch.testing.assert_close(sums, scales * values.sum(1), rtol=1e-6, atol=0)


def test_rounding_keeps_order_and_sign(portable: int) -> None:
    x = torch.cat((torch.arange(-16, 16), torch.arange(127, 95, -1))).float() * 0.5
    values, scales, _ = round_row(portable, x)
    assert values[1].tolist() == list(range(127, 95, -1))
    assert scales[1] == 0.5
    assert values[0].tolist() == [round(i * 127 / 16) for i in range(-16, 16)]


def test_both_builds_round_alike(portable: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(64 * GROUP)
    for actual, expected in zip(round_row(portable, x), round_row(1 - portable, x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-42, -1e-38])
def test_a_group_of_nothing_rounds_to_zero(portable: int, tiny: float) -> None:
    values, scales, sums = round_row(portable, torch.cat((torch.full((GROUP,), tiny), torch.ones(GROUP))))
    assert (values[0] == 0).all()
    assert scales[0] == sums[0] == 0
    assert (values[1] == 127).all()


@pytest.mark.parametrize("poison", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("place", [0, 9, 31])
def test_rounding_shows_what_is_not_finite(portable: int, poison: float, place: int) -> None:
    """int8 has no NaN, so the scale is one, and whatever it is multiplied with becomes one."""
    x = torch.ones(2 * GROUP)
    x[place] = poison
    values, scales, sums = round_row(portable, x)
    assert (values[0] == 0).all()
    assert scales.isnan().tolist() == [True, False]
    assert sums.isnan().tolist() == [True, False]


@pytest.mark.parametrize("size", [1, 5, 8, 16, 100, 511, 512, 513, 1031, 49_152])
def test_argmax_takes_the_first_of_the_largest(portable: int, size: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(size)
    assert argmax(portable, x) == int(x.argmax())
    for place in {0, 3, 7, 8, size // 2, size - 2, size - 1} & set(range(size)):
        x[place:] = 9.0
        assert argmax(portable, x) == place
        x[place:] = -9.0
    assert argmax(portable, torch.full((size,), -3e38)) == 0


@pytest.mark.parametrize("poison", [NAN, INFINITY, -INFINITY])
def test_argmax_of_what_is_not_finite(portable: int, poison: float) -> None:
    for size in (5, 16, 1031):
        for place in (0, 4, size // 2, size - 1):
            x = torch.linspace(-1, 1, size)
            x[place] = poison
            assert argmax(portable, x) == -1
