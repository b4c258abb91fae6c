"""`make bench-engines`: what others' engines cost behind Octavo, held to its bars."""

from __future__ import annotations

import sys

from load_tests.rig_bench import Suite, main

SUITE = Suite(
    name="engines",
    description="What others' engines cost behind Octavo, held to its bars.",
    families={"vllm": "engines_vllm", "embeddings": "engines_embeddings"},
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
