"""`python -m load_tests.rigs.ablation`: kernel x rows x milliseconds, and what each packing costs in exactness.

All linear layers of a model and its head, one after the other as a step reads them, in one thread; no attention and no
norms. Weights are packed as the engine packs the model's file, whose blocks stay as they are, and once more from its
dequantised numbers, as if the file had 16 or 32 bits. Every time is the best of as many as fit into --seconds.

Errors are those of the weights as they are multiplied, against the dequantised file: the largest of all matrices, as a
part of the matrix's largest weight, and the root of the mean square, as a part of that of all weights. Perplexity is
that of `rigs/perplexity.py`, over --windows of its windows.

Writes ablation.json and ablation.md. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cluster.models import fetch_model
from load_tests import machine
from load_tests.markdown import table
from load_tests.natural_text import NaturalText
from load_tests.rigs.packing_losses import PackingLoss, packing_losses
from load_tests.rigs.perplexity import SEED
from workers import kernels
from workers.native import library
from workers.native.packing import PackedMatrix, unpack
from workers.threads import set_threads
from workers.weights.checkpoint import Checkpoint, open_checkpoint
from workers.weights.packed_mode import PackingMode, packed_parts
from workers.weights.shape import ModelShape

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WINDOW_TOKENS = 512
RESULTS = Path(__file__).parents[1] / "results"

Multiply = Callable[[int], None]
"""Computes all products of a step of so many rows."""


class NumbersOnly:
    """A checkpoint that gives out no blocks: what it has is packed from numbers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.shape: ModelShape = checkpoint.shape
        self.tensor = checkpoint.tensor
        self.array = checkpoint.array

    def quantised(self, name: str, *size: int) -> None:
        """Say that nothing is quantised."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to multiply. `source` is "file", whose blocks stay, or "numbers"."""

    name: str
    source: str
    mode: PackingMode
    make: Callable[[Sequence[PackedMatrix]], Multiply]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    kernel: str
    rows: int
    ms: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    source: str
    packing: str
    formats: str
    gb: float
    largest: float
    rms: float


def native(arithmetic: int) -> Callable[[Sequence[PackedMatrix]], Multiply]:
    """Return what multiplies by the C library, in no thread but the caller's."""
    return lambda matrices: NativeProducts(matrices, arithmetic)


class NativeProducts:
    def __init__(self, matrices: Sequence[PackedMatrix], arithmetic: int) -> None:
        found = library.library()
        assert found is not None, "the C library is not built"
        self._linear = found.octavo_linear
        self._arithmetic = arithmetic
        self._matrices = matrices
        self._weights = [
            library.Matrix(
                data=each.data.ctypes.data,
                bias=None if each.bias is None else each.bias.ctypes.data,
                format=int(each.format),
                outputs=each.outputs,
                inputs=each.inputs,
            )
            for each in matrices
        ]

    def __call__(self, rows: int) -> None:
        for weight in self._weights:
            x, y = _operands(rows, weight.inputs, weight.outputs)
            failed = self._linear(*(0, ctypes.byref(weight), self._arithmetic, x.ctypes.data, rows, 0, y.ctypes.data))
            assert not failed, "no memory for a product"


def through_torch(
    pack: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
) -> Callable[[Sequence[PackedMatrix]], Multiply]:
    """Return what multiplies fp32 through torch with `pack` of each weight; without biases."""

    def make(matrices: Sequence[PackedMatrix]) -> Multiply:
        products = [(each.inputs, each.outputs, pack(torch.from_numpy(unpack(each)))) for each in matrices]

        def multiply(rows: int) -> None:
            for inputs, outputs, product in products:
                product(torch.from_numpy(_operands(rows, inputs, outputs)[0]))

        return multiply

    return make


_OPERANDS: dict[tuple[int, int, int], tuple[Any, Any]] = {}


def _operands(rows: int, inputs: int, outputs: int) -> tuple[Any, Any]:
    """Return x [rows, inputs] and room for y [rows, outputs], the same whenever they are asked for."""
    key = (rows, inputs, outputs)
    if key not in _OPERANDS:
        x = np.random.default_rng(0).standard_normal((rows, inputs), dtype=np.float32)
        _OPERANDS[key] = (x, np.empty((rows, outputs), dtype=np.float32))
    return _OPERANDS[key]


def all_kernels() -> Iterator[Kernel]:
    exact, rounded = native(library.EXACT), native(library.INT8)
    yield Kernel("native exact, file", "file", PackingMode.EXACT, exact)
    yield Kernel("native int8, file", "file", PackingMode.INT8, rounded)
    yield Kernel("native exact, bf16", "numbers", PackingMode.BF16, exact)
    yield Kernel("native int8, int8", "numbers", PackingMode.INT8, rounded)
    yield Kernel("native int8, int4", "numbers", PackingMode.INT4, rounded)
    yield Kernel("native exact, fp32", "numbers", PackingMode.EXACT, exact)
    if kernels.kernel_for(torch.float32) == "onednn":
        onednn = through_torch(lambda weight: kernels.pack(weight, None, torch.float32))
        yield Kernel("torch onednn, fp32", "numbers", PackingMode.EXACT, onednn)
    linear = through_torch(lambda weight: lambda x: functional.linear(x, weight))
    yield Kernel("torch F.linear, fp32", "numbers", PackingMode.EXACT, linear)


