"""`octavo demo`: what the cluster does, shown in about a minute."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="What to serve, as for `octavo serve`.")] = "default",
    engine: Annotated[str, typer.Option(help="paged, or fake: no model, answers without sense.")] = "paged",
    replicas: Annotated[int, typer.Option(min=1, help="How many replicas.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a short answer, in the first act.")] = 40,
    stream_tokens: Annotated[int, typer.Option(min=32, help="Most tokens of a long one, in the second.")] = 160,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Start a cluster with a real model, ask it over gRPC, kill a replica meanwhile, show what came of it, and stop.

    First a few questions; then, with two replicas or more, twelve long answers at once, and a kill -9 of the replica
    that carries most of them.

    Examples: `octavo demo`, `octavo demo --replicas 1 --json`, `octavo demo --model ./model.gguf`.

    Exit codes: 0 done; 1 a request failed or the cluster did not end well; else that of `octavo serve`.
    """
    from octavo.client import CallError
    from rich.console import Console

    from cluster.demo import DemoOptions, run
    from cluster.demo_crash import NobodyKilledError
    from cluster.demo_crash_view import views
    from cluster.model_progress import TerminalProgress
    from cluster.models import fetch_model
    from cluster.served import ServeFailedError

    if engine != "fake":  # here, where a progress bar is seen; the cluster finds the model in the cache
        fetch_model(model, progress=TerminalProgress())
    view, crash_view = views(Console(), Console(stderr=True), as_json=as_json)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the cluster is a process of its own and must be stopped
        signal.signal(ending, signal.default_int_handler)
    options = DemoOptions(
        model=model, engine=engine, num_replicas=replicas, max_tokens=max_tokens, stream_tokens=stream_tokens
    )
    try:
        run(options, view, crash_view)
    except ServeFailedError as error:
        view.note(f"error: {error}")
        raise typer.Exit(error.child_exit_code) from None
    except (CallError, NobodyKilledError) as error:
        view.note(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        view.note("stopped")
        raise typer.Exit(130) from None
