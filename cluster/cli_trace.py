"""`octavo trace`: why a request took as long as it did, from what routers remember. Needs no back end.

Asks every router of the cluster that the first one knows of: which one a request went through its client need not know.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Final, TypeVar

import typer
from octavo.client import CallError, Client, NotFoundError
from octavo.v1 import status_service_pb2 as pb

from cluster.cli_answer import EXIT_FAILED, printable, report
from cluster.cli_client import DEFAULT_ADDRESS, Address, router_targets
from cluster.cli_dial import dial

_EXIT_CODES = "Exit codes: 0 done; 1 no router remembers it; 2 wrong usage; 4 no router was reached."
_ANYWHERE: Final = frozenset({"0.0.0.0", "[::]", "::", "*"})
T = TypeVar("T")

app = typer.Typer()


@app.command(epilog=_EXIT_CODES)
def trace(
    name: Annotated[str, typer.Argument(metavar="ID", help="A request's id, or the id of its trace.")] = "",
    slowest: Annotated[
        int | None, typer.Option(min=1, max=100, help="Instead: list so many that took longest.")
    ] = None,
    model: Annotated[str, typer.Option(help="Of --slowest: those of one model.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a request.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Explain where a request's time went: what it waited for, where it was placed and what the others would have cost,
    what was cached, how it was computed, and how it was sent.

    Routers remember the last `telemetry.max_kept_requests` that have ended, and those that are under way; a tenant sees
    its own. The id is the one that `octavo generate --json` and clients tell, or the trailer `octavo-request-id`.

    Examples:

    - `octavo trace --slowest 10`
    - `octavo trace 4bf92f3577b34da6a3ce929d0e0e4736`
    """
    if bool(name) == (slowest is not None):
        raise typer.BadParameter("give the id of a request or a trace, or --slowest")
    targets = router_targets(address)
    command = _explain(targets, name, as_json) if slowest is None else _list(targets, slowest, model, as_json)
    try:
        code = asyncio.run(command)
    except CallError as error:
        code = report(error)
    raise typer.Exit(code)


async def _explain(targets: list[str], name: str, as_json: bool) -> int:
    from cluster.trace_view import explained

    async def find(client: Client) -> list[pb.RequestRecord]:
        try:
            return await client.find_requests(name)
        except NotFoundError:
            return []

    answers = await _ask_all(targets, find)
    found = sorted((record for records in answers for record in records), key=lambda record: record.arrived_at)
    if not found:
        typer.echo(
            f"octavo: error: none of the {len(answers)} routers that answered remembers a request or a trace "
            f"{printable(name)!r} of yours: they know those that are under way and the last ones that have ended; "
            f"telemetry.max_kept_requests says how many",
            err=True,
        )
        return EXIT_FAILED
    for number, record in enumerate(found):
        if as_json:
            typer.echo(_as_json(record))
        else:
            typer.echo(("\n" if number else "") + "\n".join(map(printable, explained(record))))
    return 0


async def _list(targets: list[str], number: int, model: str, as_json: bool) -> int:
    from cluster.trace_view import listed

    answers = await _ask_all(targets, lambda client: client.slowest_requests(number, model=model))
    records = [record for answer in answers for record in answer.records]
    records = sorted(records, key=lambda record: -record.duration_s)[:number]
    if as_json:
        for record in records:
            typer.echo(_as_json(record))
        return 0
    num_kept = sum(answer.num_kept for answer in answers)
    typer.echo("\n".join(map(printable, listed(records, num_kept=num_kept, num_routers=len(answers)))))
    return 0


async def _ask_all(targets: Sequence[str], ask: Callable[[Client], Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all routers say that can be reached. Raises CallError if the first one cannot."""
    async with dial(targets) as client:
        status = await client.status()
        own = await ask(client)
    others = [router for router in status.routers if router.id != status.router.id and router.own_address]

    async def ask_other(router: pb.RouterStatus) -> list[T]:
        try:
            async with dial(_reachable(router.own_address, targets[0])) as client:
                return [await ask(client)]
        except CallError as error:
            typer.echo(f"octavo: router {router.id} at {router.own_address} was not asked: {error}", err=True)
            return []

    answers = await asyncio.gather(*map(ask_other, others))
    return [own, *(answer for each in answers for answer in each)]


def _reachable(own_address: str, target: str) -> str:
    """Return where a router is reached that listens on all addresses of its node: where the first one was."""
    host, _, port = own_address.rpartition(":")
    return f"{target.rpartition(':')[0]}:{port}" if host in _ANYWHERE else own_address


def _as_json(record: pb.RequestRecord) -> str:
    from google.protobuf.json_format import MessageToDict

    fields = MessageToDict(record, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(fields, ensure_ascii=False)
