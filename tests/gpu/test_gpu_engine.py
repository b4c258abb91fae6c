"""The whole way of a GPU, interpreted: an engine one step ahead of its device says what the CPU's own says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from tests.workers.random_models import write_random_model
from tests.workers.toy_engine import toy_info
from workers.config import EngineConfig
from workers.device_runner import DeviceRunner
from workers.engine import PagedEngine
from workers.gpu import attention, drawing
from workers.gpu.model import GpuModel
from workers.models.llama import LlamaModel
from workers.prefix import PrefixHasher
from workers.runner import CpuRunner
from workers.types import GenerateWork, SamplingParams, TokenLogprobs, WorkId
from workers.weights.checkpoint import Checkpoint, open_checkpoint

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 4, 20, 32
CONFIG = EngineConfig(chunk_tokens=12, max_num_sequences=3, block_size=BLOCK_SIZE)
SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.8, top_k=20, seed=5),
    SamplingParams(temperature=1.0, seed=6, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0.0, logit_bias={3: 4.0, 5: -100.0}),
]
Said = dict[int, tuple[list[int], list[TokenLogprobs]]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, as they are interpreted one after the other."""
    monkeypatch.setattr(attention, "NUM_PROGRAMS", 8)
    monkeypatch.setattr(drawing, "NUM_CANDIDATES", 8)


def gpu_engine(checkpoint: Checkpoint, device: torch.device) -> PagedEngine:
    opened = GpuModel(checkpoint, torch.float32, device).open(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_slots=6,
        max_model_len=MAX_MODEL_LEN,
        chunk_tokens=CONFIG.chunk_tokens,
        graph_sizes=(1, 4),
    )
    return engine_of(checkpoint, DeviceRunner(opened, BLOCK_SIZE), lag=1)


def cpu_engine(checkpoint: Checkpoint) -> PagedEngine:
    model = LlamaModel(checkpoint, torch.float32)
    cache = model.new_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return engine_of(checkpoint, CpuRunner(model.over(cache), cache), lag=0)


def engine_of(checkpoint: Checkpoint, runner: DeviceRunner | CpuRunner, lag: int) -> PagedEngine:
    info = dataclasses.replace(
        toy_info(NUM_BLOCKS),
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=checkpoint.shape.vocab_size,
    )
    return PagedEngine(CONFIG, info=info, runner=runner, hasher=PrefixHasher(b"key", BLOCK_SIZE), lag=lag)


def works(shared: int) -> list[GenerateWork]:
    """Prompts that begin alike, of 9 to 18 tokens: more than a step has room for; four of them for three places."""
    return [
        GenerateWork(
            work_id=WorkId("test", i),
            prompt=[*range(10, 10 + shared), *(30 + (7 * i + 5 * k) % 50 for k in range(1 + 3 * i))],
            max_tokens=3,
            sampling=sampling,
            num_logprobs=2 if i % 2 else None,
            stop_token_ids=frozenset({1, 2}),
            min_tokens=3 if i == 0 else 0,
        )
        for i, sampling in enumerate(SAMPLINGS)
    ]


def answers(engine: PagedEngine) -> Said:
    said: Said = {i: ([], []) for i in range(len(SAMPLINGS))}
    for work in works(shared=8):
        engine.submit(work)
    while engine.step():
        for delta in engine.drain_outputs():
            assert delta.finish is None or not delta.finish.error_message
            tokens, logprobs = said[delta.work_id.number]
            tokens += delta.token_ids
            logprobs += delta.logprobs
    engine.check_integrity()
    assert engine.load().num_free_blocks == NUM_BLOCKS
    engine.close()
    return said


def test_engine_on_a_device_says_what_the_cpu_says(tmp_path: Path, device: torch.device) -> None:
    """Chunks beside decodes, a prefix that is shared, padding, drawing of every kind, log probabilities."""
    checkpoint = open_checkpoint(write_random_model(tmp_path / "model", "qwen3-tied"))
    expected = answers(cpu_engine(checkpoint))
    said = answers(gpu_engine(checkpoint, device))
    for number, (tokens, logprobs) in expected.items():
        assert said[number][0] == tokens
        for own, theirs in zip(said[number][1], logprobs, strict=True):
            assert own.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [token for token, _ in own.top] == [token for token, _ in theirs.top]