def matrices_of(checkpoint: Checkpoint, mode: PackingMode) -> Iterator[PackedMatrix]:
    """Yield what a step multiplies with, in its order; the embedding only where it is the head."""
    for name, part in packed_parts(checkpoint, mode):
        if isinstance(part, PackedMatrix) and (name != "embedding" or checkpoint.shape.tied_embeddings):
            yield part


def measure(kernel: Kernel, multiply: Multiply, rows: Sequence[int], seconds: float) -> Iterator[Cell]:
    for count in rows:
        multiply(count)
        best, tries, began = math.inf, 0, time.perf_counter()
        while tries < 2 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            multiply(count)
            best, tries = min(best, time.perf_counter() - start), tries + 1
        _OPERANDS.clear()
        yield Cell(kernel=kernel.name, rows=count, ms=round(1e3 * best, 3), tokens_per_s=round(count / best, 1))


def weight_error(source: str, checkpoint: Checkpoint, mode: PackingMode, numbers: Checkpoint) -> WeightError:
    """Return how far the weights of `checkpoint` packed in `mode` are from those of `numbers`."""
    largest = squares = reference_squares = 0.0
    num_bytes, formats = 0, dict[str, None]()
    for packed, exact in zip(matrices_of(checkpoint, mode), matrices_of(numbers, PackingMode.EXACT), strict=True):
        reference = unpack(exact)
        error = np.abs(unpack(packed) - reference)
        largest = max(largest, float(error.max() / np.abs(reference).max()))
        squares += float(np.square(error, dtype=np.float64).sum())
        reference_squares += float(np.square(reference, dtype=np.float64).sum())
        num_bytes += packed.data.nbytes
        formats[packed.format.name] = None
    return WeightError(
        source=source,
        packing=mode.value,
        formats=" ".join(sorted(formats)),
        gb=round(num_bytes / 1e9, 4),
        largest=float(f"{largest:.4g}"),
        rms=float(f"{math.sqrt(squares / reference_squares):.4g}"),
    )


def markdown(cells: Sequence[Cell], errors: Sequence[WeightError], losses: Sequence[PackingLoss] = ()) -> str:
    rows = sorted({cell.rows for cell in cells})
    found = {(cell.kernel, cell.rows): cell for cell in cells}
    names = list(dict.fromkeys(cell.kernel for cell in cells))
    headings = ("kernel, weights", *map(str, rows))
    times = [(name, *(f"{found[name, count].ms:.1f}" for count in rows)) for name in names]
    rates = [(name, *(f"{found[name, count].tokens_per_s:.0f}" for count in rows)) for name in names]
    wrong = [
        (
            f"{each.packing}, from {each.source}",
            each.formats,
            f"{each.gb:.3f}",
            f"{each.largest:.2g}",
            f"{each.rms:.2g}",
        )
        for each in errors
    ]
    increases = [
        (f"{each.packing}, from {each.source}", each.dtype, f"{each.perplexity:.4f}", f"{each.increase:+.4%}")
        for each in losses
    ]
    return (
        f"Milliseconds by rows, all linear layers and the head, one thread:\n\n{table(headings, times)}\n"
        f"The same as tokens/s:\n\n{table(headings, rates)}\n"
        "Weights against the dequantised file:\n\n"
        + table(("packing", "formats", "GB", "largest error", "RMS error"), wrong)
        + "\nPerplexity, beside fp32 transformers on the same weights:\n\n"
        + table(("packing", "engine.dtype", "perplexity", "increase"), increases)
    )


def main() -> None:
    arguments = _parser().parse_args()
    rows = [count for count in ROWS if count <= arguments.max_rows]
    set_threads(1)
    load = machine.load_average()
    files = fetch_model(arguments.model)
    opened = open_checkpoint(files.weights)
    checkpoints: dict[str, Checkpoint] = {"file": opened, "numbers": NumbersOnly(opened)}
    cells: list[Cell] = []
    with torch.inference_mode():
        for kernel in all_kernels():
            multiply = kernel.make(list(matrices_of(checkpoints[kernel.source], kernel.mode)))
            cells += measure(kernel, multiply, rows, arguments.seconds)
            print(f"ablation: {kernel.name}: {[cell.ms for cell in cells[-len(rows) :]]} ms", file=sys.stderr)
            del multiply
    errors = [
        weight_error(source, checkpoint, mode, checkpoints["numbers"])
        for source, checkpoint in checkpoints.items()
        for mode in PackingMode
    ]
    text = NaturalText.read(files.tokenizer_json)
    windows = text.windows(random.Random(SEED), arguments.windows, WINDOW_TOKENS)
    losses = list(packing_losses(checkpoints, windows, 1)) if windows else []
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_before": load,
        "machine": machine.describe(),
        "model": arguments.model,
        "threads": 1,
        "instructions": library.instructions(),
        "seconds": arguments.seconds,
        "kernels": [dataclasses.asdict(cell) for cell in cells],
        "weights": [dataclasses.asdict(each) for each in errors],
        "windows": arguments.windows,
        "losses": [dataclasses.asdict(each) for each in losses],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ablation.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "ablation.md").write_text(markdown(cells, errors, losses))
    sys.stdout.write(markdown(cells, errors, losses))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.ablation", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="default", help="as for octavo serve; without biases")
    parser.add_argument("--max-rows", type=int, default=ROWS[-1])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each kernel and number of rows")
    parser.add_argument("--windows", type=int, default=20, help="of text, for perplexity; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for ablation.json and ablation.md")
    return parser


if __name__ == "__main__":
    main()
