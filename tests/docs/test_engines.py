"""docs/engines.md: its table says what the engines' capabilities say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workers import types
from workers.config import DTYPES, ENGINES, EngineConfig
from workers.device_runner import DeviceRunner
from workers.fake import FakeEngine, FakeRunner, fake_manifest
from workers.models import quantised, transformers_loading
from workers.models.encoder import EncoderModel
from workers.paged import describe
from workers.prefix import PrefixHasher
from workers.runner import CpuRunner
from workers.vllm_engine import setup
from workers.vllm_engine.description import description

PAGE = Path(__file__).parents[2] / "docs/engines.md"
COLUMNS = ("paged, CPU", "paged, GPU", "transformers", "vllm", "fake")
ROWS = {
    types.CAPABILITY_GENERATE: "generation, `n`, stop ids, `min_tokens`",
    types.CAPABILITY_LOGPROBS: "log probabilities, `best_of` > `n`",
    types.CAPABILITY_LOGIT_BIAS: "`logit_bias`",
    types.CAPABILITY_FORMAT: "`response_format`",
    types.CAPABILITY_RECEIVED_FORMAT: "`response_format` of a resumed answer",
    types.CAPABILITY_RECEIVED_CHOICES: "resume: several choices",
    types.CAPABILITY_RECEIVED_PENALTIES: "resume: presence and frequency penalties",
    types.CAPABILITY_EMBED: "embeddings",
    types.CAPABILITY_CLASSIFY: "scores, reranking, classification",
}

LOOKUP, DTYPE = "prompt lookup (`engine.lookup_tokens`)", "`engine.dtype`"
ELSEWHERE = {
    "models": "oracle/test_transformers_engine.py",
    "runs on": "gpu/test_gpu_engine.py",
    "temperature, top-p, top-k, min-p, penalties": "workers/test_sampler.py",
    "resume: greedy answers": "data_plane/test_engines_alike.py",
    "resume: drawn answers": "data_plane/test_engines_alike.py",
    "seeds": "data_plane/test_engines_alike.py",
    "prefix cache, in the routers' index": "data_plane/test_engines_alike.py",
    "chunked prefill, preemption": "oracle/test_transformers_engine.py",
    "quantised files": "oracle/test_quantised.py",
    "ALiBi": "oracle/test_transformers_engine.py",
    "sliding windows": "workers/test_build.py",
    "tensor parallel": "vllm_engine/test_vllm_spread.py",
}
"""Rows that no engine says of itself, and the tests under tests/ that hold them; vLLM's own are in vllm_engine/."""


def table(heading: str) -> dict[str, list[str]]:
    """Return the cells of a section's table, by the first of each row."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def capabilities(column: str) -> frozenset[str]:
    engine = column.split(",", maxsplit=1)[0]
    manifest, hasher = fake_manifest(), PrefixHasher(b"", 16)
    if engine == "fake":
        return FakeEngine().info.capabilities
    if engine == "vllm":
        sizes: Any = SimpleNamespace(block_size=16, num_blocks=1, max_model_len=64, dtype="")
        return description("", sizes, manifest, hasher, holds_formats=True).capabilities
    shape = SimpleNamespace(vocab_size=manifest.vocab_size, max_positions=10**6, sliding_window=None)
    model: Any = SimpleNamespace(shape=shape, dtype_name="", kernels="")
    config = EngineConfig(engine=engine)
    able = describe(config, model, manifest, num_blocks=1, memory="", hasher=hasher).capabilities
    return able | pooled() if engine == "transformers" else able


def pooled() -> frozenset[str]:
    """Return what models do that `build_pooling` takes, with a head and without one."""
    told = EncoderModel.capabilities
    assert isinstance(told, property)
    assert told.fget is not None
    with_head, without = (told.fget(SimpleNamespace(has_head=has_head)) for has_head in (True, False))
    assert isinstance(with_head, frozenset)
    return with_head | without


def test_columns_are_the_engines() -> None:
    assert table("What each supports")[""] == list(COLUMNS)
    assert {column.split(",")[0] for column in COLUMNS} == set(ENGINES)


def test_every_capability_has_a_row() -> None:
    known = {value for name, value in vars(types).items() if name.startswith("CAPABILITY_")}
    assert known - {types.CAPABILITY_POOL} == ROWS.keys()


def test_every_row_is_held_by_a_test() -> None:
    rows = table("What each supports").keys() - {"", "---"}
    assert rows == {*ROWS.values(), *ELSEWHERE, LOOKUP, DTYPE}
    assert all((Path(__file__).parents[1] / path).exists() for path in ELSEWHERE.values())


@pytest.mark.parametrize("column", COLUMNS)
def test_capabilities_are_what_engines_say(column: str) -> None:
    cells = table("What each supports")
    told = {name: cells[row][COLUMNS.index(column)].split(",")[0] for name, row in ROWS.items()}
    assert told == {name: "yes" if name in capabilities(column) else "no" for name in ROWS}


def test_prompt_lookup() -> None:
    cells = [cell.split(":")[0] for cell in table("What each supports")[LOOKUP]]
    able = {True: "yes", False: "no"}
    on_cpu, on_gpu = able[CpuRunner.verifies_drafts], able[DeviceRunner.verifies_drafts]
    assert cells == [on_cpu, on_gpu, on_cpu, "no", able[FakeRunner.verifies_drafts]]


def test_dtypes() -> None:
    cells = table("What each supports")[DTYPE]
    told = [set(cell.split(", ")) for cell in cells]
    assert told[0] == set(DTYPES) - {"auto"}
    assert told[2] == set(transformers_loading.DTYPES)
    assert told[3] == set(setup.DTYPES) - {"auto"}


def test_quantisations() -> None:
    rows = table("Quantised checkpoints")
    methods = {
        row.split("`")[1]: cells[1] for row, cells in rows.items() if row.startswith("`") and cells[1] != "ran here"
    }
    served = {method for method, ran in methods.items() if "refused" not in ran}
    assert served == set(quantised.PACKAGES)
    assert {method for method, ran in methods.items() if ran.startswith("equal")} == served
    assert set(quantised.EXTRA) < served
