"""What vLLM is started with, and the load that its steps add up to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.types import ModelFiles
from workers.vllm_engine import on_cpu, setup
from workers.vllm_engine.directory import name_end
from workers.vllm_engine.totals import Totals
from workers.vllm_engine.versions import Sizes, StepStats, installed

SIZES = Sizes(block_size=16, num_blocks=100, max_model_len=1_000, step_tokens=500, max_num_sequences=4, dtype="float32")


def test_our_keys_become_arguments_and_vllms_have_the_last_word(tmp_path: Path) -> None:
    config = EngineConfig(
        engine="vllm",
        dtype="fp32",
        max_num_sequences=8,
        max_model_len=512,
        num_blocks=64,
        chunk_tokens=256,
        vllm={"max_num_seqs": 9, "tensor_parallel_size": 2},
    )
    found = setup.arguments(config, tmp_path)
    assert found == {
        "model": str(tmp_path),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_seqs": 9,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "max_model_len": 512,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 64,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    (tmp_path / "tokenizer.json").write_text("{}")
    assert setup.arguments(config, tmp_path)["skip_tokenizer_init"] is False


def test_on_a_cpu_it_is_one_process_with_short_steps() -> None:
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found = on_cpu.arguments({"max_num_seqs": 16}, unbound)
    assert found == {
        "worker_cls": on_cpu.WORKER,
        "distributed_executor_backend": on_cpu.IN_ONE_PROCESS,
        "max_num_batched_tokens": 512,
    }
    assert on_cpu.arguments({"max_num_seqs": 600}, unbound)["max_num_batched_tokens"] == 600
    own = {"distributed_executor_backend": "mp", "max_num_batched_tokens": 4_096, "worker_cls": "theirs"}
    assert on_cpu.arguments(own, unbound) == {}
    assert "max_num_batched_tokens" not in on_cpu.arguments({"enable_chunked_prefill": False}, unbound)


@pytest.mark.parametrize(
    ("given", "bind"),
    [({"tensor_parallel_size": 2}, "nobind"), ({}, "auto"), ({"pipeline_parallel_size": 2}, "nobind")],
)
def test_on_a_cpu_it_is_several_processes_where_it_has_to_be(given: dict[str, int], bind: str) -> None:
    assert "distributed_executor_backend" not in on_cpu.arguments(given, {"VLLM_CPU_OMP_THREADS_BIND": bind})


def test_a_type_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.dtype must be one of auto, fp32, bf16 with engine vllm, is 'int8'"):
        setup.arguments(EngineConfig(engine="vllm", dtype="int8"), tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"lookup_tokens": 2},
        {"weights": "int4"},
        {"kernels": "torch"},
        {"reserve": True},
        {"device": "cpu"},
        {"block_size": 32},
        {"kv_memory_fraction": 0.1},
    ],
)
def test_a_key_that_means_nothing_to_vllm_is_refused(given: dict[str, object], tmp_path: Path) -> None:
    (key,) = given
    with pytest.raises(ConfigError, match=rf"engine\.{key} must be .* with engine vllm"):
        setup.arguments(EngineConfig(engine="vllm", **given), tmp_path)  # type: ignore[arg-type]


def test_a_file_needs_a_place_for_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    files = ModelFiles(weights=file, tokenizer_json=file, chat_template=None, manifest=file)
    with pytest.raises(ModelFileError, match="vLLM reads directories"), setup.prepared(EngineConfig(), files, 1):
        pass


def test_a_tokenizer_out_of_a_file_knows_the_end() -> None:
    """vLLM 0.26 and 0.27 let an answer of a shape end with no other token."""
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<turn>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    name_end(tokenizer, None)
    assert tokenizer.eos_token_id is None
    name_end(tokenizer, [1, 2])
    assert tokenizer.eos_token_id == 1
    name_end(tokenizer, 2)
    assert tokenizer.eos_token_id == 1, "what it knows stays"


def test_it_has_the_threads_of_a_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Ray has made of the cores that it reserves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in setup.VARIABLES:
        monkeypatch.setenv(name, "theirs")
    files = ModelFiles(weights=tmp_path, tokenizer_json=tmp_path, chat_template=None, manifest=tmp_path)
    with setup.prepared(EngineConfig(engine="vllm"), files, 3) as prepared:
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert prepared.directory.is_dir()
        assert prepared.events_endpoint == f"ipc://{prepared.directory}/cache"
    assert not prepared.directory.exists()
    assert os.environ["HF_HUB_OFFLINE"] == "theirs"


def test_without_vllm_the_engine_says_what_is_missing() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install octavo\[vllm\]"):
            installed()


def stats(**fields: int | float) -> StepStats:
    given = {"num_running": 0, "num_waiting": 0, "kv_usage": 0.0, "cache_queries": 0, "cache_hits": 0}
    given |= {"num_preempted": 0, "num_prompt_tokens": 0, "num_generated_tokens": 0}
    return StepStats(**(given | fields))  # type: ignore[arg-type]


def test_steps_add_up_to_a_load() -> None:
    totals = Totals()
    totals.add(stats(num_running=2, kv_usage=0.1, cache_queries=40, cache_hits=16, num_prompt_tokens=40))
    totals.add(stats(num_running=3, kv_usage=0.25, num_preempted=1, num_generated_tokens=3))
    load = totals.load(SIZES, owed_tokens=300, num_open=4)
    assert (load.num_running, load.num_waiting, load.num_free_blocks) == (3, 1, 75)
    assert (load.prefix_cache_queries, load.prefix_cache_hits, load.num_preemptions) == (40, 16, 1)
    assert (load.num_computed_tokens, load.num_steps) == (27, 2)
    assert (load.credit_tokens, load.credit_sequences) == (700, 1)


def test_with_nothing_open_nothing_is_held_whatever_the_last_step_said() -> None:
    totals = Totals()
    totals.add(stats(num_running=2, kv_usage=0.1))
    load = totals.load(SIZES, owed_tokens=0, num_open=0)
    assert (load.num_running, load.num_waiting, load.num_free_blocks, load.credit_sequences) == (0, 0, 100, 5)


def test_a_full_engine_gives_no_credit() -> None:
    load = Totals().load(SIZES, owed_tokens=0, num_open=6)
    assert (load.credit_tokens, load.credit_sequences) == (0, 0)


def test_counts_add_up() -> None:
    totals = Totals()
    for _ in range(2):
        totals.add(StepStats(1, 0, 0.1, 40, 16, 0, 40, 3))
    counts = totals.counts(num_findable=12, num_removed=5, num_used=10)
    assert (counts.num_prompt_tokens, counts.num_generated_tokens) == (80, 6)
    assert (counts.num_evicted_blocks, counts.num_cached_blocks) == (5, 2)
    assert totals.counts(num_findable=3, num_removed=0, num_used=10).num_cached_blocks == 0
