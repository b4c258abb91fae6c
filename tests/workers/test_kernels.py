"""Packed products against F.linear, whatever this machine packs them with; adapters; threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn.functional import linear

from workers import kernels
from workers.linear import Linear
from workers.threads import set_threads


@pytest.fixture
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose torch has no packed product."""
    monkeypatch.setattr(kernels, "_is_onednn_exact", lambda dtype: False)
    monkeypatch.setattr(kernels, "_is_fp16_exact", lambda: False)
    monkeypatch.setattr(kernels, "has_native_bf16", lambda: False)
    monkeypatch.setattr(kernels, "kernel_for", kernels.kernel_for.__wrapped__)


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not multiply bf16, with FBGEMM."""
    monkeypatch.setattr(kernels, "has_native_bf16", lambda: False)
    monkeypatch.setattr(kernels, "kernel_for", kernels.kernel_for.__wrapped__)
    if kernels.kernel_for(torch.bfloat16) != "fp16":
        pytest.skip("this torch has no products with fp16 weights")


def assert_products() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 40), torch.randn(24)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        for rows in (1, 3, 64):
            x = torch.randn(rows, 40).to(kernels.activations(dtype))
            for own_bias in (None, bias):
                actual = kernels.pack(weight, own_bias, dtype)(x)
                exact_bias = None if own_bias is None else own_bias.to(dtype).float()
                exact = linear(x.float(), weight.to(dtype).float(), exact_bias)
                assert actual.dtype is x.dtype
                assert (actual.float() - exact).abs().max() <= tolerance


def test_products() -> None:
    assert kernels.kernel_for(torch.float32) in ("onednn", "torch")
    assert_products()


@pytest.mark.usefixtures("without_onednn")
def test_products_without_onednn() -> None:
    assert kernels.kernel_for(torch.float32) == "torch"
    assert kernels.kernel_for(torch.bfloat16) == "widened"
    assert kernels.native_dtype() is torch.float32
    assert_products()


@pytest.mark.usefixtures("without_bf16")
def test_products_with_fp16_weights_round_nothing_else() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(56, 40), torch.randn(56)
    x = torch.randn(7, 40) * 1e6
    assert kernels.activations(torch.bfloat16) is torch.float32
    for own_bias in (None, bias):
        actual = kernels.pack(weight, own_bias, torch.bfloat16)(x)
        torch.testing.assert_close(actual, linear(x, weight.half().float(), own_bias), rtol=1e-5, atol=10.0)


@pytest.mark.usefixtures("without_bf16")
def test_a_weight_that_fp16_cannot_hold_stays_fp32() -> None:
    """FBGEMM would make 65,504 of it, with a warning."""
    weight = torch.ones(16, 32)
    weight[3, 5] = -1e6
    x = torch.ones(2, 32)
    assert torch.equal(kernels.pack(weight, None, torch.bfloat16)(x), linear(x, weight))


def test_a_torch_that_compiles_nothing_has_no_fp16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where sources are not installed; the probe failed, and the replica with it."""

    def without_source(weight: torch.Tensor, bias: torch.Tensor | None) -> kernels.Matmul:
        raise OSError("could not get source code")

    monkeypatch.setattr(kernels, "_fp16", without_source)
    assert not kernels._is_fp16_exact.__wrapped__()


def test_adapters_change_their_rows_alone() -> None:
    torch.manual_seed(0)
    projection = Linear(torch.randn(6, 4), None, torch.float32)
    x = torch.randn(5, 4)
    plain = projection(x)
    projection.adapters["double"] = lambda rows: plain[[1, 3]] if len(rows) == 2 else rows
    rows = {"double": torch.tensor([1, 3]), "unknown": torch.tensor([0])}
    changed = projection(x, rows)
    assert torch.equal(changed[[1, 3]], 2 * plain[[1, 3]])
    assert torch.equal(changed[[0, 2, 4]], plain[[0, 2, 4]])


def test_threads_hold_in_every_thread() -> None:
    before = torch.get_num_threads()
    seen = []
    try:
        set_threads(3)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3]
    finally:
        set_threads(before)
