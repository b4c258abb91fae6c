"""`octavo plan`: what a model needs, how much of it fits, and how long its steps take, before anything is started."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cluster.capacity_plan import CapacityPlan, StepTime, WeightsPlan
    from cluster.config import ClusterConfig, ModelConfig

app = typer.Typer()


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(help="What to plan for, as for `octavo serve`, or the name of a model that has a table."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="a100, h100, h200, l4, l40s, rtx4090, ...: its data sheet instead of this machine."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file.", envvar="OCTAVO_CONFIG")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that each sequence of a step has in the cache; by default 128.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model costs: KV memory per token, sequences that fit, milliseconds per step, predicted and measured.

    The prediction is the roofline model (Williams, Waterman, Patterson 2009): a step of so many rows, one of each
    sequence, takes max(bytes / bandwidth, operations / compute), where bytes = weights + rows x context x KV bytes per
    token and operations = 2 x parameters x rows + attention. Compute meets bandwidth at rows = compute / bandwidth x
    weight bytes / (2 x parameters): up to there, more sequences at a time cost next to nothing.

    Of this machine, bandwidth, compute and steps are measured, with the threads and the kernels that the engine uses
    and weights that are made up; of a device they are its data sheet's (dense bf16), which nothing reaches in full.

    Of a configuration with several models each is planned for, with what the others leave it.

    Examples: `octavo plan`, `octavo plan --model ./model.gguf --context 1024`,
    `octavo plan --model Qwen/Qwen2.5-0.5B-Instruct --device l4 --json`.

    Exit codes: 2 wrong usage or configuration; 3 the model cannot be fetched or used, or does not fit.
    """
    from rich.console import Console

    from cluster.config import load

    plans = _plans(*_chosen(load(config, os.environ, {}), model), device, context)
    if as_json:
        records = [dataclasses.asdict(made) for made in plans]
        typer.echo(json.dumps(records if len(records) > 1 else records[0], indent=2))
    else:
        for made in plans:
            Console().print(plan_view(made), soft_wrap=True)


def _plans(
    config: ClusterConfig, models: Mapping[str, ModelConfig], device: str | None, context: int | None
) -> list[CapacityPlan]:
    from cluster.devices import find_device
    from cluster.model_progress import TerminalProgress
    from cluster.models import fetch_model

    found = None if device is None else find_device(device)
    files = {name: fetch_model(each.model, progress=TerminalProgress()) for name, each in models.items()}

    from cluster.capacity_plan import make_plan

    def note(text: str) -> None:
        typer.echo(f"octavo: {text}", err=True)

    plans = [
        make_plan(config, each, files[name], device=found, context=context, note=note) for name, each in models.items()
    ]
    if not config.models:
        return plans
    return [dataclasses.replace(made, model=name) for name, made in zip(models, plans, strict=True)]


def _chosen(config: ClusterConfig, model: str | None) -> tuple[ClusterConfig, dict[str, ModelConfig]]:
    """Return what to plan for: `model`, if it is given, else all that `config` has. Raises ConfigError."""
    if model is not None and not config.models:
        config = dataclasses.replace(config, model=model)
        config.check()
    elif model is not None and model not in config.models:
        raise ConfigError(f"--model must be one of {', '.join(config.models)}, which have tables, is {model!r}")
    chosen = config.deployments()
    return config, {model: chosen[model]} if config.models and model is not None else chosen


def plan_view(made: CapacityPlan) -> RenderableType:
    """Return the plan for a terminal."""
    from rich.console import Group
    from rich.text import Text

    means, room = made.means, made.room
    compute = ", ".join(f"{_figure(value)} TFLOP/s {name}" for name, value in means.tflops.items())
    fitting = ", ".join(f"{count:,} of {length:,} tokens" for length, count in room.sequences.items())
    lines = [
        Text.assemble((made.model, "bold"), f"  {made.num_parameters / 1e6:,.1f} M parameters multiplied with per row"),
        Text.assemble((means.name, "bold"), f"  {_figure(means.gb_per_s)} GB/s, {compute} ({means.source}), ")
        + Text(f"{means.memory_gb:.1f} GB free"),
        Text(f"KV cache {room.cache}: {room.bytes_per_token:,} bytes per token; sequences that fit: {fitting}"),
        Text(room.explanation, style="dim"),
        Text(),
    ]
    notes = [
        f"ms per step of so many rows, each with {made.context:,} tokens in the cache: "
        + ("predicted" if made.unmeasured else "predicted / measured")
        + "; c: compute is the limit, else memory",
        "balanced: rows at which compute meets bandwidth   *: as configured, and as the model's file has it",
    ]
    if made.unmeasured:
        notes.append(f"not measured: {made.unmeasured}")
    return Group(*lines, _table(made), *(Text(note, style="dim") for note in notes))


def _table(made: CapacityPlan) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("rows", justify="right")
    for weights in made.weights:
        table.add_column(_heading(weights), justify="right", no_wrap=True)
    for same_rows in zip(*(weights.steps for weights in made.weights), strict=True):
        table.add_row(str(same_rows[0].rows), *(_cell(step, bool(made.unmeasured)) for step in same_rows))
    table.add_row("")
    table.add_row("balanced", *(_figure(weights.balanced_rows) for weights in made.weights))
    table.add_row("GB", *(f"{weights.memory_gb:.2f}" for weights in made.weights))
    return table


def _heading(weights: WeightsPlan) -> str:
    return f"{weights.weights}{' *' if weights.is_configured else ''}"


def _cell(step: StepTime, is_unmeasured: bool) -> str:
    predicted = f"{_figure(step.predicted_ms)}{' c' if step.bound == 'compute' else ''}"
    if is_unmeasured:
        return predicted
    return f"{predicted} / {'-' if step.measured_ms is None else _figure(step.measured_ms)}"


def _figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
