"""What `octavo plan` finds out: a model's needs beside a machine's or a device's means, as one value.

Puts together what a configuration leads to (`capacity_setup`, `workers.memory`), what this machine reaches (`machine`)
or a data sheet promises (`devices`), and the arithmetic of both (`capacity`). Knows no terminal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from cluster import capacity, machine
from cluster.capacity import ROWS, Demand, Prediction, Speed, WeightFormat
from cluster.capacity_setup import ON_DEVICES, Setup, on_device, on_this_machine
from cluster.config import ClusterConfig, ModelConfig
from cluster.devices import Device
from cluster.machine import StepRun
from workers import memory
from workers.build import read_manifest
from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.native import library
from workers.native.packing import Format
from workers.paged import choose_max_model_len
from workers.types import ModelFiles
from workers.weights.checkpoint import open_checkpoint
from workers.weights.shape import ModelShape

USUAL_CONTEXT = 128
"""Tokens, unless another context is asked for."""
MOST_MEASURED_MS = 2_000.0
"""A step that is predicted to take longer is not measured."""

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PRODUCTS = {
    "fp32": (Format.F32, library.EXACT),
    "int8": (Format.Q8, library.INT8),
    "int8 x int4": (Format.Q4, library.INT8),
}

Predictions = tuple[Prediction, ...]
Measure = Callable[[WeightFormat, Demand, Predictions], Mapping[int, float]]
"""Returns milliseconds by rows, of the steps that could be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What computes, and how much of it there is."""

    name: str
    source: str
    gb_per_s: float
    tflops: Mapping[str, float]
    """By what is multiplied, as `Setup.products` names it."""
    memory_gb: float
    """Free before the model is loaded."""

    def speed(self, products: str) -> Speed:
        return Speed(self.gb_per_s * 1e9, self.tflops[products] * 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The pool of KV blocks that the engine would take."""

    cache: str
    bytes_per_token: int
    num_blocks: int
    sequences: Mapping[int, int]
    """By the tokens of a sequence, how many fit."""
    explanation: str


