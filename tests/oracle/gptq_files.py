"""Checkpoints of 4 bits as GPTQ and AWQ store them, of a plain one: each weight rounded to the nearest of its group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
DESCRIBED = {
    "gptq": {"quant_method": "gptq", "desc_act": False, "sym": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "zero_point": True, "version": "gemm"},
}
ORDER = {"gptq": (0, 1, 2, 3, 4, 5, 6, 7), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}
"""Which of eight numbers each 4 bits of an int32 hold, the lowest first."""


def save_by_groups(method: str, source: Path, directory: Path) -> None:
    """Write `source` with its projections quantised as `method` has them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            found = quantised(method, tensor.T)
            tensors |= {f"{name.removesuffix('weight')}{part}": values for part, values in found.items()}
        else:
            tensors[name] = tensor
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = DESCRIBED[method] | {"bits": 4, "group_size": GROUP}
    (directory / "config.json").write_text(json.dumps(config))


def quantised(method: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight [inputs, outputs], both multiples of `GROUP`."""
    groups = weight.float().reshape(-1, GROUP, weight.shape[1])
    least, most = groups.amin(1), groups.amax(1)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales.float()).round().clamp(1, 15)
    values = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).reshape(weight.shape)
    order = ORDER[method]
    if method == "awq":
        return {"qweight": packed(values, 1, order), "qzeros": packed(zeros, 1, order), "scales": scales}
    return {
        "qweight": packed(values, 0, order),
        "qzeros": packed(zeros - 1, 1, order),
        "scales": scales,
        "g_idx": (torch.arange(weight.shape[0]) // GROUP).to(torch.int32),
    }


def packed(values: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Return `values` of 0 to 15 as int32, eight in each along `dim`."""
    eights = values.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    sums = torch.zeros(eights.shape[:-1], dtype=torch.int64)
    for place, number in enumerate(order):
        sums |= eights[..., number] << (4 * place)
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32).movedim(-1, dim).contiguous()
