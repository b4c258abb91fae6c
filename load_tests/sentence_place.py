"""Where sentence-transformers is (load_tests/engines/sentence_env.sh installs it), and its process's variables."""

from __future__ import annotations

import os
from pathlib import Path


def sentence_environment() -> Path:
    """Return OCTAVO_SENTENCE_ENV, or the default place; it need not exist."""
    default = Path.home() / ".cache" / "octavo-peers" / "sentence-transformers"
    return Path(os.environ.get("OCTAVO_SENTENCE_ENV") or default)


def sentence_variables(threads: int) -> dict[str, str]:
    """Return the environment variables of a process that computes with so many threads and downloads nothing."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
