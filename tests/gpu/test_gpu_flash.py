"""Attention of chunks over blocks with torch alone, and the choice of a kernel for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

    tried = flash._try

    def on_cpu(attend: Attend, dtype: torch.dtype, size: tuple[int, int, int, int], device: object) -> None:
        tried(attend, dtype, size, torch.device("cpu"))

    monkeypatch.setattr(flash, "_candidates", candidates)
    monkeypatch.setattr(flash, "_try", on_cpu)
    assert flash.choose(torch.float16, SIZE, FakeGpu())[0] == "d"  # type: ignore[arg-type]
    monkeypatch.setattr(flash, "_candidates", lambda: iter([("c", wrong)]))
    assert flash.choose(torch.float16, SIZE, FakeGpu()) == ("sdpa", sdpa)  # type: ignore[arg-type]
