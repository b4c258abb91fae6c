"""One engine in a process of its own, measured case by case as its parent says: the child side of `gpu_bench`.

    python -m load_tests.rigs.gpu_contestant {octavo,vllm} MODEL FOLDER

Reads a line for each measurement, "CASE SEED", and writes a line of JSON for each, the first when it is ready. Whatever
else it writes goes to standard error. Ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

_BEGAN = time.monotonic()

from load_tests.rigs import gpu_cases  # noqa: E402  # the clock starts before anything is imported

SUBMITTED_AT_ONCE = 16
"""Works that an engine takes in before it looks whether they fill a step."""

Opened = tuple[gpu_cases.Generate, dict[str, Any], Callable[[], None]]
"""What generates, what there is to tell of it, and what closes it."""


def main(argv: Sequence[str]) -> int:
    engine, model, folder = argv
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print
    opener = open_vllm if engine == "vllm" else open_octavo
    generate, facts, close = opener(model, Path(folder))
    vocab_size = gpu_cases.CONFIGS[model]["vocab_size"]
    _tell(out, {"whole_start_s": time.monotonic() - _BEGAN, **facts})
    gpu_cases.warm_up(generate, gpu_cases.prompts_of(0, vocab_size))
    _tell(out, {"warm": True})
    cases = {case.name: case for case in gpu_cases.CASES}
    for line in sys.stdin:
        name, _, seed = line.strip().rpartition(" ")
        try:
            value = cases[name].measure(generate, gpu_cases.prompts_of(int(seed), vocab_size))
            _tell(out, {"value": value})
        except Exception as error:
            _tell(out, {"error": f"{type(error).__name__}: {error}"})
    close()
    return 0


def open_vllm(model: str, folder: Path) -> Opened:
    """vLLM with its defaults, but for what random weights need and for half of the memory, as there are two engines."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        TOKENIZERS_PARALLELISM="false",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    lacks = _missing_flashinfer()
    if lacks:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    import vllm
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    path = folder / model
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(gpu_cases.CONFIGS[model]))
    llm = LLM(
        model=str(path),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=gpu_cases.MAX_MODEL_LEN,
        disable_log_stats=True,
        gpu_memory_utilization=0.45,
    )
    ready = time.monotonic()

    def generate(prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(answer.outputs[0].token_ids) == num_tokens for answer in answers)
        return seconds

    facts = {"version": vllm.__version__, "lacks": lacks, "import_s": imported - _BEGAN, "start_s": ready - imported}
    return generate, facts, lambda: None


def _missing_flashinfer() -> str:
    try:
        import flashinfer  # noqa: F401
    except ImportError:
        return "FlashInfer, whose sampler vLLM would use: it samples with its own torch and Triton code instead"
    return ""


def open_octavo(model: str, folder: Path) -> Opened:
    """Ours, as the engine thread would step it. Greedy, as vLLM's."""
    del folder
    from load_tests.rigs.gpu_engine import CHUNK_TOKENS, open_engine
    from workers import garbage
    from workers.types import GenerateWork, SamplingParams, WorkId

    imported = time.monotonic()
    engine = open_engine(gpu_cases.CONFIGS[model])
    garbage.settle()
    ready = time.monotonic()
    params, number = SamplingParams(temperature=0.0), 0

    def generate(prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        nonlocal number
        began, num_answered = time.perf_counter(), 0
        for prompt in prompts:
            number += 1
            work_id = WorkId("bench", number)
            engine.submit(GenerateWork(work_id=work_id, prompt=prompt, max_tokens=num_tokens, sampling=params))
            if number % SUBMITTED_AT_ONCE == 0 and engine.load().owed_prefill_tokens >= CHUNK_TOKENS:
                engine.step()  # there is enough for a whole step: it need not wait for more
        while engine.step():
            num_answered += sum(len(delta.token_ids) for delta in engine.drain_outputs())
        seconds = time.perf_counter() - began
        assert num_answered == len(prompts) * num_tokens, f"{num_answered} tokens"
        engine.kv_events()
        return seconds

    info = engine.info
    facts = {"kernels": info.kernels, "dtype": info.dtype, "memory": info.memory}
    return generate, facts | {"import_s": imported - _BEGAN, "start_s": ready - imported}, engine.close


def _tell(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
