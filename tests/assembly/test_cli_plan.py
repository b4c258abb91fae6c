"""`octavo plan` as a user sees it: the default model on a data sheet, a small one measured here, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cluster import machine
from cluster.cli import app
from tests.models.model_directories import CONFIG, write_directory
from workers import kernels
from workers.errors import ConfigError, ModelFileError, StartupError
from workers.native import library
from workers.types import ModelFiles

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def planned(*arguments: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return plan


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with as many tensors as a plan reads; figures are tried for a moment only."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "TRIES_S", 0.005)
    folder = write_directory(tmp_path / "small")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **SIZES, "tie_word_embeddings": True}))
    up = np.full((96, 64), 1 / 3, np.float32)
    save_file({"model.layers.0.mlp.up_proj.weight": up}, folder / "model.safetensors")
    return str(folder)


def test_a_data_sheet_and_the_model_s_own_shape_give_exact_figures(default_model: ModelFiles) -> None:
    assert default_model.weights.exists()
    plan = planned("--model", "default", "--device", "l4", "--context", "0")
    assert plan["num_parameters"] == 134_479_872
    assert plan["room"]["cache"] == "bf16"
    assert plan["room"]["bytes_per_token"] == 30 * 2 * 3 * 64 * 2
    assert plan["room"]["sequences"] == {"1024": 64, "8192": 8}
    assert [weights["weights"] for weights in plan["weights"]] == ["bf16", "int8", "int4"]
    bf16 = plan["weights"][0]
    assert bf16["memory_gb"] == pytest.approx(2 * 134_479_872 / 1e9)
    assert bf16["balanced_rows"] == pytest.approx(121e12 / 300e9)
    assert bf16["steps"][0] == {
        "rows": 1,
        "predicted_ms": pytest.approx(2 * 134_479_872 / 300e9 * 1e3),
        "bound": "memory",
        "measured_ms": None,
    }
    assert [weights["is_configured"] for weights in plan["weights"]] == [False, False, True], "its file has 4 bits"


@pytest.mark.skipif(library.library() is None, reason="the C library is not built")
@pytest.mark.parametrize(
    ("dtype", "cache", "products", "names"),
    [
        ("int8", "fp16", ["fp32", "int8", "int8 x int4"], ["bf16", "int8", "int4"]),
        ("fp32", "fp32", ["fp32"] * 4, ["fp32", "bf16", "int8", "int4"]),
    ],
)
def test_this_machine_is_measured(
    small_model: str, monkeypatch: pytest.MonkeyPatch, dtype: str, cache: str, products: list[str], names: list[str]
) -> None:
    monkeypatch.setenv("OCTAVO_ENGINE__DTYPE", dtype)
    plan = planned("--model", small_model, "--context", "20")
    assert plan["room"]["cache"] == cache
    assert plan["means"]["gb_per_s"] > 0
    assert sorted(plan["means"]["tflops"]) == sorted(set(products))
    assert [weights["weights"] for weights in plan["weights"]] == names
    assert [weights["products"] for weights in plan["weights"]] == products
    assert [weights["weights"] for weights in plan["weights"] if weights["is_configured"]] == [
        "int8" if dtype == "int8" else "fp32"
    ]
    for weights in plan["weights"]:
        assert [step["rows"] for step in weights["steps"]] == [1, 2, 4, 8, 16, 32, 64]
        assert all(step["measured_ms"] > 0 for step in weights["steps"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_where_torch_computes_nothing_is_measured_and_the_reason_said(
    small_model: str, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With bf16 keys and values have the type that products have, which is fp32 where the CPU multiplies no bf16."""
    monkeypatch.setenv("OCTAVO_ENGINE__KERNELS", "torch")
    monkeypatch.setenv("OCTAVO_ENGINE__DTYPE", dtype)
    plan = planned("--model", small_model, "--context", "0")
    assert plan["unmeasured"] == "torch computes: engine.kernels is 'torch'"
    assert [weights["weights"] for weights in plan["weights"]] == [dtype]
    has_bf16 = dtype == "bf16" and kernels.activations(torch.bfloat16) is torch.bfloat16
    assert plan["room"]["cache"] == ("bf16" if has_bf16 else "fp32")
    assert all(step["measured_ms"] is None for step in plan["weights"][0]["steps"])


def test_the_table_has_a_row_for_each_batch_size(small_model: str) -> None:
    text = run("--model", small_model, "--device", "h200", "--context", "0")
    lines = text.splitlines()
    assert lines[0].startswith("small  ")
    assert "4,800 GB/s, 990 TFLOP/s bf16 (NVIDIA H200 data sheet (SXM, 2024)), 141.0 GB free" in text
    assert "KV cache bf16: 256 bytes per token; sequences that fit: 64 of 128 tokens" in text
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["1", "2", "4", "8", "16", "32", "64"]
    assert "bf16 *" in text


def test_each_model_of_a_configuration_is_planned_for(small_model: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f"model = {json.dumps(small_model)}\n[models.a]\n[models.b]\nengine.num_blocks = 100\n")
    asked = ("--config", str(file), "--device", "l4", "--context", "0")
    both = json.loads(run(*asked, "--json"))
    assert [(plan["model"], plan["room"]["num_blocks"]) for plan in both] == [("a", 512), ("b", 100)]
    assert planned(*asked, "--model", "b") == both[1]


@pytest.mark.parametrize(
    ("arguments", "variables", "kind", "words"),
    [
        (["--device", "z80"], {}, ConfigError, "--device must be one of a10, .* is 'z80'"),
        (["--context", "128"], {}, ConfigError, r"--context must be in \[0, 127\] for small, is 128"),
        (["--device", "l4"], {"NUM_BLOCKS": "3"}, ConfigError, "engine.num_blocks must be >= 8, .* is 3"),
        (["--device", "l4"], {"MAX_MODEL_LEN": "129"}, ConfigError, "engine.max_model_len must be at most 128, .* 129"),
        (["--model", "nowhere.gguf"], {}, ModelFileError, "'nowhere.gguf' is none of these"),
    ],
)
def test_a_refusal_names_rule_and_value(
    small_model: str,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    variables: dict[str, str],
    kind: type[StartupError],
    words: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"OCTAVO_ENGINE__{name}", value)
    with pytest.raises(kind, match=words):
        run("--model", small_model, *arguments)
