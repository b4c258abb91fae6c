"""`octavo isolation-check`: whether one tenant of a running cluster can find out what another one asked."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
from typing import Annotated

import typer
from octavo.client import CallError

from cluster.cli_answer import report
from cluster.cli_client import DEFAULT_ADDRESS, Address, ModelName
from cluster.cli_dial import TOKEN, dial
from cluster.isolation import MAX_ISOLATED_AUC, MIN_SEEING_AUC, Probes, probe

app = typer.Typer()


@app.command("isolation-check")
def isolation_check(
    victim_token: Annotated[str, typer.Option(envvar="OCTAVO_VICTIM_TOKEN", help="A token of one tenant.")],
    attacker_token: Annotated[str, typer.Option(envvar="OCTAVO_ATTACKER_TOKEN", help="A token of another tenant.")],
    rounds: Annotated[int, typer.Option(min=20, help="Prompts of the victim that are looked for.")] = 300,
    prompt_tokens: Annotated[int, typer.Option(min=32, help="Tokens of a prompt.")] = 128,
    model: ModelName = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Attack one tenant as another one, by the time that answers take, and print how well that goes.

    First within the victim's own tenant, where cached prompts are shared: an attack that cannot see those sees nothing.
    Then from the other one. The figure is the area under the ROC curve: 1 tells asked prompts from others every time,
    0.5 guesses. Nothing else should use the cluster meanwhile; it takes some minutes.

    Exit codes: 0 isolated; 1 not isolated, or a call failed; 2 wrong usage; 3 the check could not see, so it says
    nothing: use more rounds, longer prompts or a quiet cluster.
    """

    async def attack(attacker_name: str) -> Probes:
        tokens = {"victim": victim_token, "attacker": attacker_token}
        targets = [each.strip() for each in address.split(",")]
        environ = {name: dict(os.environ) | {TOKEN: token} for name, token in tokens.items()}
        async with (
            dial(targets, environ=environ["victim"]) as victim,
            dial(targets, environ=environ[attacker_name]) as attacker,
        ):
            return await probe(
                victim, attacker, rounds=rounds, num_tokens=prompt_tokens, rng=random.SystemRandom(), model=model
            )

    try:
        within, across = (asyncio.run(attack(name)) for name in ("victim", "attacker"))
    except CallError as error:
        raise typer.Exit(report(error)) from error
    record = {"within": _record(within), "across": _record(across)}
    if as_json:
        typer.echo(json.dumps(record))
    else:
        for name, what in (("within", "from the same tenant"), ("across", "from another tenant")):
            each = record[name]
            typer.echo(
                f"{what}: ROC AUC {each['auc']:.3f}; first token of asked prompts {each['asked_ms']:.1f} ms, of new "
                f"ones {each['new_ms']:.1f} ms; {each['cached_tokens']:.0f} tokens cached"
            )
    if within.auc < MIN_SEEING_AUC:
        typer.echo(f"octavo: within a tenant the AUC is below {MIN_SEEING_AUC}: this check cannot see", err=True)
        raise typer.Exit(3)
    if across.auc > MAX_ISOLATED_AUC:
        typer.echo(f"octavo: not isolated: the AUC must be <= {MAX_ISOLATED_AUC}", err=True)
        raise typer.Exit(1)


def _record(probes: Probes) -> dict[str, float]:
    return {
        "auc": probes.auc,
        "asked_ms": statistics.median(probes.asked_s) * 1e3,
        "new_ms": statistics.median(probes.new_s) * 1e3,
        "cached_tokens": statistics.mean(probes.cached_tokens),
        "rounds": len(probes.asked_s),
    }
