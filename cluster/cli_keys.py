"""`octavo keys`: the bearer tokens of a cluster's tenants, their groups and quotas, in the file that routers read.

Routers look at the file once a second: nothing has to be restarted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import load
from router.key_file import change, read
from router.keyring import Key, Keyring
from workers.errors import ConfigError

app = typer.Typer(help="Make and revoke the bearer tokens of tenants, and set their quotas.", no_args_is_help=True)

DAY_S = 24 * 3600.0

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A TOML file that says router.keys_file.", envvar="OCTAVO_CONFIG")
]
File = Annotated[Path | None, typer.Option("--file", help="The file with the keys; else router.keys_file.")]
Tenant = Annotated[str, typer.Argument(help="Who pays: at most 128 printable ASCII characters.")]


@app.command()
def create(
    tenant: Tenant,
    days: Annotated[float | None, typer.Option(min=0.0, help="How long it is good for; else until revoked.")] = None,
    file: File = None,
    config: ConfigFile = None,
) -> None:
    """Make a token for a tenant and print it. It is nowhere else: the file has only its hash.

    Example: `octavo keys create acme --days 90 --file keys.json`. Exit code 2: the file cannot be read or written.
    """
    path, now, made = _path(file, config), time.time(), []

    def edit(keyring: Keyring) -> Keyring:
        keyring, key, token = keyring.with_key(tenant, now, expires_at=None if days is None else now + days * DAY_S)
        made.append((key, token))
        return keyring

    change(path, edit)
    key, token = made[0]
    typer.echo(f"octavo: key {key.key_id} of {tenant!r} is in {path}; its token is not told again", err=True)
    typer.echo(token)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `octavo keys list` shows it.")],
    file: File = None,
    config: ConfigFile = None,
) -> None:
    """Let a token be good no longer: within a second no router takes a new request with it."""
    change(_path(file, config), lambda keyring: keyring.without(key_id, time.time()))
    typer.echo(f"octavo: key {key_id} is revoked", err=True)


@app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
    file: File = None,
    config: ConfigFile = None,
) -> None:
    """List keys and what holds for their tenants. Tokens are not in the file and cannot be shown."""
    keyring, now = read(_path(file, config)), time.time()
    for key in keyring.keys.values():
        terms = keyring.terms(key.tenant)
        quotas = {
            name: None if math.isinf(value := getattr(terms, name)) else value
            for name in ("requests_per_minute", "tokens_per_minute")
        }
        if as_json:
            fields: dict[str, Any] = {
                name: value for name, value in dataclasses.asdict(key).items() if name != "digest"
            }
            typer.echo(json.dumps({**fields, "is_valid": key.is_valid(now), "group": terms.group, **quotas}))
            continue
        limits = ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in quotas.items() if value is not None)
        parts = [key.tenant, _state(key, now), f"group {terms.group}" if terms.group else "", limits]
        typer.echo(f"{key.key_id}: " + ", ".join(part for part in parts if part))


@app.command()
def limit(
    tenant: Tenant,
    requests_per_minute: Annotated[float | None, typer.Option(help="0: no limit.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Prompt and generated ones; 0: no limit.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Tenants of one group share cached prompt prefixes; empty: with nobody.")
    ] = None,
    file: File = None,
    config: ConfigFile = None,
) -> None:
    """Say what holds for a tenant, whether it comes with a token or a certificate; what is not given stays.

    Quotas are those of one router. Example: `octavo keys limit acme --tokens-per-minute 100000 --group research`.
    """
    given = {
        "requests_per_minute": None if requests_per_minute is None else requests_per_minute or math.inf,
        "tokens_per_minute": None if tokens_per_minute is None else tokens_per_minute or math.inf,
        "group": group,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}

    def edit(keyring: Keyring) -> Keyring:
        return keyring.with_terms(tenant, dataclasses.replace(keyring.terms(tenant), **fields))

    change(_path(file, config), edit)


def _path(file: Path | None, config: Path | None) -> Path:
    """Raises ConfigError if nobody says which file."""
    if file is not None:
        return file
    named = load(config, os.environ, {}).router.keys_file
    if not named:
        raise ConfigError("no file with keys: give --file, or set router.keys_file (OCTAVO_ROUTER__KEYS_FILE)")
    return Path(named)


def _state(key: Key, now: float) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    if key.expires_at is None:
        return f"made {_day(key.created_at)}"
    return f"{'good until' if key.is_valid(now) else 'expired'} {_day(key.expires_at)}"


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
