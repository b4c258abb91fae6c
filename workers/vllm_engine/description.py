"""What routers are told of a replica that runs vLLM."""

from __future__ import annotations

from typing import Final

from workers.prefix import PrefixHasher
from workers.types import (
    CAPABILITY_FORMAT,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGIT_BIAS,
    CAPABILITY_LOGPROBS,
    CAPABILITY_RECEIVED_CHOICES,
    EngineInfo,
    ModelManifest,
)
from workers.vllm_engine.versions import Sizes

CAPABILITIES: Final = frozenset(
    {CAPABILITY_GENERATE, CAPABILITY_LOGPROBS, CAPABILITY_LOGIT_BIAS, CAPABILITY_RECEIVED_CHOICES}
)
"""Not CAPABILITY_RECEIVED_PENALTIES and CAPABILITY_RECEIVED_FORMAT: vLLM counts, and holds to a shape, only what it has
generated itself."""


def description(
    version: str, sizes: Sizes, manifest: ModelManifest, hasher: PrefixHasher, *, holds_formats: bool
) -> EngineInfo:
    """Return it. `holds_formats`: whether answers can be held to a shape."""
    return EngineInfo(
        engine="vllm",
        model=manifest.name,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks,
        max_model_len=sizes.max_model_len,
        vocab_size=manifest.vocab_size,
        model_fingerprint=manifest.model_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        weights_fingerprint=manifest.weights_fingerprint,
        hash_key_fingerprint=hasher.key_fingerprint,
        capabilities=CAPABILITIES | ({CAPABILITY_FORMAT} if holds_formats else set()),
        dtype=sizes.dtype,
        kernels=f"vllm {version}",
    )
