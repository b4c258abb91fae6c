"""The command `octavo`: reads argv and environment, runs a command, turns errors into exit codes.

    0  done                             2  wrong usage or configuration
    1  failed, or could not be started  3  the model is missing, corrupt, unsupported or does not fit

and 4: the port is in use (`serve`), or no router was reached (commands that call one).

Results go to stdout, everything else to stderr. Commands import what they need when they run, so that `--help` does not
wait for Ray or torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from cluster import (
    cli_client,
    cli_demo,
    cli_embed,
    cli_isolation,
    cli_keys,
    cli_models,
    cli_operate,
    cli_plan,
    cli_trace,
    telemetry,
)
from cluster.config import ClusterConfig, load
from cluster.config_sections import LogConfig
from workers.errors import ConfigError, OctavoError, StartupError

app = typer.Typer(
    name="octavo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(cli_client.app)
app.add_typer(cli_demo.app)
app.add_typer(cli_embed.app)
app.add_typer(cli_isolation.app)
app.add_typer(cli_operate.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_trace.app)
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_keys.app, name="keys")

CLIENTS = frozenset({"generate", "chat", "embed", "status", "demo"})
"""Commands whose spans are a client's."""

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A TOML file; `octavo config` prints one.", envvar="OCTAVO_CONFIG")
]
Model = Annotated[
    str | None,
    typer.Option(help="default, minilm, fake, FILE.gguf, a directory, or ORG/NAME[@revision] on the Hugging Face hub."),
]
Replicas = Annotated[int | None, typer.Option(help="How many replicas.")]
Host = Annotated[str | None, typer.Option(help="Where the router listens.")]
Port = Annotated[int | None, typer.Option(help="The router's port; 0: a free one.")]
EngineName = Annotated[
    str | None, typer.Option(help="paged, transformers, vllm, or fake: no model, for measuring the cluster.")
]
AppName = Annotated[str | None, typer.Option(help="Name of the Ray Serve application.")]
RayAddress = Annotated[
    str | None, typer.Option(help="auto or HOST:PORT: attach to a running Ray. Otherwise one is started on loopback.")
]
RayTempDir = Annotated[str | None, typer.Option(help="Where a Ray of our own keeps logs and sockets; a short path.")]
Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Listen beyond loopback without TLS and authentication.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """An inference cluster on Ray for microservices that speak gRPC.

    Configuration: a TOML file (--config, OCTAVO_CONFIG), and OCTAVO_* variables over it, for instance
    OCTAVO_ENGINE__DTYPE=fp32; `octavo config` prints the result. Traces and metrics over OTLP:
    the OTEL_* variables of OpenTelemetry.
    """
    if version:
        from cluster.lifecycle import version as installed

        typer.echo(installed())
        raise typer.Exit
    if context.invoked_subcommand in CLIENTS:
        context.call_on_close(telemetry.start("client", os.environ, LogConfig(level="warning")).stop)


@app.command()
def serve(  # noqa: PLR0913, PLR0917  # a parameter for each option
    config: ConfigFile = None,
    model: Model = None,
    replicas: Replicas = None,
    engine: EngineName = None,
    host: Host = None,
    port: Port = None,
    ray_address: RayAddress = None,
    ray_temp_dir: RayTempDir = None,
    app_name: Annotated[str | None, typer.Option("--app", help="Name of the Ray Serve application.")] = None,
    insecure: Insecure = None,
) -> None:
    """Run a cluster until Ctrl-C or SIGTERM; then let running requests finish. A second Ctrl-C hurries.

    Several models have tables in the configuration, [models.NAME]. One that cannot be served leaves the others alone.

    Killed with SIGKILL it drains nothing. A Ray of its own then ends by itself: at once, but for two of Ray's agents,
    which go within about a minute. Its temporary directory stays.

    When it is ready, one JSON line on stdout says so: {"event": "ready", "address", "routers", "metrics", "pid",
    "ray_address", "models", "failures", "replicas", "version"}; "failures" says why other models cannot be served.

    Examples: `octavo serve`, `octavo serve --model ./model.gguf --replicas 2 --port 0`,
    `octavo serve --config cluster.toml --ray-address auto`.

    Exit codes: 0 stopped when told to; 1 could not be started; 2 wrong usage or configuration; 3 the model is missing,
    corrupt, unsupported or does not fit; 4 the port is in use.
    """
    from cluster.lifecycle import Ready, StopSignal, run

    effective = _load(
        config,
        {
            "model": _absolute(model),
            "replicas": {"num_replicas": replicas},
            "engine": {"engine": engine},
            "serve": {"host": host, "port": port, "app": app_name, "insecure": insecure},
            "ray": {"address": ray_address, "temp_dir": ray_temp_dir},
        },
    )
    out = _claim_stdout()

    def announce(ready: Ready) -> None:
        print(json.dumps(dataclasses.asdict(ready)), file=out, flush=True)
        models, count = ", ".join(ready.models), len(ready.replicas)
        _note(f"ready: {models} at {ready.address}, {count} replicas; Ctrl-C drains and stops")

    run(effective, StopSignal(), announce=announce, note=_note)


@app.command("config")
def show_config(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print the effective configuration: the file, OCTAVO_* variables over it, defaults for the rest.

    Examples: `octavo config > cluster.toml`, `OCTAVO_ENGINE__DTYPE=fp32 octavo config --config cluster.toml --json`.
    """
    effective = _load(config, {})
    typer.echo(effective.to_json() if as_json else effective.to_toml(), nl=as_json)


def main() -> NoReturn:
    """Run the command line; the entry point of `octavo`."""
    try:
        app(standalone_mode=True)
    except OctavoError as error:
        _note(f"error: {error}")
        sys.exit(error.exit_code if isinstance(error, StartupError) else 1)
    sys.exit(0)


def _load(path: Path | None, options: Mapping[str, Any]) -> ClusterConfig:
    given = _given(options)
    config = load(path, os.environ, given)
    if config.models and "model" in given:
        names = ", ".join(config.models)
        raise ConfigError(f"--model must not be given where models have tables ({names}), is {given['model']!r}")
    return config


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    given = {key: _given(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {key: value for key, value in given.items() if value is not None and value != {}}


def _absolute(model: str | None) -> str | None:
    """Return a path that means the same to replicas, whose working directory is another."""
    return str(Path(model).absolute()) if model is not None and Path(model).exists() else model


def _claim_stdout() -> TextIO:
    """Return the real stdout, and send to stderr whatever else of this process or its children writes there."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def _note(text: str) -> None:
    typer.echo(f"octavo: {text}", err=True)


if __name__ == "__main__":
    main()
