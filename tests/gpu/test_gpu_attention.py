"""Decode attention over blocks, against the formula, however the context is split."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from tests.gpu.twins import TableOfRows, heads_of, norms_of, rotated
from workers.gpu import attention
from workers.gpu.attention import DecodeAttention, splits_of, tile_of


@pytest.mark.parametrize(
    ("dtype", "num", "dim", "has_norm", "num_programs"),
    [
        (torch.float32, 6, 16, True, 24),
        (torch.float16, 2, 16, False, 24),
        (torch.float16, 10, 24, True, 1),
    ],
)
def test_decode_attention(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num: int,
    dim: int,
    has_norm: bool,
    num_programs: int,
) -> None:
    """The first token of a sequence, one at the beginning of a block, and contexts of one and of several tiles."""
    monkeypatch.setattr(attention, "NUM_PROGRAMS", num_programs)
    table = TableOfRows(device, [(0, 0), (1, 64), (2, 299)], max_tokens=300)
    heads, norms = heads_of(device, num=num, num_kv=2, dim=dim), norms_of(device, dim) if has_norm else None
    cache = table.cache(2, dim, dtype)
    keys, values = cache.layers[0]
    qkv = torch.randn(3, heads.size, device=device).to(dtype)
    decode = DecodeAttention(heads, 3, device)
    out = torch.full((3, num * dim), torch.nan, dtype=dtype, device=device)
    for _ in range(2):  # it leaves its memory as it found it
        decode(qkv, norms, keys, values, table.memory, table.rows, out)
    queries, new_keys, new_values = rotated(qkv, heads, norms, table.rows.positions)
    blocks, places = table.places()
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(keys[blocks, places].float(), new_keys, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values[blocks, places].float(), new_values)
    for row in range(3):
        past_keys, past_values = (table.context(store, row).repeat_interleave(num // 2, 1) for store in (keys, values))
        weights = (torch.einsum("hd,lhd->hl", queries[row], past_keys) * dim**-0.5).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", weights, past_values).flatten()
        torch.testing.assert_close(out[row].float(), expected, rtol=tolerance, atol=tolerance)


def test_splits_keep_a_gpu_busy_and_are_no_more_than_needed() -> None:
    assert [splits_of(1, 8), splits_of(1, 3), splits_of(64, 8), splits_of(64, 3), splits_of(256, 8)] == [
        32,
        32,
        2,
        4,
        1,
    ]


@pytest.mark.parametrize(("num", "num_kv", "dim"), [(9, 3, 64), (16, 8, 128), (32, 8, 128)])
def test_each_kernel_has_a_number_of_rows_that_has_it_compiled(num: int, num_kv: int, dim: int) -> None:
    """A kernel for many rows was compiled when the first step of so many came, unless a graph of them was made."""
    device = torch.device("cpu")
    decode = DecodeAttention(heads_of(device, num=num, num_kv=num_kv, dim=dim, max_tokens=1), 1, device)

    def kind(num_rows: int) -> tuple[bool, tuple[int, int]]:
        return num_rows == 1, tile_of(num_rows * num_kv, num // num_kv, dim)

    for most in (1, 2, 100, 600):
        sizes = decode.sizes_of_kinds(most)
        assert [kind(size) for size in sizes] == list(dict.fromkeys(kind(size) for size in range(1, most + 1)))
        assert max(sizes) <= most
