"""Accelerators as their makers' data sheets have them: what `octavo plan --device` calculates with.

All figures are of one device. Compute is dense bf16 with fp32 sums: data sheets print twice as much "with sparsity".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    tflops: float
    gb_per_s: float
    memory_gb: float
    source: str


_DEVICES = (
    Device("a10", 125, 600, 24, "NVIDIA A10 data sheet (2021)"),
    Device("a100", 312, 2_039, 80, "NVIDIA A100 data sheet (SXM, 80 GB, 2021)"),
    Device("a100-40", 312, 1_555, 40, "NVIDIA A100 data sheet (SXM, 40 GB, 2021)"),
    # Printed with sparsity: 1,979 (SXM), 1,513 (PCIe), 242 (L4).
    Device("h100", 989.5, 3_350, 80, "NVIDIA H100 data sheet (SXM, 2023)"),
    Device("h100-pcie", 756.5, 2_000, 80, "NVIDIA H100 data sheet (PCIe, 2022)"),
    Device("h200", 989.5, 4_800, 141, "NVIDIA H200 data sheet (SXM, 2024)"),
    Device("l4", 121, 300, 24, "NVIDIA L4 data sheet (2023)"),
    Device("l40s", 362.05, 864, 48, "NVIDIA L40S data sheet (2023)"),
    Device("rtx4090", 165.2, 1_008, 24, "NVIDIA Ada GPU architecture white paper (2022), GeForce RTX 4090"),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """Raises ConfigError."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, is {name!r}") from None
