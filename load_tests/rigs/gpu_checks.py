"""Does the engine compute on this GPU what it should? The oracle's rules, with the kernels that are measured for speed.

    python -m load_tests.rigs.gpu_checks --out FILE [--weights GGUF]

Logits are teacher-forced against plain transformers on the same weights, on the GPU, in every way in which rows are
computed there: prompts at once and in chunks, one row at a time, two at a time. Answers of the engine to the oracle's
prompts are those that are committed, with any chunks, cache, graphs and preemptions. `--weights` are those of the
oracle; without them random models are all that is checked. Exit code 0: every bar is met.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from load_tests.bars import Bar, at_least, at_most, exit_code
from load_tests.rigs.gpu_engine import RandomCheckpoint, manifest
from load_tests.rigs.gpu_teacher import WAYS, reference_logits, reference_model, teacher_forced
from load_tests.rigs.reference import GAP, gaps
from workers.config import EngineConfig
from workers.cuda import gpu_memory
from workers.engine import PagedEngine
from workers.gpu.model import GpuModel
from workers.paged_on_gpu import assemble_on_device
from workers.types import GenerateWork, SamplingParams, WorkId
from workers.weights.checkpoint import Checkpoint, open_checkpoint
from workers.weights.shape import from_config

ORACLE = Path(__file__).parents[2] / "tests" / "oracle" / "answers.json"
MAX_ERROR = 1e-3
"""Of logits in fp32."""
MAX_RMS_RATIO, TAU = 1.1, 2.0
"""The rule for bf16: the RMS error of transformers' own, and how much of its largest error a gap may be where a token
differs."""
_SMALL = {
    "hidden_act": "silu",
    "vocab_size": 8_000,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4_096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
RANDOM = {
    "qwen3": _SMALL
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 1_536,
        "tie_word_embeddings": True,
    },
    "llama": _SMALL
    | {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 512,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 2_048,
        "tie_word_embeddings": False,
    },
}
Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "at once": {},
    "chunks of 24, no cache": {"chunk_tokens": 24, "max_num_sequences": 8, "prefix_cache": False},
    "no graphs": {"max_graph_rows": 0},
    "preempted": {"chunk_tokens": 64, "num_blocks": 40, "max_model_len": 512},
}


class Checks:
    def __init__(self) -> None:
        self.bars: list[Bar] = []

    def add(self, bar: Bar) -> None:
        self.bars.append(bar)
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.bar}: {bar.value} (bar {bar.limit}) {bar.detail}", flush=True)

    def logits(self, name: str, checkpoint: Checkpoint, tokens: Sequence[int]) -> float:
        """Hold fp32 and bf16 against transformers'; return the gap that is large enough to tell tokens in bf16."""
        expected = reference_logits(reference_model(checkpoint, torch.float32), tokens)
        theirs = reference_logits(reference_model(checkpoint, torch.bfloat16), tokens) - expected
        exact, rounded = (GpuModel(checkpoint, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16))
        is_clear = gaps(expected) >= GAP
        for way in WAYS:
            logits = teacher_forced(exact, tokens, way)
            detail = f"{len(tokens)} tokens, logits' RMS {_rms(expected):.2f}"
            self.add(at_most(f"{name}, fp32, {way}: largest error", _largest(logits - expected), MAX_ERROR, detail))
            differing = int((logits.argmax(-1) != expected.argmax(-1))[is_clear].sum())
            self.add(at_most(f"{name}, fp32, {way}: differing tokens", differing, 0))
            error = teacher_forced(rounded, tokens, way) - expected
            detail = f"{_rms(error):.4f}, transformers' bf16 {_rms(theirs):.4f}"
            self.add(at_most(f"{name}, bf16, {way}: RMS ratio", _rms(error) / _rms(theirs), MAX_RMS_RATIO, detail))
        return TAU * _largest(theirs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.gpu_checks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--weights", type=Path, help="the GGUF file of the oracle")
    arguments = parser.parse_args(argv)
    checks = Checks()

    def attempt(name: str, check: Callable[[], object]) -> None:
        try:
            check()
        except Exception as error:
            checks.add(Bar(name, None, 0, False, f"{type(error).__name__}: {error}"))
        arguments.out.write_text(json.dumps({"bars": [vars_of(bar) for bar in checks.bars]}, indent=1) + "\n")

    generator = torch.Generator().manual_seed(1)
    for name, config in RANDOM.items():
        checkpoint = RandomCheckpoint(from_config(config), std=0.2)
        tokens = torch.randint(0, 8_000, (150,), generator=generator).tolist()
        attempt(f"random {name}", lambda name=name, own=checkpoint, t=tokens: checks.logits(f"random {name}", own, t))
        attempt(f"random {name}, cancelled", lambda own=checkpoint: cancel_half(checks, own))
    if arguments.weights is not None:
        real = open_checkpoint(arguments.weights)
        attempt("SmolLM2-135M", lambda: check_real(checks, real))
    return exit_code(checks.bars)


def vars_of(bar: Bar) -> dict[str, object]:
    return {name: getattr(bar, name) for name in ("bar", "value", "limit", "ok", "detail")}


def check_real(checks: Checks, checkpoint: Checkpoint) -> None:
    entries = json.loads(ORACLE.read_text())
    longest = max(entries, key=lambda entry: len(entry["prompt"]))
    tau = checks.logits("SmolLM2-135M", checkpoint, [*longest["prompt"], *longest["answer"]])
    reference = reference_model(checkpoint, torch.float32)
    prompts = [entry["prompt"] for entry in entries] * 2
    expected = [entry["answer"] for entry in entries] * 2
    num_tokens = len(expected[0])
    for dtype in (torch.float32, torch.bfloat16):
        model = GpuModel(checkpoint, dtype, "cuda")
        for name, keys in SETTINGS.items():
            engine = _engine(model, **keys)
            fits = [len(prompt) + num_tokens <= engine.info.max_model_len for prompt in prompts]
            asked, wanted = list(compress(prompts, fits)), list(compress(expected, fits))
            answers = _answers(engine, asked, num_tokens)
            load = engine.load()
            engine.check_integrity()
            engine.close()
            if dtype is torch.float32:
                wrong = sum(answer != own for answer, own in zip(answers, wanted, strict=True))
                detail = f"{len(asked)} answers, {load.num_preemptions} preemptions, {load.prefix_cache_hits} cached"
                checks.add(at_most(f"SmolLM2-135M, fp32, {name}: answers that are not the oracle's", wrong, 0, detail))
            else:
                worst = max(_worst_gap(reference, p, a) for p, a in zip(asked, answers, strict=True))
                detail = f"{sum(a != e for a, e in zip(answers, wanted, strict=True))} of {len(asked)} differ"
                checks.add(at_most(f"SmolLM2-135M, bf16, {name}: largest gap of a differing token", worst, tau, detail))
            if name == "preempted":
                checks.add(at_least(f"SmolLM2-135M, {model.dtype_name}: preemptions", load.num_preemptions, 1))
            if name == "at once":
                checks.add(at_least(f"SmolLM2-135M, {model.dtype_name}: cached tokens", load.prefix_cache_hits, 1))


def cancel_half(checks: Checks, checkpoint: Checkpoint) -> None:
    """Cancel every other of 200 requests while they run; no block may stay behind, and nobody else may notice."""
    model = GpuModel(checkpoint, torch.bfloat16, "cuda")
    engine = _engine(model, num_blocks=2_000, max_model_len=1_024, chunk_tokens=512)
    prompts = [[(7 * i + 3 * k) % 8_000 for k in range(5 + i % 90)] for i in range(200)]
    for i, prompt in enumerate(prompts):
        engine.submit(_work(i, prompt, 40))
    answered = [0] * 200
    for number in range(10_000):
        if number == 12:
            for i in range(0, 200, 2):
                engine.abort(WorkId("check", i))
        goes_on = engine.step()
        for delta in engine.drain_outputs():
            answered[delta.work_id.number] += len(delta.token_ids)
        if not goes_on:
            break
    engine.check_integrity()
    load = engine.load()
    left = load.num_blocks - load.num_free_blocks
    engine.close()
    name = f"{checkpoint.shape.architecture}, half of 200 cancelled"
    checks.add(at_most(f"{name}: blocks left behind", left, 0))
    whole = sum(count == 40 for count in answered[1::2])
    checks.add(at_least(f"{name}: whole answers", whole, 100, f"{sum(answered[::2])} tokens of the cancelled"))


def _engine(model: GpuModel, **keys: Any) -> PagedEngine:
    defaults: Settings = {"max_num_sequences": 256, "max_model_len": 2_048, "num_blocks": 4_096}
    config = EngineConfig(device="cuda", **(defaults | keys))
    config.check()
    return assemble_on_device(config, model, manifest(model.shape), hash_key=b"checks", memory=gpu_memory())


def _answers(engine: PagedEngine, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Return what the engine says to all `prompts`: half of them at once, the others when these have answers."""
    answers: list[list[int]] = [[] for _ in prompts]
    half = len(prompts) // 2
    for part in (range(half), range(half, len(prompts))):
        for i in part:
            engine.submit(_work(i, prompts[i], num_tokens))
        while engine.step():
            for delta in engine.drain_outputs():
                answers[delta.work_id.number] += delta.token_ids
    return answers


def _work(number: int, prompt: list[int], num_tokens: int) -> GenerateWork:
    params = SamplingParams(temperature=0.0)
    return GenerateWork(work_id=WorkId("check", number), prompt=prompt, max_tokens=num_tokens, sampling=params)


def _worst_gap(reference: Any, prompt: list[int], answer: list[int]) -> float:
    """Return by how much the reference preferred another token to one of `answer`, at most."""
    logits = reference_logits(reference, [*prompt, *answer])[len(prompt) - 1 : -1]
    differs = logits.argmax(-1).cpu() != torch.tensor(answer)
    return max(_values(gaps(logits).cpu()[differs]), default=0.0)


def _values(tensor: torch.Tensor) -> Iterator[float]:
    yield from tensor.tolist()


def _largest(error: torch.Tensor) -> float:
    return error.abs().max().item()


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


if __name__ == "__main__":
    sys.exit(main())
