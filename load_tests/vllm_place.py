"""Where the environment with vLLM is (load_tests/engines/vllm_env.sh makes it)."""

from __future__ import annotations

import os
from pathlib import Path


def vllm_environment() -> Path:
    """Return OCTAVO_VLLM_ENV, or the default place; it need not exist."""
    return Path(os.environ.get("OCTAVO_VLLM_ENV") or Path.home() / ".cache" / "octavo-peers" / "vllm-engine")
