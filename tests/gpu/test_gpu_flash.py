"""Attention of chunks over blocks with torch alone, and the choice of a kernel for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from workers.gpu import flash
from workers.gpu.flash import Attend, Spans, sdpa
from workers.gpu.layout import Rows

SIZE = (6, 2, 8, 4)


def test_sdpa_attends_to_the_tokens_up_to_each_row() -> None:
    """A prompt, a chunk behind others, a single row."""
    heads, kv_heads, dim, block_size = SIZE
    counts, lengths = [5, 3, 1], [5, 10, 7]
    ends = [0, 5, 8, 9]
    tables = torch.randperm(9).view(3, 3).int()
    ints = torch.tensor(ends, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    spans = Spans(Rows(ints[0], ints[0]), tables, *ints, 5, 10, (ends, lengths))
    keys, values = torch.randn(2, 9, block_size, kv_heads, dim).unbind()
    queries, out = torch.randn(9, heads, dim), torch.empty(9, heads, dim)
    sdpa(queries, keys, values, spans, out)
    row = 0
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for seen in range(length - count + 1, length + 1):
            k, v = (
                store[tables[i].long()].flatten(0, 1)[:seen].repeat_interleave(heads // kv_heads, 1)
                for store in (keys, values)
            )
            weights = (torch.einsum("hd,lhd->hl", queries[row], k) * dim**-0.5).softmax(-1)
            torch.testing.assert_close(out[row], torch.einsum("hl,lhd->hd", weights, v))
            row += 1


def test_without_a_gpu_or_in_fp32_torch_attends() -> None:
    assert flash.choose(torch.bfloat16, SIZE, torch.device("cpu")) == ("sdpa", sdpa)
    assert flash.choose(torch.float32, SIZE, torch.device("cuda")) == ("sdpa", sdpa)


class FakeGpu:
    """Stands for a device where torch computes on the CPU."""

    type = "cuda"


def try_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = flash._try

    def on_cpu(
        attend: Attend, dtype: torch.dtype, size: tuple[int, int, int, int], device: object, *, is_padded: bool
    ) -> None:
        tried(attend, dtype, size, torch.device("cpu"), is_padded=is_padded)

    monkeypatch.setattr(flash, "_try", on_cpu)


def test_a_kernel_that_fails_or_is_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed is tried on a small problem first; what is not installed is no news."""

    def missing() -> Attend:
        raise ImportError

    def failing() -> Attend:
        raise OSError("built for another chip")

    def wrong() -> Attend:
        return lambda queries, keys, values, spans, out: out.zero_()

    def candidates() -> Iterator[tuple[str, Callable[[], Attend]]]:
        yield from (("a", missing), ("b", failing), ("c", wrong), ("d", lambda: sdpa), ("e", wrong))

    monkeypatch.setattr(flash, "_candidates", candidates)
    try_on_cpu(monkeypatch)
    assert flash.choose(torch.float16, SIZE, FakeGpu())[0] == "d"  # type: ignore[arg-type]
    monkeypatch.setattr(flash, "_candidates", lambda: iter([("c", wrong)]))
    assert flash.choose(torch.float16, SIZE, FakeGpu()) == ("sdpa", sdpa)  # type: ignore[arg-type]


def with_garbage(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, cache_seqlens: torch.Tensor,
    page_table: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Stands for FlashAttention 3, whose result is memory of its own: rows of no chunk have what was there before."""
    assert causal
    unused = Rows(cu_seqlens_q, cu_seqlens_q)
    out = torch.full_like(queries, torch.nan)
    sdpa(queries, keys, values, Spans(unused, page_table, cu_seqlens_q, cache_seqlens, max_seqlen_q, 0), out)
    return out


def garbage_too(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, out: torch.Tensor
) -> None:
    out.fill_(torch.nan)
    sdpa(queries, keys, values, spans, out)


def test_flash_attn_3_leaves_rows_of_no_chunk_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had for them went on to the layers behind, whose keys and values of padding are in the spare block, and
    that block is part of tables: a NaN there is one in the answers of others."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_with_kvcache=with_garbage))
    monkeypatch.setattr(flash, "_candidates", lambda: iter([("flash-attn 3", flash._load_3)]))
    try_on_cpu(monkeypatch)
    assert flash.choose(torch.float16, SIZE, FakeGpu())[0] == "flash-attn 3"  # type: ignore[arg-type]


def test_only_who_pads_steps_needs_a_kernel_that_leaves_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    try_on_cpu(monkeypatch)
    for name, chosen in (("flash-attn 2", "flash-attn 2"), ("flash-attn 3", "sdpa")):
        monkeypatch.setattr(flash, "_candidates", lambda name=name: iter([(name, lambda: garbage_too)]))
        assert flash.choose(torch.float16, SIZE, FakeGpu())[0] == chosen  # type: ignore[arg-type]
