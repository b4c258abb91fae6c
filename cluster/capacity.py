"""What a step of a model costs and what a machine can do: the arithmetic of `octavo plan`. Numbers in, numbers out.

The roofline model (Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance model for multicore
architectures"): a step takes as long as the slower of reading its bytes and doing its operations,

    seconds = max( bytes / bandwidth, operations / compute )
    bytes      = weights, each read once for all rows      + rows x context x KV bytes per token
    operations = 2 x parameters x rows                     + rows x context x 4 x heads x head size x layers

Without a context the two sides meet at rows = compute / bandwidth x weights / (2 x parameters): with fewer rows memory
is the limit and more rows are nearly free, with more of them compute is. Knows no files, no clock and no machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.native.packing import GROUP, Format, num_panels
from workers.weights.shape import ModelShape

ROWS = (1, 2, 4, 8, 16, 32, 64)
CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Of one number of a key or a value."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How weights are kept: those of the layers, and embedding and head, where rounding costs most."""

    name: str
    layers: Format
    tables: Format


FP32 = WeightFormat("fp32", Format.F32, Format.F32)
BF16 = WeightFormat("bf16", Format.BF16, Format.BF16)
INT8 = WeightFormat("int8", Format.Q8, Format.Q8)
INT4 = WeightFormat("int4", Format.Q4, Format.Q8)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step of one row in each of some sequences needs."""

    num_parameters: int
    """That every row is multiplied with: all layers and the head."""
    weight_bytes: int
    """Of those, read once a step."""
    resident_bytes: int
    """`weight_bytes`, and the embedding where it is not the head as well."""
    kv_bytes_per_token: int
    attention_operations: int
    """Of one row, for each token of its context."""

    def num_bytes(self, rows: int, context: int) -> int:
        return self.weight_bytes + rows * context * self.kv_bytes_per_token

    def num_operations(self, rows: int, context: int) -> int:
        return rows * (2 * self.num_parameters + context * self.attention_operations)


@dataclass(frozen=True, slots=True)
class Speed:
    """A machine's, or a device's."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    rows: int
    ms: float
    bound: str
    """memory or compute."""


def demand(shape: ModelShape, weights: WeightFormat, cache: str) -> Demand:
    """Return what a model of `shape` needs with `weights` and a cache of the type `cache`."""
    sizes = layer_sizes(shape)
    table = (shape.vocab_size, shape.hidden_size)
    layers = shape.num_layers * sum(matrix_bytes(weights.layers, *size) for size in sizes)
    head = matrix_bytes(weights.tables, *table)
    return Demand(
        num_parameters=shape.num_layers * sum(outputs * inputs for outputs, inputs in sizes) + table[0] * table[1],
        weight_bytes=layers + head,
        resident_bytes=layers + head + (0 if shape.tied_embeddings else head),
        kv_bytes_per_token=kv_bytes_per_token(shape, cache),
        attention_operations=4 * shape.num_heads * shape.head_dim * shape.num_layers,
    )


def layer_sizes(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of a layer's matrices: query, key and value; output; gate and up; down."""
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return (
        (queries + 2 * keys, hidden),
        (hidden, queries),
        (2 * shape.ffn_size, hidden),
        (hidden, shape.ffn_size),
    )


def matrix_bytes(form: Format, outputs: int, inputs: int) -> int:
    """Return what a matrix takes: scales, and the padding of a last panel of 16 outputs, included."""
    return num_panels(outputs) * form.panel_bytes(inputs)


def has_groups(shape: ModelShape) -> bool:
    """Whether the rows of all matrices are made of the groups that int8 and int4 have scales for."""
    return not any(inputs % GROUP for _, inputs in layer_sizes(shape))


def kv_bytes_per_token(shape: ModelShape, cache: str) -> int:
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * CACHE_BYTES[cache]


def num_fitting(num_blocks: int, block_size: int, num_tokens: int) -> int:
    """Return how many sequences of `num_tokens` a pool of blocks holds."""
    return num_blocks // -(-num_tokens // block_size)


def balanced_rows(needed: Demand, speed: Speed) -> float:
    """Return the rows at which doing a step's products takes as long as reading its weights; no context."""
    return speed.operations_per_s / speed.bytes_per_s * needed.weight_bytes / (2 * needed.num_parameters)


def predict(needed: Demand, speed: Speed, *, rows: Sequence[int], context: int) -> tuple[Prediction, ...]:
    """Return what a step of so many sequences, each with `context` tokens in the cache, takes at best."""
    return tuple(_predict(needed, speed, count, context) for count in rows)


def _predict(needed: Demand, speed: Speed, rows: int, context: int) -> Prediction:
    reading = needed.num_bytes(rows, context) / speed.bytes_per_s
    computing = needed.num_operations(rows, context) / speed.operations_per_s
    return Prediction(rows, 1e3 * max(reading, computing), "memory" if reading >= computing else "compute")
