"""Compute the reference's greedy answers to prompts.json, with the plain fp32 `transformers` model.

    python -m tests.oracle.regenerate            write answers.json
    python -m tests.oracle.regenerate --check    compare with answers.json; exit code 1 if they differ

Every position must have a gap of the two largest logits of at least 2e-3, or the prompt does not belong to the set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from cluster.models import fetch_model
from load_tests.rigs.reference import GAP, gaps, load_reference, reference_logits
from workers.weights.checkpoint import open_checkpoint

HERE = Path(__file__).parent
PROMPTS = HERE / "prompts.json"
ANSWERS = HERE / "answers.json"
NUM_TOKENS = 32


def compute() -> list[dict[str, Any]]:
    """Return, for each prompt, its name, token ids, greedy answer and smallest gap."""
    files = fetch_model("default")
    tokenizer = Tokenizer.from_file(str(files.tokenizer_json))
    model = load_reference(open_checkpoint(files.weights))
    entries = []
    for name, text in json.loads(PROMPTS.read_text()).items():
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        answer, gap = _greedy(model, prompt)
        assert gap >= GAP, f"{name}: the smallest gap is {gap:.1e}, below {GAP:.0e}"
        entries.append({"name": name, "prompt": prompt, "answer": answer, "gap": round(gap, 4)})
    return entries


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """Return the greedy answer, decoded step by step, and its smallest gap in one pass, which agrees."""
    answer: list[int] = []
    past, tokens = None, prompt
    for _ in range(NUM_TOKENS):
        output = model(torch.tensor([tokens]), past_key_values=past, use_cache=True, logits_to_keep=1)
        past, tokens = output.past_key_values, [int(output.logits[0, -1].argmax())]
        answer += tokens
    logits = reference_logits(model, prompt + answer)[len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer
    return answer, gaps(logits).min().item()


def differences(computed: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """Return the names of the prompts whose ids or answers differ; the gaps' last digits are the machine's."""
    expected = {entry["name"]: (entry["prompt"], entry["answer"]) for entry in committed}
    actual = {entry["name"]: (entry["prompt"], entry["answer"]) for entry in computed}
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


def main() -> int:
    entries = compute()
    if "--check" in sys.argv:
        different = differences(entries, json.loads(ANSWERS.read_text()))
        sys.stdout.write(f"different from the reference: {different}\n" if different else "up to date\n")
        return 1 if different else 0
    rows = ",\n ".join(json.dumps(entry) for entry in entries)
    ANSWERS.write_text(f"[\n {rows}\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
