"""Building engines: what is chosen, what is refused with which numbers, and a paged engine on a model of one layer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.gguf_files import VOCAB, random_tensors, write_gguf
from workers.build import build_engine, read_manifest
from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.fake import fake_manifest
from workers.memory import free_memory, size_pool
from workers.native import library
from workers.paged import choose_max_model_len
from workers.types import FinishReason, GenerateWork, ModelFiles, SamplingParams, SteppedEngine, TokenDelta, WorkId
from workers.weights.checkpoint import open_checkpoint

NewFiles = Callable[..., ModelFiles]
needs_library = pytest.mark.skipif(library.library() is None, reason="native kernels: the C library was not built")


@pytest.fixture
def new_files(tmp_path: Path) -> NewFiles:
    def make(vocab_size: int = VOCAB, max_model_len: int = 64) -> ModelFiles:
        weights = write_gguf(tmp_path / "model.gguf", random_tensors())
        manifest = tmp_path / "manifest.json"
        manifest.write_text(fake_manifest(vocab_size=vocab_size, max_model_len=max_model_len).to_json())
        return ModelFiles(weights=weights, tokenizer_json=tmp_path / "absent", chat_template=None, manifest=manifest)

    return make


def built(config: EngineConfig, files: ModelFiles) -> SteppedEngine:
    return build_engine(config, files, hash_key=b"key", threads=torch.get_num_threads())


def build(config: EngineConfig, files: ModelFiles) -> list[TokenDelta]:
    """Build, answer one request, close."""
    engine = built(config, files)
    work_id = WorkId("test", 1)
    engine.submit(
        GenerateWork(work_id=work_id, prompt=[1, 2, 3], sampling=SamplingParams(temperature=0.0), max_tokens=4)
    )
    deltas = []
    while engine.step():
        deltas += engine.drain_outputs()
    assert engine.load().num_free_blocks == engine.info.num_blocks
    engine.close()
    return deltas


def test_paged(new_files: NewFiles) -> None:
    deltas = build(EngineConfig(dtype="fp32", num_blocks=16), new_files())
    assert sum(len(delta.token_ids) for delta in deltas) == 4
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.reason is FinishReason.LENGTH


def test_info(new_files: NewFiles) -> None:
    engine = build_engine(
        EngineConfig(dtype="bf16", kernels="torch", max_model_len=32, max_num_sequences=3),
        new_files(),
        hash_key=b"key",
        threads=torch.get_num_threads(),
    )
    info = engine.info
    assert (info.engine, info.dtype, info.vocab_size, info.max_model_len) == ("paged", "bf16", VOCAB, 32)
    assert info.num_blocks == 3 * 2
    assert info.kernels in ("onednn", "fp16", "widened")


@needs_library
def test_native_kernels(new_files: NewFiles) -> None:
    """Heads of 16 are no whole groups, so that nothing can be rounded to int8."""
    for dtype, chosen in (("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        info = built(EngineConfig(dtype=dtype, num_blocks=16), new_files()).info
        assert info.dtype == chosen
        assert info.kernels.startswith("native ")
    with pytest.raises(ConfigError, match="must be multiples of 32, are 64, 16, 64"):
        built(EngineConfig(dtype="int8", num_blocks=16), new_files())


@needs_library
def test_nothing_is_packed_that_is_not_used(new_files: NewFiles, tmp_path: Path) -> None:
    """What activations can be rounded to is known from the shape, before minutes of packing."""
    files = replace(new_files(), packed=tmp_path / "packed")
    with pytest.raises(ConfigError, match="must be multiples of 32"):
        built(EngineConfig(dtype="int8", num_blocks=16), files)
    assert not list((tmp_path / "packed").glob("*.packed"))
    assert built(EngineConfig(num_blocks=16), files).info.dtype == "fp32"
    assert [path.name for path in (tmp_path / "packed").glob("*.packed")] == ["exact.packed"]


def test_torch_computes_no_int8(new_files: NewFiles) -> None:
    with pytest.raises(ConfigError, match=r"engine.dtype must be auto, fp32 or bf16 here, is 'int8'"):
        built(EngineConfig(dtype="int8", kernels="torch"), new_files())


def test_fake_opens_the_manifest_alone(new_files: NewFiles, tmp_path: Path) -> None:
    files = replace(new_files(), weights=tmp_path / "absent.gguf")
    deltas = build(EngineConfig(engine="fake"), files)
    assert sum(len(delta.token_ids) for delta in deltas) == 4


def test_one_poisoned_request_fails_alone(new_files: NewFiles) -> None:
    """A request with an adapter that nobody loaded ends with an error, its neighbour with an answer."""
    engine = build_engine(
        EngineConfig(dtype="fp32", num_blocks=16), new_files(), hash_key=b"key", threads=torch.get_num_threads()
    )
    for number, adapter in enumerate(("absent", "")):
        engine.submit(GenerateWork(work_id=WorkId("t", number), prompt=[5, 6], max_tokens=3, adapter=adapter))
    finishes = {}
    while engine.step():
        for delta in engine.drain_outputs():
            if delta.finish is not None:
                finishes[delta.work_id.number] = delta.finish.reason
    assert finishes == {0: FinishReason.ERROR, 1: FinishReason.LENGTH}


def test_the_worker_imports_what_it_needs_alone() -> None:
    """Nothing that computes before it is known what does; nothing that reads models before one is opened."""
    program = (
        "import sys, workers.build, workers.data_plane, workers.fake, workers.paged, workers.thread;"
        "assert not {'torch', 'transformers', 'gguf', 'safetensors', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=150)


START = """
import pathlib, sys
from workers.build import build_engine
from workers.config import EngineConfig
from workers.types import GenerateWork, ModelFiles, SamplingParams, WorkId

