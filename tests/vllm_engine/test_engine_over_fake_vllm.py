"""Who asked the engine `vllm` for what, over a vLLM that does as it is told: what needs neither a model nor vLLM."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo.names import Reason

from tests.vllm_engine.test_guard import SLEEPS, ends
from workers.config import EngineConfig
from workers.errors import StartupError
from workers.types import FinishReason, GenerateWork, ModelFiles, ModelManifest, TokenDelta, WorkId
from workers.vllm_engine import engine as engine_module
from workers.vllm_engine import setup, versions
from workers.vllm_engine.engine import VllmEngine
from workers.vllm_engine.guard import LOOK_S

SIZES = versions.Sizes(
    block_size=16, num_blocks=100, max_model_len=1_000, step_tokens=500, max_num_sequences=4, dtype="float32"
)
MANIFEST = ModelManifest(
    name="none",
    architecture="LlamaForCausalLM",
    vocab_size=100,
    max_model_len=1_000,
    eos_token_ids=(),
    bos_token_id=None,
    weights_format="safetensors",
    model_fingerprint="m",
    tokenizer_fingerprint="t",
    weights_fingerprint="w",
    licence="",
)


class FakeLlm:
    """Answers nothing. While `gate` is not set, the first request keeps the whole event loop."""

    vllm_config = None
    errored = False
    dead_error = RuntimeError("its process is gone")

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.has_begun = threading.Event()
        self.is_shut_down = threading.Event()
        self.on_news: Callable[[], object] = lambda: None

    def notify(self) -> None:
        self.on_news()

    async def generate(self, prompt: Any, sampling: Any, name: str, priority: int = 0) -> AsyncIterator[Any]:
        if name == "warm":
            return
        self.has_begun.set()
        self.gate.wait(10)
        await asyncio.sleep(60)
        yield None

    def refuse(self, error: Exception) -> None:
        """Turn down whatever comes from now on."""

        async def generate(*args: Any, **given: Any) -> AsyncIterator[Any]:
            raise error
            yield

        self.generate = generate  # type: ignore[method-assign]

    def shutdown(self) -> None:
        self.is_shut_down.set()


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLlm:
    made = FakeLlm()
    for name, value in setup.VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(versions, "installed", lambda: "0.32.0")
    monkeypatch.setattr(versions, "start", lambda arguments, endpoint, on_stats: made)
    monkeypatch.setattr(versions, "sizes", lambda llm: SIZES)
    monkeypatch.setattr(versions, "sampling", lambda arguments: arguments)
    monkeypatch.setattr(versions, "prompt", lambda token_ids, salt: token_ids)
    return made


def start(directory: Path, llm: FakeLlm) -> VllmEngine:
    file = directory / "manifest.json"
    files = ModelFiles(weights=directory, tokenizer_json=file, chat_template=None, manifest=file)
    config = EngineConfig(engine="vllm", prefix_cache=False)
    return VllmEngine(config, files, MANIFEST, llm.notify, hash_key=bytes(32), threads=1)


@pytest.fixture
def engine(llm: FakeLlm, tmp_path: Path) -> Iterator[VllmEngine]:
    started = start(tmp_path, llm)
    yield started
    llm.gate.set()
    started.close()
    assert started.join(10)
    assert llm.is_shut_down.is_set()


def comes(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def work(number: int, n: int = 1) -> GenerateWork:
    return GenerateWork(work_id=WorkId("r", number), prompt=(1, 2, 3), max_tokens=4, n=n)


def test_the_death_of_an_engine_that_nobody_asks_anything_is_seen(engine: VllmEngine, llm: FakeLlm) -> None:
    assert engine.failure is None
    llm.errored = True
    assert comes(lambda: engine.failure is llm.dead_error)


class VLLMClientError(Exception):
    """As vLLM has it from 0.27 on."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (ValueError("no such\ngrammar"), Reason.ENGINE_CAPABILITY, "vLLM refuses this request: no such"),
        (VLLMClientError(), Reason.ENGINE_CAPABILITY, "vLLM refuses this request: VLLMClientError"),
        (
            caused(RuntimeError(), ValueError("an old way")),
            Reason.ENGINE_CAPABILITY,
            "vLLM refuses this request: an old way",
        ),
        (KeyError("a secret"), Reason.INTERNAL, "vLLM could not compute this request (KeyError)"),
    ],
)
def test_what_vllm_refuses_is_a_refusal_and_no_failure(
    engine: VllmEngine, llm: FakeLlm, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, message: str
) -> None:
    monkeypatch.setattr(versions, "is_dead", lambda error: False)
    llm.refuse(error)
    engine.submit(work(1, n=2))
    found: list[TokenDelta] = []
    assert comes(lambda: found.extend(engine.drain_outputs()) or len(found) == 2)
    ends = [delta.finish for delta in found]
    assert [(end.error_reason, end.error_message) for end in ends if end] == [(reason, message)] * 2
    assert engine.failure is None


