"""Quantised checkpoints that transformers loads: what each method needs, and which cannot be served.

Reads the configuration alone, before anything is loaded, so that a missing package is named instead of what its absence
leads to. What a method computes is held against transformers by `probe.py`, as any model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final

from workers.errors import ModelFileError

PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao", "accelerate"),
    "compressed-tensors": ("compressed_tensors", "accelerate"),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel", "accelerate"),
}
"""What must be importable, by the `quant_method` of a config.json."""
EXTRA: Final = ("bitsandbytes", "torchao", "compressed-tensors")
"""Those whose packages `octavo[quantised]` installs."""
OUTLIER_THRESHOLD: Final = 6.0
"""What bitsandbytes takes for `llm_int8_threshold` where nothing is said."""


def check_quantisation(config: Mapping[str, Any]) -> None:
    """Raises ModelFileError if the model of this config.json is quantised in a way that is not served here."""
    described = config.get("quantization_config")
    if described is None:
        return
    if not isinstance(described, Mapping):
        raise ModelFileError(f"quantization_config must be an object, is {described!r}")
    method = method_of(described)
    if method not in PACKAGES:
        raise ModelFileError(
            f"it is quantised by {method or 'no method that is named'}, which is not served; {', '.join(PACKAGES)} are"
        )
    if missing := [name for name in PACKAGES[method] if find_spec(name) is None]:
        source = " (pip install octavo[quantised])" if method in EXTRA else ""
        raise ModelFileError(f"it is quantised by {method}, which needs the package {' and '.join(missing)}{source}")
    if described.get("load_in_8bit") and described.get("llm_int8_threshold", OUTLIER_THRESHOLD) > 0:
        raise ModelFileError(
            "it is quantised by bitsandbytes to 8 bits with outliers, which are those of all rows of a step: answers "
            "would depend on what is computed beside them. It can be served with llm_int8_threshold 0 in config.json"
        )


def method_of(described: Mapping[str, Any]) -> str:
    """Return the name of a method; bitsandbytes' older checkpoints have none."""
    if method := described.get("quant_method"):
        return str(method)
    return "bitsandbytes" if described.get("load_in_8bit") or described.get("load_in_4bit") else ""