weights, manifest, packed = map(pathlib.Path, sys.argv[1:])
files = ModelFiles(
    weights=weights, tokenizer_json=weights, chat_template=None, manifest=manifest, packed=packed
)
engine = build_engine(EngineConfig(dtype="fp32", num_blocks=16, lookup_tokens=2), files, hash_key=b"key", threads=1)
each = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, top_k=5, top_p=0.9, min_p=0.01),
    SamplingParams(seed=2, repetition_penalty=1.5, logit_bias={3: 1.0}),
]
for number, sampling in enumerate(each):
    work_id = WorkId("test", number)
    engine.submit(GenerateWork(work_id=work_id, prompt=[1, 2, 3], sampling=sampling, max_tokens=4, num_logprobs=2))
while engine.step():
    pass
engine.close()
assert engine.info.kernels.startswith("native "), engine.info.kernels
print(*sorted({"torch", "transformers", "gguf", "safetensors"} & sys.modules.keys()))
"""


@needs_library
def test_a_replica_imports_no_torch(new_files: NewFiles, tmp_path: Path) -> None:
    """It took longer to import than all else that a replica does to start, and half of a small replica's memory. What
    reads GGUF files is imported to pack, and not again: the file is gone when the replica starts later."""
    files = replace(new_files(), packed=tmp_path / "packed")

    def imported() -> list[str]:
        command = [sys.executable, "-c", START, *map(str, (files.weights, files.manifest, files.packed))]
        return subprocess.run(command, check=True, timeout=150, stdout=subprocess.PIPE, text=True).stdout.split()

    assert imported() == ["gguf"]
    files.weights.unlink()
    assert imported() == []


def test_manifests(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_manifest(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ModelFileError, match="is no manifest: KeyError"):
        read_manifest(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ModelFileError, match="is no manifest: RecursionError"):
        read_manifest(tmp_path / "deep.json")


def test_files_that_do_not_fit_together(new_files: NewFiles) -> None:
    files = new_files(vocab_size=99)
    with pytest.raises(ModelFileError, match="a vocabulary of 99, its weights have 32"):
        build(EngineConfig(), files)
    with pytest.raises(ConfigError, match=r"engine.max_model_len must be at most 64, for which fake is made; is 65"):
        build(EngineConfig(max_model_len=65), new_files())


def test_sliding_windows_that_would_matter_are_refused(new_files: NewFiles) -> None:
    shape = replace(open_checkpoint(new_files().weights).shape, sliding_window=40)
    manifest = fake_manifest(vocab_size=VOCAB, max_model_len=64)
    with pytest.raises(ModelFileError, match="a sliding window of 40 tokens"):
        choose_max_model_len(EngineConfig(), manifest, shape)
    assert choose_max_model_len(EngineConfig(max_model_len=40), manifest, shape) == 40


def test_pool_from_free_memory() -> None:
    config = EngineConfig(kv_memory_fraction=0.5, max_num_sequences=4)
    size = size_pool(config, bytes_per_block=1000, max_model_len=100, free_bytes=40_000)
    assert size.num_blocks == 20
    assert "20 blocks of 16 tokens x 1,000 bytes" in size.explanation
    plenty = size_pool(config, bytes_per_block=1000, max_model_len=100, free_bytes=10**9)
    assert plenty.num_blocks == 4 * 7


def test_pool_of_a_node_that_others_share() -> None:
    config = EngineConfig(kv_memory_fraction=0.5, max_num_sequences=4, replicas_per_node=2)
    size = size_pool(config, bytes_per_block=1000, max_model_len=100, free_bytes=40_000)
    assert size.num_blocks == 10
    assert "engine.kv_memory_fraction 0.5 of 0.00 GB free / 2 replicas of a node" in size.explanation


def test_pool_for_usual_sequences_or_one_of_the_longest() -> None:
    """A long context does not take all memory away; but a request that is as long as it may be is always served."""
    config = EngineConfig(max_num_sequences=3)
    size = size_pool(config, bytes_per_block=1000, max_model_len=2_048, free_bytes=10**9)
    assert size.num_blocks == 3 * 1_024 // 16
    assert "engine.max_num_sequences 3 of 1,024 tokens each" in size.explanation
    long = size_pool(config, bytes_per_block=1000, max_model_len=8_192, free_bytes=10**9)
    assert long.num_blocks == 8_192 // 16


def test_pool_that_does_not_fit() -> None:
    config = EngineConfig(kv_memory_fraction=0.5)
    with pytest.raises(ModelFileError, match=r"needs 7 blocks x 1,000,000 bytes = 0.01 GB"):
        size_pool(config, bytes_per_block=10**6, max_model_len=100, free_bytes=13 * 10**6)


def test_pool_of_a_given_size() -> None:
    size = size_pool(EngineConfig(num_blocks=7), bytes_per_block=10**6, max_model_len=100, free_bytes=7 * 10**6)
    assert size.num_blocks == 7
    with pytest.raises(ConfigError, match=r"num_blocks must be >= 7, which one sequence of engine.max_model_len 100"):
        size_pool(EngineConfig(num_blocks=6), bytes_per_block=1, max_model_len=100, free_bytes=0)
    config = EngineConfig(num_blocks=9, replicas_per_node=2)
    with pytest.raises(ConfigError, match=r"<= 8, which 0.02 GB free / 2 replicas .* 1,000,000 bytes; is 9, 0.01 GB"):
        size_pool(config, bytes_per_block=10**6, max_model_len=100, free_bytes=16 * 10**6)


def test_free_memory_is_plausible() -> None:
    assert 2**20 < free_memory() < 2**50
