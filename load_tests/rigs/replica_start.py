"""`python -m load_tests.rigs.replica_start`: how long a replica takes from its creation to its first token.

On a Ray that runs, an actor does what a replica does: imports what it imports, opens the model, loads and packs it,
answers one token. Twice over a cache of its own: the first time weights are packed, the later time they are there. What
Serve adds around a replica is not in it. Writes {"first", "later"} to stdout, each {"seconds", "detail", "imported",
"peak_bytes"}; "imported" is which of torch, transformers and gguf the process has.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.config_sections import RayConfig
from cluster.models import fetch_model
from cluster.ray_connection import connected
from workers.config import DTYPES, KERNELS, WEIGHTS, EngineConfig

HEAVY = ("torch", "transformers", "gguf")
PROMPT = list(range(300, 364))


class ReplicaToBe:
    """The actor."""

    def first_token(self, model: str, cache_dir: str, config: EngineConfig, threads: int) -> dict[str, Any]:
        """Return what it took; the clock is the machine's, which the caller shares."""
        began = time.time()
        importlib.import_module("workers.serve")
        from workers.build import build_engine
        from workers.types import GenerateWork, SamplingParams, WorkId

        imported = time.time()
        files = fetch_model(model, cache_dir=Path(cache_dir))
        engine = build_engine(config, files, hash_key=b"replica start", threads=threads)
        loaded = time.time()
        engine.submit(
            GenerateWork(
                work_id=WorkId("start", 0), prompt=PROMPT, sampling=SamplingParams(temperature=0.0), max_tokens=1
            )
        )
        while engine.step():
            pass
        answered = time.time()
        return {
            "began": began,
            "imported_at": imported,
            "loaded_at": loaded,
            "answered_at": answered,
            "imported": [name for name in HEAVY if name in sys.modules],
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def start(model: str, cache_dir: str, config: EngineConfig, threads: int) -> dict[str, Any]:
    """Create an actor and let it answer; return its part of the report."""
    import ray  # not before `connected` has said how: Ray reads its variables when it is imported

    created = time.time()
    actor = ray.remote(num_cpus=1)(ReplicaToBe).remote()
    said = ray.get(actor.first_token.remote(model, cache_dir, config, threads))
    ray.kill(actor)
    marks = [created, said["began"], said["imported_at"], said["loaded_at"], said["answered_at"]]
    process, imports, loading, answer = (late - early for early, late in itertools.pairwise(marks))
    return {
        "seconds": round(marks[-1] - created, 2),
        "detail": f"process {process:.2f}, imports {imports:.2f}, model {loading:.2f}, first token {answer:.2f}",
        "imported": said["imported"],
        "peak_bytes": said["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.rigs.replica_start", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="default", help="as for octavo serve")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    config = EngineConfig(
        dtype=arguments.dtype, weights=arguments.weights, kernels=arguments.kernels, num_blocks=arguments.blocks
    )
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="octavo-start-") as cache, connected(RayConfig(), lambda text: None):
        fetch_model(arguments.model, cache_dir=Path(cache))  # the router has done that before there is any replica
        report = {which: start(arguments.model, cache, config, arguments.threads) for which in ("first", "later")}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
