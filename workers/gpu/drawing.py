"""From logits on the device to tokens, by the rules of `workers.sampler`: one program a row. Needs triton.

    take_largest   the lowest token of the largest logit
    draw           temperature, min_p, top_k, top_p, then the first token, in the order of ids, at which the cumulative
                   probability exceeds the row's number

What top_k and top_p keep are all logits from some value on. It is looked for among the largest, of which
`NUM_CANDIDATES` are sorted, and else found by halving: with logits as integers in the order of the floats 32 looks at
the row are always enough. A row that is not finite gives token -1. Either kernel writes the token behind the row's
position, where the next step finds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.gpu.launch import launch
from workers.gpu.layout import Rows, StepMemory

PARTS = 16
"""Programs that look for a row's largest logit."""
NUM_CANDIDATES = 512
_TILE = 4096


@triton.jit
def _largest(row_logits, first, end, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest of the logits in [first, end), infinity for a NaN, and the lowest token that has it."""
    t = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_at = tl.zeros([TILE], tl.int32)
    for start in range(first, end, TILE):
        at = start + t
        x = tl.load(row_logits + at, mask=at < end, other=float("-inf"))
        x = tl.where(x != x, float("inf"), x)
        best_at = tl.where(x > best, at, best_at)
        best = tl.maximum(best, x)
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, best_at, end), 0)


@triton.jit
def _tell(token, row, drawn, tokens, slots, positions, slot_stride):  # type: ignore[no-untyped-def]
    tl.store(drawn + row, token)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    tl.store(tokens + slot * slot_stride + position + 1, tl.maximum(token, 0))


@triton.jit
def _take_largest(  # type: ignore[no-untyped-def]
    logits, part_values, part_tokens, arrivals, drawn, tokens, slots, positions, slot_stride, vocab_size, per,
    PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum(part * per + per, vocab_size)
    value, token = _largest(logits + row * vocab_size, part * per, end, TILE)
    tl.store(part_values + row * PARTS + part, value)
    tl.store(part_tokens + row * PARTS + part, token)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1:  # the others have ended
        tl.debug_barrier()
        tl.store(arrivals + row, 0)
        p = tl.arange(0, PARTS)
        values = tl.load(part_values + row * PARTS + p, cache_modifier=".cg")
        at = tl.load(part_tokens + row * PARTS + p, cache_modifier=".cg")
        value = tl.max(values, 0)
        token = tl.min(tl.where(values == value, at, vocab_size), 0)
        token = tl.where((value == float("inf")) | (value == float("-inf")), -1, token)
        _tell(token, row, drawn, tokens, slots, positions, slot_stride)


@triton.jit
def _scaled(row_logits, at, vocab_size, most, temperature):  # type: ignore[no-untyped-def]
    x = tl.load(row_logits + at, mask=at < vocab_size, other=float("-inf"))
    return tl.div_rn(x - most, temperature + tl.zeros_like(x))


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """Map floats to integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


LOWEST_KEY = tl.constexpr(-2139095041)
"""That of minus infinity. That of the largest scaled logit, which is zero, is zero."""


@triton.jit
def _kept_by_top_k(  # type: ignore[no-untyped-def]
    here, near, top_k, vocab_size, most, temperature, TILE: tl.constexpr, CANDIDATES: tl.constexpr
):
    """Return the least key of those of which fewer than `top_k` are larger; `near` are the largest, in order."""
    t, c = tl.arange(0, TILE), tl.arange(0, CANDIDATES)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    kth = tl.min(tl.where(c < top_k, near, float("inf")), 0)
    low, high = tl.full([], LOWEST_KEY, tl.int32), tl.full([], 0, tl.int32)
    low = tl.where(has_top_k & (top_k <= CANDIDATES), _key(kth), low)
    for _ in range(tl.where(has_top_k & (top_k > CANDIDATES), 31, 0)):
        middle = low + ((high - low) >> 1)
        above = tl.zeros([], tl.int32)
        for start in range(0, vocab_size, TILE):
            x = _scaled(here, start + t, vocab_size, most, temperature)
            above += tl.sum((_key(x) > middle).to(tl.int32), 0)
        is_enough = above < top_k
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    return low


@triton.jit
def _mass_above(here, key, least, vocab_size, most, temperature, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sum of the weights of keys greater than `key`."""
    t = tl.arange(0, TILE)
    mass = tl.zeros([], tl.float64)
    for start in range(0, vocab_size, TILE):
        x = _scaled(here, start + t, vocab_size, most, temperature)
        is_above = (x >= least) & (_key(x) > key)
        mass += tl.sum(tl.where(is_above, tl.exp(x), 0.0).to(tl.float64), 0)
    return mass


@triton.jit
def _kept_by_top_p(  # type: ignore[no-untyped-def]
    here, near, kept_from, least, top_p, vocab_size, most, temperature, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Return the least key of those that have less than `top_p` of the mass of `kept_from` and more above them."""
    c = tl.arange(0, CANDIDATES)
    mass = _mass_above(here, kept_from - 1, least, vocab_size, most, temperature, TILE) * top_p
    is_near = (near >= least) & (_key(near) >= kept_from)
    weights = tl.where(is_near, tl.exp(near), 0.0).to(tl.float64)
    # How many candidates have less than that mass before them: those that are kept.
    few, many = tl.full([], 1, tl.int32), tl.full([], CANDIDATES, tl.int32)
    for _ in range(BITS):
        middle = (few + many + 1) >> 1
        is_less = tl.sum(tl.where(c < middle - 1, weights, 0.0), 0) < mass
        few = tl.where(is_less, middle, few)
        many = tl.where(is_less, many, tl.maximum(middle - 1, few))
    last_kept = tl.min(tl.where((c < few) & is_near, near, float("inf")), 0)
    is_found = tl.sum(weights, 0) >= mass
    low, high = kept_from, tl.full([], 0, tl.int32)
    for _ in range(tl.where(is_found, 0, 32)):
        middle = low + ((high - low) >> 1)
        is_enough = _mass_above(here, middle, least, vocab_size, most, temperature, TILE) < mass
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough | (low >= high), low, middle + 1)
    return tl.where(is_found, tl.maximum(_key(last_kept), kept_from), low)


@triton.jit
def _weights(here, at, kept_from, least, vocab_size, most, temperature):  # type: ignore[no-untyped-def]
    x = _scaled(here, at, vocab_size, most, temperature)
    is_kept = (x >= least) & (_key(x) >= kept_from)
    return tl.where(is_kept, tl.exp(x.to(tl.float64)), 0.0)


@triton.jit
def _token_at(  # type: ignore[no-untyped-def]
    here, number, kept_from, least, vocab_size, most, temperature, TILE: tl.constexpr, TILE_BITS: tl.constexpr
):
    """Return the first token at which the cumulative weight exceeds `number` of all."""
    t = tl.arange(0, TILE)
    target = tl.zeros([], tl.float64)
    for start in range(0, vocab_size, TILE):
        target += tl.sum(_weights(here, start + t, kept_from, least, vocab_size, most, temperature), 0)
    target = target * number
    before, seen = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    tile = tl.zeros([], tl.int32)
    for start in range(0, vocab_size, TILE):
        own = tl.sum(_weights(here, start + t, kept_from, least, vocab_size, most, temperature), 0)
        # The last tile that has some weight, and no more than the target before it.
        is_here = (own > 0) & (seen <= target)
        tile = tl.where(is_here, start, tile)
        before = tl.where(is_here, seen, before)
        seen += own
    weights = _weights(here, tile + t, kept_from, least, vocab_size, most, temperature)
    few, many = tl.full([], 0, tl.int32), tl.full([], TILE - 1, tl.int32)
    for _ in range(TILE_BITS):
        middle = (few + many) >> 1
        is_beyond = before + tl.sum(tl.where(t <= middle, weights, 0.0), 0) > target
        many = tl.where(is_beyond, middle, many)
        few = tl.where(is_beyond, few, tl.minimum(middle + 1, many))
    last = tl.max(tl.where(weights > 0, t, 0), 0)
    return tile + tl.minimum(few, last)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, numbers, candidates, drawn, tokens, slots, positions, slot_stride, vocab_size, TILE: tl.constexpr,
    TILE_BITS: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * vocab_size
    most, token = _largest(here, 0, vocab_size, TILE)
    is_finite = (most != float("inf")) & (most != float("-inf"))
    temperature = tl.load(numbers + row * 5).to(tl.float32)
    if (temperature > 0) & is_finite:
        number = tl.load(numbers + row * 5 + 1)
        top_p = tl.load(numbers + row * 5 + 2)
        least = tl.load(numbers + row * 5 + 3).to(tl.float32)
        top_k = tl.load(numbers + row * 5 + 4).to(tl.int32)
        near = tl.load(candidates + row * CANDIDATES + tl.arange(0, CANDIDATES))
        near = tl.div_rn(near - most, temperature + tl.zeros_like(near))
        kept_from = _kept_by_top_k(here, near, top_k, vocab_size, most, temperature, TILE, CANDIDATES)
        if top_p < 1:
            kept_from = _kept_by_top_p(
                here, near, kept_from, least, top_p, vocab_size, most, temperature, TILE, CANDIDATES, BITS
            )
        token = _token_at(here, number, kept_from, least, vocab_size, most, temperature, TILE, TILE_BITS)
    _tell(tl.where(is_finite, token, -1), row, drawn, tokens, slots, positions, slot_stride)


class Drawer:
    """Owns what was drawn for the rows of a step, until the next one."""

    def __init__(self, max_rows: int, memory: StepMemory, device: torch.device) -> None:
        self._memory = memory
        self.drawn = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._values = torch.empty(max_rows * PARTS, dtype=torch.float32, device=device)
        self._tokens = torch.empty(max_rows * PARTS, dtype=torch.int32, device=device)
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def take_largest(self, logits: torch.Tensor, rows: Rows) -> None:
        """`logits` [rows, vocab] fp32; `rows` are those that they follow."""
        num_rows, vocab_size = logits.shape
        per = triton.cdiv(triton.cdiv(vocab_size, PARTS), 1024) * 1024
        launch(
            _take_largest, (num_rows, PARTS),
            logits, self._values, self._tokens, self._arrivals, self.drawn, self._memory.tokens, rows.slots,
            rows.positions, self._memory.tokens.stride(0), vocab_size, per, PARTS=PARTS, TILE=1024, num_warps=4,
        )  # fmt: skip

    def draw(self, logits: torch.Tensor, rows: Rows, numbers: torch.Tensor, *, sorts: bool) -> None:
        """`numbers` [rows, 5] fp64: temperature (0: the largest), u in [0, 1), top_p, the least scaled logit kept,
        top_k (0: all). `sorts`: whether any row has top_k or top_p."""
        num_rows, vocab_size = logits.shape
        count = min(NUM_CANDIDATES, 1 << (vocab_size.bit_length() - 1))
        candidates = logits.topk(count, dim=-1).values if sorts else logits[:, :count].contiguous()
        tile = min(_TILE, triton.next_power_of_2(vocab_size))
        launch(
            _draw, (num_rows,),
            logits, numbers, candidates, self.drawn, self._memory.tokens, rows.slots, rows.positions,
            self._memory.tokens.stride(0), vocab_size, TILE=tile, TILE_BITS=tile.bit_length(), CANDIDATES=count,
            BITS=count.bit_length(), num_warps=8,
        )  # fmt: skip
