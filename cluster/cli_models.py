"""`octavo models`: fetch a model before it is needed, and see what this node has."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from cluster.model_progress import TerminalProgress
from cluster.models import DEFAULT, cached_models, fetch_model
from workers.types import ModelManifest

app = typer.Typer(help="Fetch models and list what this node's cache holds.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="default, a .gguf file, a directory, or ORG/NAME[@revision] on the Hugging Face hub.")
    ] = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Fetch a model into this node's cache, check it, and say where its files are.

    Examples: `octavo models pull`, `octavo models pull Qwen/Qwen2.5-0.5B-Instruct@main`,
    `octavo models pull ./model.gguf --json`. Exit code 3: the model cannot be fetched or used.
    """
    files = fetch_model(name, progress=TerminalProgress())
    manifest = ModelManifest.from_json(files.manifest.read_text(encoding="utf-8"))
    if as_json:
        paths = {key: None if path is None else str(path) for key, path in dataclasses.asdict(files).items()}
        typer.echo(json.dumps({"name": name, "files": paths, "manifest": dataclasses.asdict(manifest)}))
        return
    typer.echo(f"{name}: {_summary(manifest)}")
    typer.echo(f"weights: {files.weights}")
    typer.echo(f"described in: {files.manifest.parent}")


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that this node's cache describes (OCTAVO_CACHE_DIR, XDG_CACHE_HOME or ~/.cache/octavo)."""
    for path, manifest in cached_models():
        if as_json:
            typer.echo(json.dumps({"path": str(path), "manifest": dataclasses.asdict(manifest)}))
        else:
            typer.echo(f"{manifest.name}: {_summary(manifest)}: {path}")


def _summary(manifest: ModelManifest) -> str:
    licence = manifest.licence or "not stated"
    return (
        f"{manifest.architecture}, {manifest.weights_format}, context {manifest.max_model_len}, "
        f"vocabulary {manifest.vocab_size}, licence {licence}"
    )
