"""Attention of prompts and chunks over blocks: by a kernel of the flash-attn family if one is installed, else by torch.

    vllm             FlashAttention 3 as vLLM brings it along; its library is loaded by itself, without importing vLLM
    flash-attn 3     module flash_attn_interface
    flash-attn 4     module flash_attn.cute
    flash-attn 2     module flash_attn; blocks must be multiples of 256 tokens
    sdpa             torch alone: a sequence's blocks are gathered and attended to, one sequence after the other

Each is tried on a small problem before it is taken, and passed over if it fails or disagrees with `sdpa`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.gpu.layout import Rows

_log = logging.getLogger(__name__)


HostSpans = tuple[list[int], list[int]]
"""The ends and the lengths of `Spans`."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Chunks of a step, one behind the other: chunk i has `rows` ``[ends[i], ends[i + 1])``, which are the last ones of
    ``lengths[i]`` tokens. Rows behind the last chunk are padding, and chunks of no rows too."""

    rows: Rows
    tables: torch.Tensor
    """[n, blocks] int32."""
    ends: torch.Tensor
    """[n + 1] int32: 0 and then where each chunk ends."""
    lengths: torch.Tensor
    """[n] int32."""
    max_rows: int
    """No chunk has more."""
    max_length: int
    host: HostSpans | None = None
    """Ends and lengths for those who compute one chunk after the other, and would otherwise have to wait for them."""


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, torch.Tensor], None]
"""Maps queries [rows, heads, dim] and keys and values in blocks [block, place, kv_head, dim] to the last tensor, of the
size of the first. What that has for rows of no chunk stays as it is, if the kernel is `CAPTURABLE`: others are given no
such rows."""


def sdpa(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor) -> None:
    block_size = keys.shape[1]
    ends, lengths = spans.host or (spans.ends.tolist(), spans.lengths.tolist())
    for i, length in enumerate(lengths):
        first, end = ends[i], ends[i + 1]
        if first == end:
            continue
        table = spans.tables[i, : -(-length // block_size)]
        k, v = (store[table].flatten(0, 1)[:length].transpose(0, 1)[None] for store in (keys, values))
        num_rows, mask = end - first, None
        if 1 < num_rows < length:
            mask = torch.ones(num_rows, length, dtype=torch.bool, device=queries.device).tril_(length - num_rows)
        mixed = scaled_dot_product_attention(
            queries[first:end].transpose(0, 1)[None],
            k,
            v,
            attn_mask=mask,
            is_causal=num_rows == length,
            enable_gqa=True,
        )
        out[first:end] = mixed[0].transpose(0, 1)


CAPTURABLE = ("flash-attn 3 of vllm", "flash-attn 3")
"""Kernels that compute the same steps as part of a CUDA graph, where all but `max_rows` and `max_length` is in the
device's memory."""


def choose(dtype: torch.dtype, size: tuple[int, int, int, int], device: torch.device) -> tuple[str, Attend]:
    """Return the first kernel that computes heads of this kind here, and its name. `size`: heads, key heads, their
    dimension, tokens of a block."""
    if device.type != "cuda" or dtype is torch.float32:
        return "sdpa", sdpa
    for name, load in _candidates():
        try:
            attend = load()
            _try(attend, dtype, size, device, is_padded=name in CAPTURABLE)
        except ImportError:
            continue
        except Exception as error:  # a library for another chip, or another release of it
            _log.warning("%s is installed and cannot be used: %s: %s", name, type(error).__name__, error)
            continue
        return name, attend
    _log.warning("no flash-attn is installed: prompts are attended to with torch, several times slower")
    return "sdpa", sdpa


def _candidates() -> Iterator[tuple[str, Callable[[], Attend]]]:
    yield "flash-attn 3 of vllm", _load_vllm
    yield "flash-attn 3", _load_3
    yield "flash-attn 4", _load_4
    yield "flash-attn 2", _load_2


def _try(
    attend: Attend, dtype: torch.dtype, size: tuple[int, int, int, int], device: torch.device, *, is_padded: bool
) -> None:
    """Raise unless `attend` agrees with torch. `is_padded`: with a chunk of no rows and rows of no chunk, too."""
    num_heads, num_kv_heads, dim, block_size = size
    num_rows, ends, lengths = 21, [0, 7, 8, 21], [7, 40, 33]
    if is_padded:
        num_rows, ends, lengths = 24, [*ends, 21], [*lengths, 0]
    num_chunks, num_blocks = len(lengths), -(-40 // block_size)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    order = torch.randperm(num_chunks * num_blocks, device=device, generator=generator).int()
    device_ends, device_lengths = (torch.tensor(own, dtype=torch.int32, device=device) for own in (ends, lengths))
    rows, tables = Rows(device_ends, device_ends), order.view(num_chunks, num_blocks)
    spans = Spans(rows, tables, device_ends, device_lengths, 13, 40, (ends, lengths))
    keys, values = (random(num_chunks * num_blocks, block_size, num_kv_heads, dim) for _ in range(2))
    queries = random(num_rows, num_heads, dim)
    own, expected = torch.zeros_like(queries), torch.zeros_like(queries)
    attend(queries, keys, values, spans, own)
    sdpa(queries, keys, values, spans, expected)
    error = (own - expected).float().abs().max().item()
    if not error < 0.05:
        raise ArithmeticError(f"is {error:.3g} away from torch")


def _load_vllm() -> Attend:
    spec = importlib.util.find_spec("vllm") or importlib.util.find_spec("vllm_fa3")
    if spec is None or spec.origin is None:
        raise ImportError
    found = sorted(Path(spec.origin).parent.rglob("_vllm_fa3_C*.so"))
    if not found:
        raise ImportError
    torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    forward: Any = torch.ops._vllm_fa3_C.fwd

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor
    ) -> None:
        unused = None
        forward(
            queries, keys, values, unused, unused, unused, out, spans.ends, unused, unused, unused, spans.lengths,
            spans.max_rows, spans.max_length, spans.tables, unused, unused, unused, unused, unused, unused, unused,
            unused, queries.shape[-1] ** -0.5, True, -1, -1, 0.0, True, unused, 0, unused, 0, unused, 1, 0, unused,
        )  # fmt: skip

    return attend


def _load_3() -> Attend:
    forward: Any = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor
    ) -> None:
        mixed = forward(
            queries, keys, values, cache_seqlens=spans.lengths, page_table=spans.tables, cu_seqlens_q=spans.ends,
            max_seqlen_q=spans.max_rows, causal=True,
        )  # fmt: skip
        is_of_chunk = torch.arange(len(out), device=out.device) < spans.ends[-1]
        torch.where(is_of_chunk[:, None, None], mixed, out, out=out)  # the others have what was in that memory before

    return attend


def _load_4() -> Attend:
    forward: Any = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor
    ) -> None:
        mixed = forward(
            queries, keys, values, cu_seqlens_q=spans.ends, seqused_k=spans.lengths, page_table=spans.tables,
            max_seqlen_q=spans.max_rows, causal=True,
        )  # fmt: skip
        out.copy_(mixed[0] if isinstance(mixed, tuple) else mixed)

    return attend


def _load_2() -> Attend:
    forward: Any = importlib.import_module("flash_attn").flash_attn_varlen_func

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor
    ) -> None:
        ends = torch.nn.functional.pad(spans.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        mixed = forward(
            queries, keys, values, spans.ends, ends, spans.max_rows, spans.max_length, causal=True,
            block_table=spans.tables,
        )  # fmt: skip
        out.copy_(mixed)

    return attend
