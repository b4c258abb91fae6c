"""The ablation's figures on a model of a few kilobytes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from load_tests.rigs.ablation import Cell, NumbersOnly, all_kernels, markdown, matrices_of, measure, weight_error
from load_tests.rigs.packing_losses import packing_losses
from tests.workers.random_models import write_random_model
from workers.native import library
from workers.native.packing import unpack
from workers.weights.checkpoint import Checkpoint, open_checkpoint
from workers.weights.packed_mode import PackingMode


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_random_model(tmp_path / "model", "mistral-tied"))


@pytest.mark.skipif(library.library() is None, reason="the C library is not built")
def test_every_kernel_is_measured_with_every_number_of_rows(checkpoint: Checkpoint) -> None:
    cells: list[Cell] = []
    with torch.inference_mode():
        for kernel in all_kernels():
            multiply = kernel.make(list(matrices_of(checkpoint, kernel.mode)))
            cells += measure(kernel, multiply, (1, 4), seconds=0.0)
    assert len(cells) == 2 * len({cell.kernel for cell in cells}) >= 14
    assert all(cell.ms > 0 for cell in cells)
    text = markdown(cells, [])
    assert text.splitlines()[2] == "| kernel, weights | 1 | 4 |"
    assert text.count("native int8, int4") == 2, "milliseconds and tokens/s"


def test_a_tied_head_is_multiplied_with_and_an_embedding_is_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    untied = open_checkpoint(write_random_model(tmp_path / "untied", "llama"))
    for each in (checkpoint, untied):
        sizes = [(matrix.outputs, matrix.inputs) for matrix in matrices_of(each, PackingMode.EXACT)]
        assert len(sizes) == 2 * 4 + 1
        assert sizes.count((83, 64)) == 1


@pytest.mark.skipif(library.library() is None, reason="the C library is not built")
def test_perplexity_is_beside_the_numbers(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    plain = write_random_model(tmp_path / "model", "llama", head_dim=32, rope_parameters=rope)
    checkpoint = open_checkpoint(plain)
    draw = random.Random(5)
    windows = [draw.choices(range(83), k=24) for _ in range(3)]
    losses = list(packing_losses({"file": checkpoint, "numbers": NumbersOnly(checkpoint)}, windows, threads=1))
    assert [(each.source, each.packing, each.dtype) for each in losses] == [
        ("file", "exact", "bf16"),
        ("file", "int8", "int8"),
        ("numbers", "bf16", "bf16"),
        ("numbers", "int8", "int8"),
        ("numbers", "int4", "int8"),
    ]
    exact, rounded, *_, int4 = (abs(each.increase) for each in losses)
    assert exact < rounded < int4
    assert exact < 1e-2
    assert "| int4, from numbers | int8 |" in markdown([], [], losses)


def test_errors_are_against_the_numbers(checkpoint: Checkpoint) -> None:
    numbers = NumbersOnly(checkpoint)
    found = {mode: weight_error("numbers", numbers, mode, numbers) for mode in PackingMode}
    assert (found[PackingMode.EXACT].largest, found[PackingMode.EXACT].rms) == (0, 0)
    assert found[PackingMode.INT4].formats == "Q4 Q8"
    pairs = zip(matrices_of(numbers, PackingMode.INT8), matrices_of(numbers, PackingMode.EXACT), strict=True)
    both = [(unpack(packed), unpack(exact)) for packed, exact in pairs]
    largest = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in both)
    rms = np.sqrt(sum(((a - b) ** 2).sum() for a, b in both) / sum((b**2).sum() for _, b in both))
    assert found[PackingMode.INT8].largest == pytest.approx(largest, rel=1e-3)
    assert found[PackingMode.INT8].rms == pytest.approx(float(rms), rel=1e-3)
    assert 0 < found[PackingMode.BF16].rms < found[PackingMode.INT8].rms < found[PackingMode.INT4].rms
