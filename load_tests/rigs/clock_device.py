"""A `Device` that computes nothing: a clock says when a step is over. For what the host of a fast GPU has to do, where
there is none.

Launching costs the host time, too, with the interpreter's lock, as launching kernels does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from workers.config import EngineConfig
from workers.cuda import graph_sizes
from workers.device import DeviceResult, DeviceStep
from workers.device_runner import DeviceRunner
from workers.engine import PagedEngine
from workers.prefix import PrefixHasher
from workers.types import EngineInfo

NUM_BLOCKS = 60_000
TOKEN = 500
"""What every sequence says, again and again."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """In seconds: of a step of decodes and of one with prompts in it, on the device and, to launch it, on the host."""

    graph_s: float = 0.0034
    mixed_s: float = 0.0037
    graph_launch_s: float = 0.0003
    mixed_launch_s: float = 0.0005


class ClockDevice:
    """Takes one step after the other, each from when it is launched or the one before it is over."""

    fatal_errors: tuple[type[Exception], ...] = ()
    prefill_interval = 1

    def __init__(self, times: StepTimes, *, num_slots: int, max_rows: int) -> None:
        self.num_slots = num_slots
        self.graph_sizes = graph_sizes(max_rows)
        self._times = times
        self._free_at = 0.0

    def launch(self, step: DeviceStep) -> ClockTicket:
        times, began = self._times, time.perf_counter()
        device_s, host_s = times.mixed_s, times.mixed_launch_s
        if step.is_decode:
            device_s, host_s = times.graph_s, times.graph_launch_s
        while time.perf_counter() < began + host_s:
            pass
        self._free_at = max(max(self._free_at, began) + device_s, time.perf_counter())
        return ClockTicket(self._free_at, int(step.samples.sum()))

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ClockTicket:
    over_at: float
    num_tokens: int

    def wait(self) -> DeviceResult:
        left_s = self.over_at - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return DeviceResult(np.full(self.num_tokens, TOKEN, dtype=np.int32))


def open_clock_engine(times: StepTimes, *, hash_key: bytes, max_num_sequences: int) -> PagedEngine:
    """Return an engine like that of a small model on a GPU, over a `ClockDevice`."""
    config = EngineConfig(max_num_sequences=max_num_sequences, max_model_len=2_048, chunk_tokens=8_192)
    hasher = PrefixHasher(hash_key, config.block_size)
    info = EngineInfo(
        engine="paged",
        model="clock",
        block_size=config.block_size,
        num_blocks=NUM_BLOCKS,
        max_model_len=config.max_model_len,
        vocab_size=1_024,
        model_fingerprint="",
        tokenizer_fingerprint="",
        weights_fingerprint="",
        hash_key_fingerprint=hasher.key_fingerprint,
    )
    device = ClockDevice(times, num_slots=2 * max_num_sequences, max_rows=max_num_sequences)
    runner = DeviceRunner(device, config.block_size)
    return PagedEngine(config, info=info, runner=runner, hasher=hasher, lag=runner.lag)
