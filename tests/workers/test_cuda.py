"""Whether a replica computes on a GPU, how much of it a KV cache takes, and how such an engine is put together."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from tests.workers.fake_device import FakeDevice
from tests.workers.toy_engine import BLOCK_SIZE, toy_answer, work
from workers import cuda
from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.paged_on_gpu import assemble_on_device
from workers.types import ModelManifest, SamplingParams
from workers.weights.shape import ModelShape, Rope

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    vocab_size=50,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_size=8,
    max_positions=128,
    rope=Rope(),
    norm_eps=1e-5,
    tied_embeddings=True,
    qk_norm=False,
    qkv_bias=False,
    output_bias=False,
    ffn_bias=False,
)
MANIFEST = ModelManifest(
    name="toy",
    architecture="LlamaForCausalLM",
    vocab_size=50,
    max_model_len=128,
    eos_token_ids=(),
    bos_token_id=None,
    weights_format="safetensors",
    model_fingerprint="",
    tokenizer_fingerprint="",
    weights_fingerprint="",
)


@pytest.fixture
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER_FILES", (Path("/nowhere"),))


@pytest.mark.usefixtures("_no_driver")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_names_the_rule() -> None:
    assert cuda.choose_device(EngineConfig()) == "cpu"
    assert cuda.choose_device(EngineConfig(device="cpu")) == "cpu"
    with pytest.raises(ConfigError) as raised:
        cuda.choose_device(EngineConfig(device="cuda"))
    assert str(raised.value) == (
        "engine.device must be auto or cpu here, is 'cuda': no NVIDIA driver is loaded on this node"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "int8"}, "engine.dtype must be auto, bf16 or fp32 with engine.device cuda, is 'int8'"),
        ({"weights": "int4"}, "engine.weights must be auto, exact or bf16 with engine.device cuda, is 'int4'"),
        ({"kernels": "native"}, "engine.kernels must be auto with engine.device cuda, is 'native'"),
        ({"lookup_tokens": 3}, "engine.lookup_tokens must be 0 with engine.device cuda, is 3"),
    ],
)
def test_what_only_a_cpu_does_is_refused_with_cuda_and_decides_auto(
    asked: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "why_no_cuda", lambda: None)
    assert cuda.choose_device(EngineConfig()) == "cuda"
    assert cuda.choose_device(EngineConfig(**asked)) == "cpu"  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as raised:
        cuda.choose_device(EngineConfig(device="cuda", **asked))  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_a_driver_without_a_gpu_for_this_process_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "DRIVER_FILES", (tmp_path,))
    reason = cuda.why_no_cuda()
    assert reason is None or "must be installed" in reason or "without CUDA" in reason or "no GPU" in reason


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("device", "tpu", "must be one of auto, cpu, cuda"),
        ("gpu_memory_utilization", 1.0, "must be in (0, 1)"),
        ("max_graph_rows", -1, "must be in [0, 4096]"),
        ("chunk_tokens", -1, "must be >= 0"),
    ],
)
def test_keys_say_their_rules(key: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineConfig(**{key: value}).check()  # type: ignore[arg-type]
    assert str(raised.value) == f"engine.{key} {rule}, is {value!r}"


def size(free: int, total: int = 100_000, **keys: object) -> int:
    config = EngineConfig(block_size=16, **keys)  # type: ignore[arg-type]
    found = cuda.size_gpu_pool(config, bytes_per_block=100, max_model_len=160, free_bytes=free, total_bytes=total)
    assert f"{found.num_blocks:,} blocks" in found.explanation
    return found.num_blocks


def test_a_gpu_is_filled_up_to_its_utilization_whoever_fills_it() -> None:
    assert size(80_000) == 700
    assert size(80_000, gpu_memory_utilization=0.5) == 300
    assert size(80_000, num_blocks=50) == 50
    assert size(10**9, 10**9) == cuda.MAX_BLOCKS, "the host keeps books of each"
    assert size(10**9, 10**9, max_num_sequences=8_000) == 80_000, "unless they are needed"


def test_a_pool_that_does_not_fit_is_refused_with_the_sum() -> None:
    with pytest.raises(ModelFileError, match=r"needs 10 blocks x 100 bytes = 0\.00 GB.*raise engine\.gpu_memory_util"):
        size(10_900)
    for num_blocks in (9, 701):
        with pytest.raises(ConfigError, match=rf"engine\.num_blocks must be in \[10, 700\].*is {num_blocks}"):
            size(80_000, num_blocks=num_blocks)


@pytest.mark.parametrize("max_rows", [0, 1, 3, 8, 64, 100, 512, 4_096])
def test_graphs_are_close_and_few(max_rows: int) -> None:
    sizes = cuda.graph_sizes(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert max(sizes, default=0) == max_rows
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
    assert all(after <= 1.25 * before for before, after in itertools.pairwise(sizes) if before >= 32)
    assert len(sizes) <= 100


class ToyDeviceModel:
    shape = SHAPE
    dtype_name = "bf16"
    kernels = "toy"

    def __init__(self) -> None:
        self.opened: dict[str, object] = {}

    def bytes_per_block(self, block_size: int) -> int:
        return 10 * block_size

    def open(self, **options: object) -> FakeDevice:
        self.opened = options
        num_blocks, num_slots = options["num_blocks"], options["num_slots"]
        assert isinstance(num_blocks, int)
        assert isinstance(num_slots, int)
        return FakeDevice(num_blocks, num_slots)


def test_an_engine_is_put_together_on_a_device() -> None:
    model = ToyDeviceModel()
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_sequences=4)
    engine = assemble_on_device(config, model, MANIFEST, hash_key=b"key", memory=(6_000, 10_000))
    assert model.opened == {
        "num_blocks": 125,
        "block_size": BLOCK_SIZE,
        "num_slots": 8,
        "max_model_len": 128,
        "chunk_tokens": 8_192,
        "graph_sizes": (1, 2, 4),
    }
    assert (engine.info.num_blocks, engine.info.dtype, engine.info.kernels) == (125, "bf16", "toy")
    assert engine.load().credit_tokens == 2 * 8_192
    works = [work(n, [n, 2], 9, sampling=SamplingParams(temperature=0.0)) for n in range(3)]
    for one in works:
        engine.submit(one)
    tokens: dict[object, list[int]] = {}
    while engine.step():
        engine.check_integrity()
        for delta in engine.drain_outputs():
            tokens.setdefault(delta.work_id, []).extend(delta.token_ids)
    assert tokens == {one.work_id: toy_answer(one) for one in works}
    small = dataclasses.replace(config, max_graph_rows=0)
    assemble_on_device(small, model, MANIFEST, hash_key=b"key", memory=(6_000, 10_000))
    assert model.opened["graph_sizes"] == ()