@dataclass(frozen=True, slots=True)
class StepTime:
    rows: int
    predicted_ms: float
    bound: str
    """memory or compute."""
    measured_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlan:
    weights: str
    is_configured: bool
    """Whether the configuration and the model's file lead to these."""
    memory_gb: float
    products: str
    balanced_rows: float
    """The batch size at which compute meets memory bandwidth."""
    steps: tuple[StepTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    model: str
    num_parameters: int
    """That a row is multiplied with."""
    context: int
    """Tokens that each sequence of a step has in the cache."""
    means: Means
    room: Room
    weights: tuple[WeightsPlan, ...]
    unmeasured: str
    """Why steps were not measured; empty if they were."""


def make_plan(
    config: ClusterConfig,
    model: ModelConfig,
    files: ModelFiles,
    *,
    device: Device | None,
    context: int | None,
    note: Callable[[str], None],
) -> CapacityPlan:
    """Return the plan of `model`, whose `files` these are, on `device` or, with None, on this machine, where measuring
    takes a minute at most and other models of `config` take their part of cores and memory.

    Raises ConfigError and ModelFileError with the rule and the value.
    """
    manifest, checkpoint = read_manifest(files.manifest), open_checkpoint(files.weights)
    max_model_len = choose_max_model_len(model.engine, manifest, checkpoint.shape)
    if context is None:
        context = min(USUAL_CONTEXT, max_model_len - 1)
    if not 0 <= context < max_model_len:
        raise ConfigError(f"--context must be in [0, {max_model_len - 1}] for {manifest.name}, is {context}")
    setup = (on_device if device else on_this_machine)(model.engine, checkpoint)
    demands = {weights: capacity.demand(checkpoint.shape, weights, setup.cache) for weights in setup.formats}
    own, free_bytes = demands[setup.configured], int(device.memory_gb * 1e9) if device else memory.free_memory()
    engine = replace(model.engine, replicas_per_node=1 if device else config.replicas_per_node(model))
    room = _room(engine, setup, own, max_model_len=max_model_len, free_bytes=free_bytes)
    threads = config.threads(model, float(os.cpu_count() or 1))
    means = _promised(device) if device else _measured(setup, threads, free_bytes, note)
    measure: Measure = _no_steps
    if setup.native is not None:
        run = StepRun(dtype=setup.native, threads=threads, context=context, block_size=engine.block_size)
        measure = _steps_of(checkpoint.shape, run, note)
    return CapacityPlan(
        model=manifest.name,
        num_parameters=own.num_parameters,
        context=context,
        means=means,
        room=room,
        weights=tuple(
            _weights_plan(weights, needed, setup, means, context, measure) for weights, needed in demands.items()
        ),
        unmeasured=setup.unmeasured,
    )


def _no_steps(weights: WeightFormat, needed: Demand, predicted: Predictions) -> Mapping[int, float]:
    return {}


def _steps_of(shape: ModelShape, run: StepRun, note: Callable[[str], None]) -> Measure:
    def measure(weights: WeightFormat, needed: Demand, predicted: Predictions) -> Mapping[int, float]:
        rows = [each.rows for each in predicted if each.ms <= MOST_MEASURED_MS]
        if not rows or not machine.fits(needed.resident_bytes):
            return {}
        note(f"measuring steps with {weights.name} weights")
        return machine.measure_steps(shape, weights, run, rows)

    return measure


def _room(engine: EngineConfig, setup: Setup, needed: Demand, *, max_model_len: int, free_bytes: int) -> Room:
    """Raises ConfigError and ModelFileError as the engine would."""
    left = free_bytes - needed.resident_bytes
    if left <= 0:
        raise ModelFileError(
            f"the model does not fit: its {setup.configured.name} weights need {needed.resident_bytes / 1e9:.2f} GB, "
            f"there are {free_bytes / 1e9:.2f} GB"
        )
    size = memory.size_pool(
        engine,
        bytes_per_block=engine.block_size * needed.kv_bytes_per_token,
        max_model_len=max_model_len,
        free_bytes=left,
    )
    lengths = sorted({min(memory.USUAL_TOKENS, max_model_len), max_model_len})
    return Room(
        cache=setup.cache,
        bytes_per_token=needed.kv_bytes_per_token,
        num_blocks=size.num_blocks,
        sequences={length: capacity.num_fitting(size.num_blocks, engine.block_size, length) for length in lengths},
        explanation=size.explanation,
    )


def _promised(device: Device) -> Means:
    return Means(
        name=device.name,
        source=device.source,
        gb_per_s=device.gb_per_s,
        tflops={ON_DEVICES: device.tflops},
        memory_gb=device.memory_gb,
    )


def _measured(setup: Setup, threads: int, free_bytes: int, note: Callable[[str], None]) -> Means:
    note("measuring memory bandwidth and compute")
    names = {setup.products(weights) for weights in setup.formats}
    return Means(
        name="this machine",
        source=f"measured with {threads} {'thread' if threads == 1 else 'threads'}",
        gb_per_s=machine.measure_bandwidth(threads) / 1e9,
        tflops={
            name: (
                machine.measure_torch_products(_TORCH_DTYPES[name], threads)
                if setup.native is None
                else machine.measure_products(*_PRODUCTS[name], threads)
            )
            / 1e12
            for name in sorted(names)
        },
        memory_gb=free_bytes / 1e9,
    )


def _weights_plan(
    weights: WeightFormat, needed: Demand, setup: Setup, means: Means, context: int, measure: Measure
) -> WeightsPlan:
    products = setup.products(weights)
    speed = means.speed(products)
    predicted = capacity.predict(needed, speed, rows=ROWS, context=context)
    measured = measure(weights, needed, predicted)
    return WeightsPlan(
        weights=weights.name,
        is_configured=weights == setup.configured,
        memory_gb=needed.resident_bytes / 1e9,
        products=products,
        balanced_rows=capacity.balanced_rows(needed, speed),
        steps=tuple(StepTime(each.rows, each.ms, each.bound, measured.get(each.rows)) for each in predicted),
    )
