"""One tenant attacks another one on a cluster with the real model: by timing, by a forged name, through the back door.

    timing       `octavo isolation-check`: how well asked prompts are told from new ones by the time to the first token,
                 within a tenant, where it has to succeed, and across, where it must be guessing (area under ROC curve)
    forged       the attacker writes the victim's name into every header that could be taken for a tenant's: none of the
                 victim's prompt may come out of the cache
    back door    the replica's data port is dialled without the cluster's secret: refused, and nothing is learnt

One replica, default model. About six minutes.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import grpc.aio
from octavo.client import Client, ClientOptions
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub

from cluster.cli_dial import TOKEN, dial
from cluster.isolation import MAX_ISOLATED_AUC, MIN_SEEING_AUC, Probes, probe
from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.server import ServerProcess
from router import key_file
from router.keyring import Keyring
from workers.handshake import PROTOCOL

ROUNDS, QUICK_ROUNDS = 400, 5
PROMPT_TOKENS = 128
FORGED = ("tenant", "x-tenant", "x-tenant-id", "octavo-tenant", "x-octavo-tenant", "x-forwarded-user", "cache-salt")
START_S = 900.0
"""The model may have to be fetched and packed first."""
KNOCK_S = 10.0


async def measure(settings: Settings, notes: Notes) -> None:
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        keys = Path(folder) / "keys.json"
        tokens = make_keys(keys, "victim", "attacker")
        variables = {"RAY_AUTH_MODE": "disabled", "OCTAVO_ROUTER__KEYS_FILE": str(keys)}
        command = [sys.executable, "-m", "cluster.cli", "serve", "--port", "0"]
        process = ServerProcess(command, variables, Path(folder) / "log")
        try:
            ready = json.loads(await asyncio.to_thread(process.await_line, "{", START_S))
            await _attack(ready["address"], tokens, settings, notes)
        finally:
            await asyncio.to_thread(process.stop)


def make_keys(path: Path, *tenants: str) -> dict[str, str]:
    """Write a file of keys; return the token of each tenant."""
    tokens: dict[str, str] = {}

    def add(keyring: Keyring) -> Keyring:
        for tenant in tenants:
            keyring, _, tokens[tenant] = keyring.with_key(tenant, time.time())
        return keyring

    key_file.change(path, add)
    return tokens


async def _attack(address: str, tokens: Mapping[str, str], settings: Settings, notes: Notes) -> None:
    rounds = QUICK_ROUNDS if settings.is_quick else ROUNDS
    rng = random.Random(6)
    victim, attacker = (dial(address, environ={TOKEN: tokens[name]}) for name in ("victim", "attacker"))
    async with victim, attacker:
        await victim.complete([1] * PROMPT_TOKENS, max_tokens=1)
        for what, who in (("within", victim), ("across", attacker)):
            probes = await probe(victim, who, rounds=rounds, num_tokens=PROMPT_TOKENS, rng=rng)
            notes.add(what, **_figures(probes))
        status = await victim.status()
    headers = tuple((name, "victim") for name in FORGED)
    forger = dial(address, options=ClientOptions(metadata=headers), environ={TOKEN: tokens["attacker"]})
    async with dial(address, environ={TOKEN: tokens["victim"]}) as victim, forger:
        probes = await probe(victim, forger, rounds=QUICK_ROUNDS, num_tokens=PROMPT_TOKENS, rng=rng)
    notes.add("forged", **_figures(probes))
    notes.add("nobody", code=await _code_of_a_stranger(address))
    for replica in status.replicas:
        notes.add("back door", code=await knock(replica.address))


def _figures(probes: Probes) -> dict[str, float]:
    return {
        "auc": probes.auc,
        "rounds": len(probes.asked_s),
        "asked_ms": 1e3 * sorted(probes.asked_s)[len(probes.asked_s) // 2],
        "new_ms": 1e3 * sorted(probes.new_s)[len(probes.new_s) // 2],
        "cached_tokens": sum(probes.cached_tokens),
    }


async def _code_of_a_stranger(address: str) -> str:
    """Return what a request without a token ends with."""
    async with Client(address) as client:
        try:
            await client.complete("hello", max_tokens=1, timeout=10)
        except Exception as error:
            return str(getattr(error, "code", type(error).__name__))
    return "OK"


async def knock(address: str) -> str:
    """Dial a data port without the secret; return how that ends: OK if it says more than its question."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = DataPlaneServiceStub(channel).Attach(timeout=KNOCK_S)
        try:
            await call.read()
            hello = pb.Hello(protocol=PROTOCOL, router_id="stranger", router_epoch=1, proof=bytes(32))
            await call.write(pb.AttachRequest(hello=hello, credit=pb.Credit(step_batches=100)))
            if await call.read() is not grpc.aio.EOF:
                return "OK"
        except grpc.aio.AioRpcError:
            pass
        return (await call.code()).name


def judge(notes: Notes) -> list[Bar]:
    """Return the bars; an AUC is that of all rounds together."""
    bars = []
    for what, limit, check in (("within", MIN_SEEING_AUC, at_least), ("across", MAX_ISOLATED_AUC, at_most)):
        detail = (
            f"{figure(notes.total(what, 'rounds'))} rounds; first token of asked prompts "
            f"{figure(notes.median(what, 'asked_ms'), 'ms')}, of new ones {figure(notes.median(what, 'new_ms'), 'ms')}"
        )
        bars.append(check(f"isolation: ROC AUC {what} a tenant", notes.median(what, "auc"), limit, detail))
    for what, name in (("across", "another tenant's tokens found in the cache"), ("forged", "the same, names forged")):
        bars.append(at_most(f"isolation: {name}", notes.total(what, "cached_tokens"), 0))
    for what, name in (("nobody", "a call without a token"), ("back door", "a data port without the secret")):
        codes = notes.of(what, "code")
        refused = sum("UNAUTHENTICATED" in code for code in codes)
        share = refused / len(codes) if codes else None
        bars.append(at_least(f"isolation: {name} is refused", share, 1.0, ", ".join(codes)))
    return bars


if __name__ == "__main__":
    sys.exit(main("trust_isolation", measure, judge))
