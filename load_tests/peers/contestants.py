"""Who takes part, and how each is started at its best: a command, variables, what says that it is ready, a driver.

Everything of the peers lies below one folder outside the repository (README.md says how it gets there).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from load_tests.completions_driver import CompletionsDriver
from load_tests.measurement import Driver
from load_tests.octavo_driver import OctavoDriver
from load_tests.server import ServerProcess

THREADS = 2
MODEL_FILE = "model/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = "smol-hf/tokenizer.json"
MODEL_NAME = "m"
LLAMA_SERVER = "llama/bin/llama-server"
START_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that answers. `replicas` are the pids of its processes that compute, if it says which."""

    address: str
    replicas: tuple[int, ...] = ()


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """What it is a configuration of, for people; bars compare families."""

    def missing(self, folder: Path) -> list[Path]:
        """Return which files below `folder` it needs and does not have."""

    def command(self, folder: Path, port: int) -> list[str]:
        """Return what starts it on `port`, or on one of its own."""

    def variables(self, folder: Path) -> Mapping[str, str]: ...

    def await_ready(self, server: ServerProcess, port: int) -> Ready:
        """Raises ServerError."""

    def driver(self, ready: Ready) -> AbstractAsyncContextManager[Driver]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """llama-server with 16 slots of 2,048 tokens. Without -c that many, a slot has no room for `longin`."""

    name: str
    family: str
    weights: str
    options: Sequence[str] = ()

    def missing(self, folder: Path) -> list[Path]:
        return _missing(folder, LLAMA_SERVER, self.weights)

    def command(self, folder: Path, port: int) -> list[str]:
        return [
            str(folder / LLAMA_SERVER),
            *("-m", str(folder / self.weights), "-t", str(THREADS), "-np", "16", "-c", "32768", "-cb", "--no-webui"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *self.options,
        ]

    def variables(self, folder: Path) -> Mapping[str, str]:
        return {}

    def await_ready(self, server: ServerProcess, port: int) -> Ready:
        return _await_health(server, port)

    def driver(self, ready: Ready) -> AbstractAsyncContextManager[Driver]:
        return CompletionsDriver(ready.address, model=MODEL_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """`vllm serve` with the dequantised weights, which it has no kernels for in their own format on a CPU."""

    name: str
    dtype: str
    family: str = "vLLM"
    program: str = "vllm/bin/vllm"
    weights: str = "smol-hf"
    """A directory. Both lie below the folder of the peers, unless they are absolute."""

    def missing(self, folder: Path) -> list[Path]:
        return _missing(folder, self.program, f"{self.weights}/model.safetensors")

    def command(self, folder: Path, port: int) -> list[str]:
        return [
            str(folder / self.program),
            *("serve", str(folder / self.weights), "--served-model-name", MODEL_NAME, "--dtype", self.dtype),
            *("--max-model-len", "4096", "--max-num-seqs", "16", "--enable-prompt-tokens-details"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]

    def variables(self, folder: Path) -> Mapping[str, str]:
        """Its threads are not bound to cores: on two of them its engine and its front end would share one."""
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(THREADS),
        }

    def await_ready(self, server: ServerProcess, port: int) -> Ready:
        return _await_health(server, port)

    def driver(self, ready: Ready) -> AbstractAsyncContextManager[Driver]:
        return CompletionsDriver(ready.address, model=MODEL_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Octavo:
    """`octavo serve` with one replica, reached through its router. Speculation and answer caches stay off.

    `model` is what --model gets; None: the model file that the peers have. `arithmetic` is the oracle's rule for its
    answers, "exact", "bf16" or "int8".
    """

    name: str
    arithmetic: str
    settings: Mapping[str, str]
    model: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    """Variables that are no configuration of Octavo's."""
    family: str = "Octavo"

    def missing(self, folder: Path) -> list[Path]:
        return [] if self.model is not None else _missing(folder, MODEL_FILE)

    def command(self, folder: Path, port: int) -> list[str]:
        model = self.model if self.model is not None else str(folder / MODEL_FILE)
        return [sys.executable, "-m", "cluster.cli", "serve", "--port", "0", "--replicas", "1", "--model", model]

    def variables(self, folder: Path) -> Mapping[str, str]:
        settings = {"THREADS": str(THREADS), "NUM_BLOCKS": "4096", "LOOKUP_TOKENS": "0", **self.settings}
        return {
            **{f"OCTAVO_ENGINE__{key}": value for key, value in settings.items()},
            **self.extra,
        }

    def await_ready(self, server: ServerProcess, port: int) -> Ready:
        line = json.loads(server.await_line("{", START_TIMEOUT_S))
        return Ready(str(line["address"]), tuple(int(replica["pid"]) for replica in line["replicas"]))

    def driver(self, ready: Ready) -> AbstractAsyncContextManager[Driver]:
        return OctavoDriver(ready.address)


LLAMA_SAME = "llama.cpp, same file"
LLAMA_BEST = "llama.cpp, Q4_0"
VLLM = "vLLM"

BF16 = Octavo(name="octavo-bf16", arithmetic="bf16", settings={"DTYPE": "bf16", "WEIGHTS": "exact"})
INT8 = Octavo(name="octavo-int8", arithmetic="int8", settings={"DTYPE": "int8"})
_PLAIN_MACHINE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}
"""As on a machine without AVX-512."""
TORCH = Octavo(
    name="octavo-torch", arithmetic="exact", settings={"DTYPE": "fp32", "KERNELS": "torch"}, extra=_PLAIN_MACHINE
)
"""As without a compiler, either."""
TORCH_BF16 = Octavo(
    name="octavo-torch-bf16", arithmetic="bf16", settings={"DTYPE": "bf16", "KERNELS": "torch"}, extra=_PLAIN_MACHINE
)
"""The same with weights in 16 bits."""

VLLM_BF16 = Vllm(name="vllm-bf16", dtype="bfloat16")
VLLM_FP32 = Vllm(name="vllm-fp32", dtype="float32")

_EVERYWHERE: tuple[Contestant, ...] = (
    BF16,
    LlamaCpp(name="llama-q4_1", family=LLAMA_SAME, weights=MODEL_FILE),
    INT8,
    LlamaCpp(name="llama-q4_0-fa", family=LLAMA_BEST, weights="model/q4_0.gguf", options=("-fa", "on", "--kv-unified")),
    TORCH,
    TORCH_BF16,
    LlamaCpp(name="llama-q4_0", family=LLAMA_BEST, weights="model/q4_0.gguf", options=("-fa", "off")),
)
"""In the order of a repetition: ours and the peers' take turns."""
_ON_REQUEST: tuple[Contestant, ...] = (
    VLLM_BF16,
    VLLM_FP32,
    LlamaCpp(name="llama-q8_0", family="llama.cpp, Q8_0", weights="model/q8_0.gguf", options=("-fa", "off")),
)


def defaults(instructions: Collection[str]) -> tuple[Contestant, ...]:
    """Return who takes part on a processor with these instructions.

    vLLM computes in the type that is faster there: without AVX-512 its bf16 falls back to kernels that take a second
    for each token.
    """
    return (*_EVERYWHERE, VLLM_BF16 if "avx512f" in instructions else VLLM_FP32)


def all_contestants() -> tuple[Contestant, ...]:
    return (*_EVERYWHERE, *_ON_REQUEST)


def _missing(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if not (folder / name).exists()]


def _await_health(server: ServerProcess, port: int) -> Ready:
    address = f"http://127.0.0.1:{port}"
    server.await_http(f"{address}/health", START_TIMEOUT_S)
    return Ready(address)
