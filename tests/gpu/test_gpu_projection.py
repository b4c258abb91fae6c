"""Products of one row, with what stands before and behind them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from workers.gpu.projection import project, tiles_of

CLOSE = {"rtol": 3e-3, "atol": 3e-3}


@pytest.mark.parametrize(("num_out", "num_in"), [(21, 40), (6, 1024), (9, 1500)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_project(device: torch.device, num_out: int, num_in: int, has_bias: bool) -> None:
    x, norm = torch.randn(1, num_in, device=device), torch.rand(num_in, device=device)
    weight = (torch.randn(2 * num_out, num_in, device=device) * num_in**-0.5).half()
    bias = torch.randn(2 * num_out, device=device).half() if has_bias else None
    own = None if bias is None else bias[:num_out]
    normed = rms_norm(x, (num_in,), norm, 1e-5)

    def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight.float(), None if bias is None else bias.float())

    plain = project(x.half(), weight[:num_out], own)
    torch.testing.assert_close(plain.float(), expected(x.half().float(), weight[:num_out], own), **CLOSE)
    after_norm = project(x, weight[:num_out], own, norm=norm, eps=1e-5)
    torch.testing.assert_close(after_norm.float(), expected(normed, weight[:num_out], own), **CLOSE)
    gate, up = expected(normed, weight, bias).chunk(2, -1)
    gated = project(x, weight, bias, norm=norm, eps=1e-5, is_gated=True)
    torch.testing.assert_close(gated.float(), silu(gate) * up, **CLOSE)
    stream = torch.randn(1, num_out, device=device)
    before = stream.clone()
    assert project(x.half(), weight[:num_out], own, added_to=stream) is stream
    torch.testing.assert_close(stream, before + expected(x.half().float(), weight[:num_out], own), **CLOSE)


def test_tiles_are_powers_of_two_that_hold_a_small_product_at_once() -> None:
    for num_out, num_in, is_gated in [(960, 576, False), (1536, 576, True), (4096, 4096, False), (128, 14336, False)]:
        tile_out, tile_in, _ = tiles_of(num_out, num_in, is_gated)
        assert tile_out & (tile_out - 1) == tile_in & (tile_in - 1) == 0
        assert tile_in >= num_in or num_in >= 1024
