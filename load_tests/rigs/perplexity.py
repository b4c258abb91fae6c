"""`python -m load_tests.rigs.perplexity --dtype int8`: what a way to compute costs in perplexity on natural text.

The engine's model, as `EngineConfig` of these options loads it, against plain transformers in fp32 on the same
dequantised weights, both over the same windows of Python's manual, drawn by a seed. Writes one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence

import torch

from cluster.models import fetch_model
from load_tests.natural_text import NaturalText
from load_tests.rigs.reference import load_reference, reference_logits
from load_tests.rigs.teacher import teacher_forced
from workers.build import read_manifest
from workers.config import DTYPES, KERNELS, WEIGHTS, EngineConfig
from workers.loading import load_model
from workers.weights.checkpoint import open_checkpoint

SEED = 20_251
"""Of the windows that are compared from one commit to the next."""
CHUNK_TOKENS = 256
"""Rows of a step."""

Logits = Callable[[list[int]], torch.Tensor]
"""Token ids to logits [tokens, vocab]."""


def perplexity(windows: Sequence[list[int]], logits: Logits) -> float:
    """Return exp of the mean loss of every token but the first of each window."""
    loss, count = 0.0, 0
    for window in windows:
        predicted = logits(window)[:-1].float()
        loss += torch.nn.functional.cross_entropy(predicted, torch.tensor(window[1:]), reduction="sum").item()
        count += len(window) - 1
    return math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.rigs.perplexity", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="default", help="as for octavo serve")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument(
        "--chunk-tokens", type=int, default=CHUNK_TOKENS, help="rows of a step; 1 is how answers are decoded"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()

    files = fetch_model(arguments.model)
    text = NaturalText.read(files.tokenizer_json)
    windows = text.windows(random.Random(arguments.seed), arguments.windows, arguments.window_tokens)
    config = EngineConfig(dtype=arguments.dtype, weights=arguments.weights, kernels=arguments.kernels)
    model = load_model(
        config, files, read_manifest(files.manifest), threads=arguments.threads, check=lambda shape: None
    )
    ours = perplexity(windows, lambda tokens: teacher_forced(model, tokens, arguments.chunk_tokens))
    torch.set_num_threads(arguments.threads)
    reference = load_reference(open_checkpoint(files.weights))
    theirs = perplexity(windows, lambda tokens: reference_logits(reference, tokens))
    report = {
        "dtype": model.dtype_name,
        "weights": arguments.weights,
        "kernels": model.kernels,
        "windows": arguments.windows,
        "window_tokens": arguments.window_tokens,
        "seed": arguments.seed,
        "perplexity": round(ours, 5),
        "reference": round(theirs, 5),
        "increase": round(ours / theirs - 1, 7),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
