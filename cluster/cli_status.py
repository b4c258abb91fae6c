"""How a cluster's status looks: as a record, and as tables for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octavo.v1 import status_service_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.cli_answer import printable

Status = TypeVar("Status", pb.RouterStatus, pb.ReplicaStatus)

_STATE_STYLES = {
    "serving": "green",
    "ready": "green",
    "starting": "cyan",
    "connecting": "yellow",
    "draining": "yellow",
    "refused": "red",
}
_BAR = 8
"""Characters that a full memory is wide."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What counters have gained from one status to the next, by the id of a router or a replica."""

    ended: Mapping[str, float] = field(default_factory=dict)
    """Requests a second."""
    cached: Mapping[str, float] = field(default_factory=dict)
    """The part of the prompt tokens that were found in the cache, where there were prompts."""

    @classmethod
    def between(cls, before: pb.GetStatusResponse, after: pb.GetStatusResponse, seconds: float) -> Rates:
        ended = {
            now.id: (now.num_ended_total - then.num_ended_total) / seconds
            for then, now in _pairs(_routers(before), _routers(after))
            if seconds > 0
        }
        cached = {
            now.id: (now.prefix_cache_hits - then.prefix_cache_hits)
            / (now.prefix_cache_queries - then.prefix_cache_queries)
            for then, now in _pairs(before.replicas, after.replicas)
            if now.epoch == then.epoch and now.prefix_cache_queries > then.prefix_cache_queries
        }
        return cls(ended, cached)


NO_RATES = Rates()


def status_record(status: pb.GetStatusResponse) -> dict[str, Any]:
    """Return the status under the contract's names, zeros included, numbers as numbers."""
    return {
        "version": status.version,
        "router": _fields(status.router),
        "replicas": [_fields(replica) for replica in status.replicas],
        "models": [_fields(model) for model in status.models],
        "routers": [_fields(router) for router in status.routers],
    }


def status_view(status: pb.GetStatusResponse, rates: Rates = NO_RATES, *, now: float | None = None) -> RenderableType:
    """Return the tables. `now`: seconds since 1970."""
    now = time.time() if now is None else now
    parts: list[RenderableType] = [Text.assemble(("octavo ", "bold"), status.version)]
    if status.models:
        parts += ["", _models(status.models, now)]
    parts += ["", _router_table(_routers(status), rates), ""]
    parts.append(_replicas(status.replicas, rates) if status.replicas else Text("no replica", style="yellow"))
    if status.router.metrics_address:
        parts += ["", Text.assemble(("metrics ", "bold"), printable(status.router.metrics_address))]
    return Group(*parts)


def _models(models: Sequence[pb.ModelStatus], now: float) -> Table:
    table = _table(("model", "replicas"), ("bounds", "queued", "running", "waits"), ("last decision",))
    for model in models:
        table.add_row(
            model.name,
            _count(model),
            f"{model.min_replicas} to {model.max_replicas}" if model.has_outlook else "-",
            str(model.num_queued),
            str(model.num_running),
            f"{model.oldest_wait_s:.1f} s" if model.num_queued else "-",
            Text(printable(model.failure), style="red") if model.failure else _decision(model, now),
        )
    return table


def _count(model: pb.ModelStatus) -> Text:
    if not model.has_outlook:
        return Text(str(model.num_ready))
    text = Text(f"{model.num_ready} of {model.target}", style="" if model.num_ready == model.target else "yellow")
    if model.HasField("ready_in_s"):
        text.append(f", next in {model.ready_in_s:.0f} s", style="cyan")
    return text


def _decision(model: pb.ModelStatus, now: float) -> Text:
    if not model.has_outlook:
        return Text("octavo-signal is silent", style="dim")
    text = Text(f"{model.target} since {_duration(max(0.0, now - model.decided_at))}: {printable(model.reason)}")
    if model.HasField("override"):
        text.append(f" (an operator asks for {model.override})", style="yellow")
    return text


def _router_table(routers: Iterable[pb.RouterStatus], rates: Rates) -> Table:
    numbers = ("queued", "tokens queued", "running", "sessions", "ended", "a second")
    table = _table(("router", "state"), numbers, ("address",))
    for router in routers:
        state = Text(router.state, style=_STATE_STYLES.get(router.state, ""))
        state.append(f" for {_duration(router.uptime_s)}", style="dim")
        table.add_row(
            router.id,
            state,
            str(router.num_queued_requests),
            f"{router.num_queued_tokens} of {router.max_queued_tokens}",
            str(router.num_running_requests),
            str(router.num_sessions),
            f"{router.num_ended_total} of {router.num_accepted_total}",
            f"{rates.ended[router.id]:.1f}" if router.id in rates.ended else "-",
            router.own_address,
        )
    return table


def _replicas(replicas: Iterable[pb.ReplicaStatus], rates: Rates) -> Table:
    numbers = ("run+wait", "KV blocks", "cached", "tokens/s", "preempted")
    table = _table(("replica", "model", "state", "engine"), numbers, ())
    for replica in replicas:
        table.add_row(
            replica.id,
            replica.model,
            _state(replica),
            f"{replica.engine} {replica.kernels} {replica.dtype}",
            f"{replica.num_running}+{replica.num_waiting}",
            _memory(replica),
            _percent(rates.cached[replica.id])
            if replica.id in rates.cached
            else _share(replica.prefix_cache_hits, replica.prefix_cache_queries),
            f"{replica.tokens_per_s:.0f}",
            str(replica.num_preemptions),
        )
    return table


def _state(replica: pb.ReplicaStatus) -> Text:
    state = Text(replica.state, style=_STATE_STYLES.get(replica.state, ""))
    detail = [printable(replica.detail)] if replica.detail else []
    if replica.starting_s:
        detail.append(f"for {_duration(replica.starting_s)}")
    return state.append(f" ({' '.join(detail)})", style="dim") if detail else state


def _memory(replica: pb.ReplicaStatus) -> Text:
    """Return how full its KV memory is, blocks that only the cache holds not counted."""
    used = replica.num_blocks - replica.num_free_blocks
    full = round(_BAR * used / replica.num_blocks) if replica.num_blocks else 0
    style = "red" if used * 10 > replica.num_blocks * 9 else "green"
    return Text.assemble(f"{used}/{replica.num_blocks} ", ("█" * full, style), ("░" * (_BAR - full), "dim"))


def _table(left: Iterable[str], numbers: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in right:
        table.add_column(heading, overflow="fold")
    return table


def _routers(status: pb.GetStatusResponse) -> Sequence[pb.RouterStatus]:
    """Return all routers; the one that was asked if it knows of no other, and in its own words if it does."""
    return [status.router if each.id == status.router.id else each for each in status.routers] or [status.router]


def _pairs(before: Iterable[Status], after: Iterable[Status]) -> Iterator[tuple[Status, Status]]:
    """Yield what is in both, by its id."""
    then = {each.id: each for each in before}
    return ((then[each.id], each) for each in after if each.id in then)


def _fields(message: pb.RouterStatus | pb.ReplicaStatus | pb.ModelStatus) -> dict[str, Any]:
    """Return all fields by their names, None for what is absent."""
    present = {field.name for field, _ in message.ListFields()}
    return {
        field.name: None if field.has_presence and field.name not in present else getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
    }


def _share(part: int, whole: int) -> str:
    return _percent(part / whole) if whole else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
