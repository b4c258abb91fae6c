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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from load_tests.bars import Bar, at_least, at_most, exit_code
from load_tests.rigs.gpu_engine import DEVICE, RandomCheckpoint, device_memory, manifest
from load_tests.rigs.gpu_teacher import WAYS, reference_logits, reference_model, teacher_forced
from load_tests.rigs.reference import GAP, gaps
from workers.config import EngineConfig
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
REAL = "SmolLM2-135M"
Settings = dict[str, Any]
Answers = Mapping[tuple[int, ...], list[int]]
"""By prompt; all are of the same length."""
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
        exact, rounded = (GpuModel(checkpoint, dtype, DEVICE) for dtype in (torch.float32, torch.bfloat16))
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

    def answers(
        self, name: str, checkpoint: Checkpoint, committed: Answers, way: tuple[torch.dtype, str], tau: float
    ) -> None:
        """Have an engine answer each prompt of `committed` twice, in the type and with the settings `way`. Where the
        fp32 reference prefers another token, given the same ones before it, it does so by little: GAP, in bf16 `tau`.
        In fp32 answers are those of `committed`."""
        dtype, settings = way
        model = GpuModel(checkpoint, dtype, DEVICE)
        name = f"{name}, {model.dtype_name}, {settings}"
        engine = _engine(model, **SETTINGS[settings])
        num_tokens = len(next(iter(committed.values())))
        prompts = [prompt for prompt in committed if len(prompt) + num_tokens <= engine.info.max_model_len] * 2
        answers = _answers(engine, prompts, num_tokens)
        engine.check_integrity()
        load = engine.load()
        engine.close()
        reference = reference_model(checkpoint, torch.float32)
        worst = max(_worst_gap(reference, *each) for each in zip(prompts, answers, strict=True))
        detail = f"{len(prompts)} answers, {load.num_preemptions} preemptions, {load.prefix_cache_hits} cached tokens"
        is_exact = dtype is torch.float32
        self.add(at_most(f"{name}: by how much another token was preferred", worst, GAP if is_exact else tau, detail))
        if is_exact:
            wrong = sum(answer != committed[prompt] for prompt, answer in zip(prompts, answers, strict=True))
            self.add(at_most(f"{name}: answers that are not the oracle's", wrong, 0, f"of {len(prompts)}"))
        if settings == "preempted":
            self.add(at_least(f"{name}: preemptions", load.num_preemptions, 1))
        if settings == "at once":
            self.add(at_least(f"{name}: cached tokens", load.prefix_cache_hits, 1))


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

    for name, config in RANDOM.items():
        checkpoint = RandomCheckpoint(from_config(config), std=0.2)
        attempt(f"random {name}", lambda name=f"random {name}", own=checkpoint: check_random(checks, name, own))
        attempt(f"random {name}, cancelled", lambda own=checkpoint: cancel_half(checks, own))
    if arguments.weights is not None:
        real = open_checkpoint(arguments.weights)
        attempt(REAL, lambda: check_real(checks, real))
    return exit_code(checks.bars)


def vars_of(bar: Bar) -> dict[str, object]:
    return {name: getattr(bar, name) for name in ("bar", "value", "limit", "ok", "detail")}


def check_real(checks: Checks, checkpoint: Checkpoint) -> None:
    entries = json.loads(ORACLE.read_text())
    longest = max(entries, key=lambda entry: len(entry["prompt"]))
    tau = checks.logits(REAL, checkpoint, [*longest["prompt"], *longest["answer"]])
    committed = {tuple(entry["prompt"]): entry["answer"] for entry in entries}
    for dtype in (torch.float32, torch.bfloat16):
        for settings in SETTINGS:
            checks.answers(REAL, checkpoint, committed, (dtype, settings), tau)


def check_random(checks: Checks, name: str, checkpoint: Checkpoint) -> None:
    """Check what only a step of an engine does, with graphs and without, in the type that steps with prompts have
    graphs in; to prompts as long as the oracle's, which begin alike where those do."""
    vocab_size, entries = checkpoint.shape.vocab_size, json.loads(ORACLE.read_text())
    generator = torch.Generator().manual_seed(1)
    tau = checks.logits(name, checkpoint, torch.randint(0, vocab_size, (150,), generator=generator).tolist())
    prompts = {tuple(token % vocab_size for token in entry["prompt"]): entry["answer"] for entry in entries}
    for settings in ("at once", "no graphs", "preempted"):
        checks.answers(name, checkpoint, prompts, (torch.bfloat16, settings), tau)


def cancel_half(checks: Checks, checkpoint: Checkpoint) -> None:
    """Cancel every other of 200 requests while they run; no block may stay behind, and nobody else may notice."""
    model = GpuModel(checkpoint, torch.bfloat16, DEVICE)
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
    return assemble_on_device(config, model, manifest(model.shape), hash_key=b"checks", memory=device_memory())


def _answers(engine: PagedEngine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
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


def _work(number: int, prompt: Sequence[int], num_tokens: int) -> GenerateWork:
    params = SamplingParams(temperature=0.0)
    return GenerateWork(work_id=WorkId("check", number), prompt=prompt, max_tokens=num_tokens, sampling=params)


def _worst_gap(reference: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return by how much the reference preferred another token to one of `answer`, at most."""
    logits = reference_logits(reference, [*prompt, *answer])[len(prompt) - 1 : -1]
    chosen = torch.tensor(answer, device=logits.device)[:, None]
    return (logits.amax(-1) - logits.gather(-1, chosen)[:, 0]).max().item()


def _largest(error: torch.Tensor) -> float:
    return error.abs().max().item()


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


if __name__ == "__main__":
    sys.exit(main())
