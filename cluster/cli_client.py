"""`octavo generate`, `octavo chat`, `octavo status`: a running cluster from the command line, through `octavo.client`.

Knows gRPC only by its client, and nothing of Ray. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated

import typer
from octavo.client import (
    CallError,
    ClientOptions,
    GenerateOptions,
    Generation,
    Prompt,
)

from cluster.cli_answer import answer_record, error_record, printable, report
from cluster.cli_dial import dial
from cluster.config_sections import ServeConfig

REACH_S = 3.0
"""How long an interactive command looks for a router."""

_DEFAULTS = ServeConfig()
EXIT_CODES = "Exit codes: 0 done; 1 a request failed; 2 wrong usage; 4 no router was reached."

app = typer.Typer(no_args_is_help=True)

Address = Annotated[str, typer.Option(help="A router, HOST:PORT; several with commas.", envvar="OCTAVO_ADDRESS")]
ModelName = Annotated[str, typer.Option("--model", help="Which of the served models; empty if there is one.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; 1 samples the model's own distribution.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that together have this share.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be given several times.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a request may take.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts, one an argument; - reads one from stdin.")]
AsMessage = Annotated[
    bool, typer.Option("--chat", help="Send each prompt as a user's message, through the chat template.")
]
InputFile = Annotated[
    Path | None, typer.Option("--input", help="Prompts, one JSON object a line.", exists=True, dir_okay=False)
]
OutputFile = Annotated[Path | None, typer.Option("--output", help="Answers, one JSON object a line.", dir_okay=False)]

DEFAULT_ADDRESS = f"{_DEFAULTS.host}:{_DEFAULTS.port}"


@app.command(epilog=EXIT_CODES)
def generate(  # noqa: PLR0913, PLR0917  # a parameter for each option
    prompts: Prompts = None,
    model: ModelName = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Timeout = None,
    as_message: AsMessage = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt, in order.")] = False,
    input_file: InputFile = None,
    output_file: OutputFile = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of --input at once.")] = 64,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Continue prompts, and stream the answers to the terminal.

    With --input and --output, answer a file of prompts. A line of the input is {"prompt": ...} with, if you like,
    "id", "model", "timeout" and the options of a request ("max_tokens", "temperature", "stop", ...), which take
    precedence over the command line's; the prompt is text, token ids, or messages. A line of the output has the same
    "id" (by default the line's number) and the answer or an "error"; answers stand in the order in which they came.
    A run that was interrupted is resumed by the same command: what is answered is not asked again, what failed is.

    Examples:

    - `octavo generate "The capital of France is" --max-tokens 16 --temperature 0`
    - `octavo generate --chat "Why is the sky blue?" --json`
    - `octavo generate --input prompts.jsonl --output answers.jsonl --concurrency 128`
    """
    options = _options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    targets = router_targets(address)
    if input_file is not None and output_file is not None and not prompts:
        from cluster.cli_batch import run_batch

        batch = run_batch(
            dial(targets),
            input_file,
            output_file,
            model=model,
            timeout_s=timeout,
            options=options,
            concurrency=concurrency,
        )
        raise typer.Exit(_run(batch))
    if input_file is not None or output_file is not None:
        raise typer.BadParameter("--input and --output go together, and without prompts")
    asked = _prompts(prompts or [], as_message=as_message)
    raise typer.Exit(_run(_answer(targets, asked, model, timeout, options, as_json=as_json)))


@app.command(epilog=EXIT_CODES)
def chat(  # a parameter for each option
    model: ModelName = "",
    system: Annotated[str, typer.Option(help="What the conversation begins with, as the system's message.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    timeout: Timeout = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Talk with a model. Ctrl-C ends the current answer, at the prompt (as Ctrl-D) the conversation; /reset forgets it.

    Without a terminal each line of stdin is a message, and only the answers are printed.

    Examples:

    - `octavo chat --system "Answer in one sentence."`
    - `printf 'Hi\\nWhy?\\n' | octavo chat --temperature 0`
    """
    from cluster.cli_chat import Chat

    options = _options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=None)
    client = dial(router_targets(address), options=ClientOptions(retry_timeout_s=REACH_S))
    raise typer.Exit(Chat(client, model=model, system=system, timeout_s=timeout, options=options).run())


@app.command(epilog=EXIT_CODES)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds from one look of --watch to the next.", min=0.1)] = 1.0,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show what the cluster is doing: models with their replicas and why there are so many, routers with their queues,
    and each replica with its load, cache, kernels and dtype.

    With --watch and --json, one JSON object a line.

    Examples:

    - `octavo status --watch`
    - `octavo status --json --address 10.0.0.5:50051`
    """
    from rich.console import Console

    from cluster.cli_status import status_record, status_view
    from cluster.cli_watch import watch as keep_watching

    async def ask() -> int:
        async with dial(router_targets(address)) as client:
            if watch:
                return await keep_watching(client.status, period_s=interval, as_json=as_json, console=Console())
            answer = await client.status()
        if as_json:
            typer.echo(json.dumps(status_record(answer)))
        else:
            Console().print(status_view(answer))
        return 0

    raise typer.Exit(_run(ask()))


def _prompts(arguments: list[str], *, as_message: bool) -> list[Prompt]:
    """Return what is to be asked; stdin is read for each ``-``."""
    if not arguments:
        raise typer.BadParameter("give a prompt, or --input and --output")
    texts = [sys.stdin.read() if argument == "-" else argument for argument in arguments]
    return [[{"role": "user", "content": text}] if as_message else text for text in texts]


async def _answer(
    targets: list[str],
    prompts: list[Prompt],
    model: str,
    timeout_s: float | None,
    options: GenerateOptions,
    *,
    as_json: bool,
) -> int:
    """Ask all at once, print in order; each answer streams as soon as those before it are printed."""
    exit_code = 0
    async with dial(targets, options=ClientOptions(retry_timeout_s=REACH_S)) as client:
        generations = [client.generate(prompt, model=model, timeout=timeout_s, **options) for prompt in prompts]
        for generation in generations:
            try:
                await (_print_json(generation) if as_json else _print_text(generation))
            except CallError as error:
                exit_code = max(exit_code, report(error))
                if as_json:
                    typer.echo(json.dumps(error_record(generation.request_id, error)))
    return exit_code


async def _print_text(generation: Generation) -> None:
    try:
        async for delta in generation:
            typer.echo(printable(delta.text), nl=False)
    finally:
        typer.echo()


async def _print_json(generation: Generation) -> None:
    typer.echo(json.dumps(answer_record(generation.request_id, await generation.complete()), ensure_ascii=False))


def _run(command: Coroutine[None, None, int]) -> int:
    """Run a command and return its exit code."""
    try:
        return asyncio.run(command)
    except CallError as error:
        return report(error)


def _options(
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> GenerateOptions:
    """Return the options that were given."""
    options = GenerateOptions()
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    if stop is not None:
        options["stop"] = stop
    return options


def router_targets(address: str) -> list[str]:
    """Return the addresses in an option. Raises BadParameter for what is none."""
    targets = [each.strip() for each in address.split(",")]
    for target in targets:
        if not target.rpartition(":")[2].isdigit() or not target.rpartition(":")[0]:
            raise typer.BadParameter(f"must be HOST:PORT, is {target!r}", param_hint="--address")
    return targets
