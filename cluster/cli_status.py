"""How a cluster's status looks: as a record, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octavo.v1 import status_service_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = TypeVar("Status", pb.RouterStatus, pb.ReplicaStatus)

_STATE_STYLES = {"serving": "green", "ready": "green", "connecting": "yellow", "draining": "yellow", "refused": "red"}


def status_record(status: pb.GetStatusResponse) -> dict[str, Any]:
    """Return the status under the contract's names, zeros included, numbers as numbers."""
    return {
        "version": status.version,
        "router": _fields(status.router),
        "replicas": [_fields(replica) for replica in status.replicas],
    }


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
            for then, now in _pairs([before.router], [after.router])
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


def _pairs(before: Iterable[Status], after: Iterable[Status]) -> Iterator[tuple[Status, Status]]:
    """Yield what is in both, by its id."""
    then = {each.id: each for each in before}
    return ((then[each.id], each) for each in after if each.id in then)


def status_view(status: pb.GetStatusResponse, rates: Rates = NO_RATES) -> RenderableType:
    router = status.router
    line = Text.assemble(
        ("octavo ", "bold"),
        f"{status.version}  router {router.id} ",
        (router.state, _STATE_STYLES.get(router.state, "")),
        f" for {_duration(router.uptime_s)}\n",
        f"queued {router.num_queued_requests} ({router.num_queued_tokens} of {router.max_queued_tokens} tokens), ",
        f"running {router.num_running_requests}, sessions {router.num_sessions}, ",
        f"ended {router.num_ended_total} of {router.num_accepted_total}\n",
    )
    if not status.replicas:
        return Group(line, Text("no replica", style="yellow"))
    return Group(line, _replicas(status, rates))


def _replicas(status: pb.GetStatusResponse, rates: Rates) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("replica", "model", "state", "engine"):
        table.add_column(heading, overflow="fold")
    for heading in ("run+wait", "KV blocks", "cached", "preempted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for replica in status.replicas:
        used = replica.num_blocks - replica.num_free_blocks
        state = Text(replica.state, style=_STATE_STYLES.get(replica.state, ""))
        if replica.detail:
            state.append(f" ({replica.detail})", style="dim")
        table.add_row(
            replica.id,
            replica.model,
            state,
            f"{replica.engine} {replica.kernels} {replica.dtype}",
            f"{replica.num_running}+{replica.num_waiting}",
            f"{used}/{replica.num_blocks}",
            _share(replica.prefix_cache_hits, replica.prefix_cache_queries),
            str(replica.num_preemptions),
        )
    return table


def _fields(message: pb.RouterStatus | pb.ReplicaStatus) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
