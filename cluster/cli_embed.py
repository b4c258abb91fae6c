"""`octavo embed`: vectors of texts from a running cluster that serves a model for that."""

from __future__ import annotations

import asyncio
import json
import sys
from enum import StrEnum
from typing import Annotated

import typer
from octavo.client import CallError, ClientOptions
from octavo.client.pooling import EmbedOptions

from cluster.cli_answer import report
from cluster.cli_client import DEFAULT_ADDRESS, EXIT_CODES, REACH_S, Address, ModelName, Timeout, router_targets
from cluster.cli_dial import dial

app = typer.Typer()


class PoolingName(StrEnum):
    CLS = "cls"
    MEAN = "mean"
    MAX = "max"
    LAST = "last"


Texts = Annotated[list[str], typer.Argument(help="Texts, one an argument; - reads one from stdin.")]
Method = Annotated[
    PoolingName | None, typer.Option(help="How the vectors of tokens become one; by default what the model says.")
]
Normalize = Annotated[
    bool | None,
    typer.Option("--normalize/--raw", help="Make lengths 1, or leave them; by default what the model says."),
]
Truncate = Annotated[bool, typer.Option("--truncate", help="Drop the end of a text that is too long.")]


@app.command(epilog=EXIT_CODES)
def embed(  # a parameter for each option
    texts: Texts,
    model: ModelName = "",
    pooling: Method = None,
    normalize: Normalize = None,
    truncate: Truncate = False,
    timeout: Timeout = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Print a vector for each text, in order: one JSON object a line, {"index", "embedding"}.

    The cluster must serve a model that embeds, for instance `octavo serve --model minilm --engine transformers`.

    Examples:

    - `octavo embed "The capital of France" "Paris"`
    - `octavo embed --pooling cls --normalize - < page.txt`
    """
    options = EmbedOptions(model=model, truncate=truncate)
    if pooling is not None:
        options["pooling"] = pooling.value
    if normalize is not None:
        options["normalize"] = normalize
    asked = [sys.stdin.read() if text == "-" else text for text in texts]
    try:
        vectors = asyncio.run(_vectors(router_targets(address), asked, timeout, options))
    except CallError as error:
        raise typer.Exit(report(error)) from None
    for index, vector in enumerate(vectors):
        typer.echo(json.dumps({"index": index, "embedding": vector}))


async def _vectors(
    targets: list[str], texts: list[str], timeout_s: float | None, options: EmbedOptions
) -> list[list[float]]:
    async with dial(targets, options=ClientOptions(retry_timeout_s=REACH_S)) as client:
        return await client.embed(texts, timeout=timeout_s, **options)
