"""`octavo apply`, `octavo scale`, `octavo drain`: changes to a cluster that runs, by way of the Ray that it runs on.

They attach to that Ray and leave it running. What they begin goes on when they are interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.config import ClusterConfig, load
from cluster.config_sections import RayConfig, ServeConfig
from workers.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from cluster.ray_connection import Connection

_EXIT_CODES = (
    "Exit codes: 0 done; 1 not done, or not in time; 2 wrong usage or configuration, and nothing was changed; 3 the"
    " model is missing, corrupt, unsupported or does not fit; 4 the port is in use."
)

_DEFAULT_APP = ServeConfig().app

app = typer.Typer(no_args_is_help=True)

RayAddress = Annotated[
    str | None,
    typer.Option(help="The Ray that the cluster runs on: HOST:PORT, or auto for the one of yours on this machine."),
]
AppName = Annotated[str, typer.Option("--app", help="Name of the Ray Serve application.", envvar="OCTAVO_SERVE__APP")]
Timeout = Annotated[float, typer.Option(help="Seconds that it may take.", min=1)]


@app.command(epilog=_EXIT_CODES)
def apply(
    config: Annotated[Path, typer.Argument(help="A TOML file; `octavo config` prints one.")],
    ray_address: RayAddress = None,
) -> None:
    """Have a running cluster be what a file says, and wait until it is.

    New routers and replicas are started beside the old ones, which then take nothing new and let running requests end,
    or go on elsewhere; only those that the change concerns. What does not start leaves the old ones serving. OCTAVO_*
    variables go over the file, as with `octavo serve`, whose options the file has to say as well; a port of 0 is the
    one in use. Where the application does not run yet it is put there, and stays when this command has ended.

    When it is done, one JSON line on stdout says so: {"event": "applied", "address", "routers", "models", "replicas",
    "started", "stopped"}.

    Examples:

    - `octavo apply cluster.toml`
    - `OCTAVO_ENGINE__DTYPE=fp32 octavo apply cluster.toml --ray-address 10.0.0.5:6379`
    """
    effective = load(config, os.environ, {} if ray_address is None else {"ray": {"address": ray_address}})
    with _attached(effective.ray) as connection:
        if connection.variables:  # it is this machine alone that has to have them
            _check_files(effective)
        from cluster.operate import apply as apply_config

        result = apply_config(effective, connection.variables, _note)
    if not result.started and not result.stopped:
        _note("everything is as it was")
    typer.echo(json.dumps(dataclasses.asdict(result)))


@app.command(epilog=_EXIT_CODES)
def scale(
    model: Annotated[str, typer.Argument(help="As `octavo status` names it.")],
    replicas: Annotated[str, typer.Argument(help="How many replicas, or auto: as its configuration and its load say.")],
    timeout: Timeout = 600.0,
    ray_address: RayAddress = None,
    app_name: AppName = _DEFAULT_APP,
) -> None:
    """Have a number of replicas of a model, whatever its load is and its configuration says, and wait until there are.

    It holds until another number is asked for, or `auto`, also through an `octavo apply`. Those that go let running
    requests end first.

    Examples: `octavo scale SmolLM2-135M-Instruct 4`, `octavo scale SmolLM2-135M-Instruct auto`.
    """
    number = _number(replicas)
    with _attached(_ray(ray_address)):
        from cluster.operate import scale as scale_model

        scale_model(app_name, model, number, timeout_s=timeout, note=_note)


@app.command(epilog=_EXIT_CODES)
def drain(
    replica: Annotated[str, typer.Argument(help="Its id, or the beginning of it, as `octavo status` has it.")],
    timeout: Timeout = 600.0,
    ray_address: RayAddress = None,
    app_name: AppName = _DEFAULT_APP,
) -> None:
    """Replace a replica, and wait until it has gone.

    One more is started before, if there is room. The one that goes takes nothing new; requests that run there have
    `router.drain_grace_s` to end, and go on elsewhere after that.

    Example: `octavo drain 3kx9`.
    """
    with _attached(_ray(ray_address)):
        from cluster.operate import drain as drain_replica

        gone = drain_replica(app_name, replica, timeout_s=timeout, note=_note)
    _note(f"{gone} has gone")


@contextmanager
def _attached(config: RayConfig) -> Iterator[Connection]:
    """Be connected to the Ray of `config`, that of this machine if it names none."""
    # Late, for a wrong option must not wait for Ray.
    from cluster.ray_connection import connected

    with connected(dataclasses.replace(config, address=config.address or "auto"), _note) as connection:
        import ray
        from ray.serve.exceptions import RayServeException

        from cluster.deployment import quieten

        quieten()
        try:
            yield connection
        except (ray.exceptions.RayError, RayServeException, ConnectionError, TimeoutError) as error:
            raise StartupError(f"the cluster does not answer: {error}") from error


def _ray(address: str | None) -> RayConfig:
    config = RayConfig(address=address or "auto")
    config.check()
    return config


def _check_files(config: ClusterConfig) -> None:
    """Raises ConfigError or ModelFileError if routers and replicas of this node could not read what they need."""
    from cluster.boot import ClusterBoot
    from cluster.lifecycle import check_trust

    check_trust(config.router)
    for model in config.deployments().values():
        ClusterBoot.of(config).model_files(model.model)


def _number(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError(f"REPLICAS must be a number or auto, is {text!r}")
    return int(text)


def _note(text: str) -> None:
    typer.echo(f"octavo: {text}", err=True)