def test_an_abort_right_after_its_work_leaves_nothing_open(engine: VllmEngine, llm: FakeLlm) -> None:
    engine.submit(work(1))
    assert llm.has_begun.wait(10)
    engine.submit(work(2, n=2))  # both come to the loop at once
    engine.abort(WorkId("r", 2))
    llm.gate.set()
    assert comes(lambda: engine.load().credit_sequences == SIZES.max_num_sequences)
    ends = [(delta.index, delta.finish.reason) for delta in engine.drain_outputs() if delta.finish is not None]
    assert ends == [(0, FinishReason.CANCELLED), (1, FinishReason.CANCELLED)]
    told: list[int | None] = []
    llm.on_news = lambda: told.append(engine.load().credit_sequences)
    engine.abort(WorkId("r", 1))
    assert comes(lambda: told[-1:] == [SIZES.max_num_sequences + 1]), "whoever is told of an abort finds its place"


def test_works_that_come_while_it_closes_end(engine: VllmEngine, llm: FakeLlm) -> None:
    engine.submit(work(1))
    assert llm.has_begun.wait(10)
    engine.submit(work(2))
    engine.close()
    engine.submit(work(3))
    llm.gate.set()
    assert engine.join(10)
    ends = {delta.work_id.number: delta.finish for delta in engine.drain_outputs()}
    assert {number: finish and finish.reason for number, finish in ends.items()} == dict.fromkeys(
        (1, 2, 3), FinishReason.CANCELLED
    )


def test_a_start_that_takes_for_ever_is_an_error(llm: FakeLlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "START_S", 0.05)
    goes_on = threading.Event()
    monkeypatch.setattr(versions, "installed", lambda: goes_on.wait(10) and "0.32.0")
    with pytest.raises(StartupError, match=r"was not ready after 0\.05 s"):
        start(tmp_path, llm)
    goes_on.set()
    assert llm.is_shut_down.wait(10)
    for thread in threading.enumerate():
        if thread.name == "octavo-vllm":  # what else starts below this process belongs to it until it ends
            thread.join(10)


_STARTS = """
import sys, time
from pathlib import Path
from subprocess import Popen
from tests.vllm_engine.test_engine_over_fake_vllm import SLEEPS, FakeLlm, start
from workers.vllm_engine import versions

def begin(arguments, endpoint, on_stats):
    print(Popen(SLEEPS).pid, flush=True)
    time.sleep(60)

versions.installed, versions.start = lambda: "0.32.0", begin
start(Path(sys.argv[1]), FakeLlm())
"""


def test_a_replica_killed_while_vllm_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its guard came only once the engine was ready, and vLLM's process kept its memory for ever."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _STARTS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as replica:
        assert replica.stdout is not None
        child = int(replica.stdout.readline())
        time.sleep(6 * LOOK_S)
        replica.send_signal(signal.SIGKILL)
    assert ends(child)


def test_a_start_that_fails_leaves_nothing_behind(
    tmp_path: Path, llm: FakeLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def begin(*_: object) -> None:
        begun.append(subprocess.Popen(SLEEPS))
        raise RuntimeError("no such model")

    monkeypatch.setattr(versions, "start", begin)
    with pytest.raises(StartupError, match="no such model"):
        start(tmp_path, llm)
    assert begun[0].wait(10) == -signal.SIGKILL
