"""The bench on a GPU, without one: its arithmetic, what its cases ask, how figures become bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from load_tests.rigs import gpu_cases
from load_tests.rigs.gpu_bench import Report, bars_of, table, write
from load_tests.rigs.gpu_cluster import TINY, Figures
from load_tests.rigs.gpu_cluster import bars_of as cluster_bars
from load_tests.rigs.gpu_model import sizes, write_model
from workers.weights.checkpoint import open_checkpoint
from workers.weights.shape import from_config

CASES = {case.name: case for case in gpu_cases.CASES}
SIZES = {name: gpu_cases.Size.of(config) for name, config in gpu_cases.CONFIGS.items()}


class Recorder:
    """Answers in a second for each token, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        self.asked.append(([list(prompt) for prompt in prompts], num_tokens))
        return float(num_tokens)

    def shapes(self) -> list[tuple[int, int, int]]:
        return [(len(prompts), len(prompts[0]), num_tokens) for prompts, num_tokens in self.asked]


@pytest.mark.parametrize(
    ("model", "weights", "kv", "floors"),
    [
        ("llama-3.1-8b", 15.01, 131_072, (3.51, 3.83, 4.82)),
        ("qwen3-0.6b", 1.192, 114_688, (0.283, 0.566, 1.43)),
        ("smollm2-135m", 0.269, 23_040, (0.064, 0.121, 0.294)),
    ],
)
def test_floors_of_a_decode_step(model: str, weights: float, kv: int, floors: tuple[float, ...]) -> None:
    """Those that were worked out by hand when the bars were set."""
    size = SIZES[model]
    assert size.weight_bytes / 1e9 == pytest.approx(weights, rel=1e-3)
    assert size.kv_bytes == kv
    for batch, floor in zip((1, 64, 256), floors, strict=True):
        assert CASES[f"decode {batch}"].floor(size) == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize(
    ("name", "shapes", "value"),
    [
        ("decode 64", [(64, 32, 8), (64, 32, 264)], 1e3),
        ("256 x 512+256", [(256, 512, 256)], 256.0),
        ("256 x 1024 shared+64+128", [(256, 1088, 128)], 2.0),
        ("first token of 4096", [(1, 4096, 1)] * 5, 1e3),
    ],
)
def test_a_case_asks_what_its_name_says(name: str, shapes: list[tuple[int, int, int]], value: float) -> None:
    recorder = Recorder()
    assert CASES[name].measure(recorder, gpu_cases.prompts_of(7, 1_000)) == value
    assert recorder.shapes() == shapes
    prompts = [tuple(prompt) for asked, _ in recorder.asked for prompt in asked]
    assert len(set(prompts)) == len(prompts)
    if "shared" in name:
        assert len({prompt[:1024] for prompt in prompts}) == 1
        assert len({prompt[1024:] for prompt in prompts}) == 256


def test_both_engines_are_asked_the_same() -> None:
    assert gpu_cases.prompts_of(3, 500)(20) == gpu_cases.prompts_of(3, 500)(20) != gpu_cases.prompts_of(4, 500)(20)


def test_the_best_of_the_rounds_is_compared(tmp_path: Path) -> None:
    report = Report({"gpu": "none"})
    for engine, decode, rate in (("octavo", (2.0, 1.0), (50.0, 90.0)), ("vllm", (4.0, 3.0), (45.0, 40.0))):
        report.engines[f"{engine} smollm2-135m"] = {"start_s": 5.0 if engine == "octavo" else 50.0}
        for number in range(2):
            for case, value in (("decode 256", decode[number]), ("256 x 512+256", rate[number])):
                report.runs.append(
                    {"model": "smollm2-135m", "case": case, "engine": engine, "round": number, "value": value}
                )
    bars = {bar.bar: bar for bar in bars_of(report)}
    assert len(bars) == 3
    step, rate_bar = (bars[f"smollm2-135m: {name}, ratio to vLLM"] for name in ("decode 256", "256 x 512+256"))
    assert (step.value, step.limit, step.ok) == (0.3333, 0.45, True)
    assert (rate_bar.value, rate_bar.limit, rate_bar.ok) == (2.0, 1.8, True)
    assert bars["smollm2-135m: start, ratio to vLLM"].value == 0.1
    lines = table(report, ["smollm2-135m"]).splitlines()
    assert len(lines) == 1 + len(gpu_cases.CASES) + 1
    assert lines[3].split()[3:] == ["1.000", "3.000", "0.294", "0.333", "0.45", "3.400", "0.667"]
    report.checks = {"bars": [{"bar": "checks", "value": 1.0, "limit": 1.0, "ok": True, "detail": ""}]}
    assert [bar.bar for bar in write(report, tmp_path / "gpu.json")][-1] == "checks"


def test_bars_of_the_cluster() -> None:
    throughput, first_token = cluster_bars(Figures(1_000.0, 10.0), Figures(790.0, 11.5))
    assert (throughput.value, throughput.ok) == (0.79, False)
    assert (first_token.value, first_token.ok) == (1.5, True)


def test_a_model_of_random_weights_can_be_opened(tmp_path: Path) -> None:
    config = gpu_cases.CONFIGS["qwen3-0.6b"] | TINY
    write_model(tmp_path, config)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape == from_config(config)
    for name, size in sizes(checkpoint.shape).items():
        assert checkpoint.tensor(name, *size).abs().max() > 0
