"""What lies between two products, against torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm, silu

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from tests.gpu.twins import EPS, TableOfRows, heads_of, norms_of, rotated
from workers.gpu.rows import add_norm, embed, gate, rotate_store

CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def test_embed_looks_up_the_token_of_each_slot_and_norms_it(device: torch.device) -> None:
    table = TableOfRows(device, [(0, 3), (2, 0)])
    table.memory.tokens[0, 3], table.memory.tokens[2, 0] = 4, -7
    embedding = torch.randn(9, 24, device=device).half()
    norm, x, y = (
        torch.rand(24, device=device),
        torch.empty(2, 24, device=device),
        torch.empty(2, 24, device=device).half(),
    )
    embed(table.memory, table.rows, embedding, x, norm, y, EPS)
    # A token below zero is that of a row which was not finite; it becomes no address.
    torch.testing.assert_close(x, embedding[[4, 0]].float())
    torch.testing.assert_close(y.float(), rms_norm(x, (24,), norm, EPS), **CLOSE)
    again = torch.empty_like(x)
    embed(table.memory, table.rows, embedding, again, norm, None, EPS)
    torch.testing.assert_close(again, x)


def test_add_norm_keeps_the_sum_and_returns_its_norm(device: torch.device) -> None:
    x, change = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device).half()
    norm, expected = torch.rand(40, device=device), x + change.float()
    y = add_norm(x, change, norm, torch.empty_like(change), EPS)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(y.float(), rms_norm(expected, (40,), norm, EPS), **CLOSE)


def test_gate(device: torch.device) -> None:
    both = torch.randn(2, 2 * 1100, device=device).half()
    left, right = both.float().chunk(2, -1)
    torch.testing.assert_close(gate(both).float(), silu(left) * right, **CLOSE)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_queries_are_turned_and_keys_and_values_stored(device: torch.device, dim: int, has_norm: bool) -> None:
    table = TableOfRows(device, [(0, 0), (0, 5), (1, 9)])
    heads, norms = heads_of(device, num=6, num_kv=2, dim=dim), norms_of(device, dim) if has_norm else None
    qkv = torch.randn(3, heads.size, device=device).half()
    keys, values = (torch.full((table.num_blocks + 1, 4, 2, dim), 7.0, device=device).half() for _ in range(2))
    queries = rotate_store(qkv, heads, norms, keys, values, table.memory, table.rows)
    expected_queries, expected_keys, expected_values = rotated(qkv, heads, norms, table.rows.positions)
    torch.testing.assert_close(queries.float(), expected_queries, **CLOSE)
    blocks, places = table.places()
    torch.testing.assert_close(keys[blocks, places].float(), expected_keys, **CLOSE)
    torch.testing.assert_close(values[blocks, places].float(), expected_values)
    keys[blocks, places] = values[blocks, places] = 7.0
    assert (keys == 7.0).all()
    assert (values == 7.0).all()
