"""How a cluster's status looks: as a record, and as tables for a terminal."""

from __future__ import annotations

from typing import Any

from octavo.v1 import status_service_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STATE_STYLES = {"serving": "green", "ready": "green", "connecting": "yellow", "draining": "yellow", "refused": "red"}


def status_record(status: pb.GetStatusResponse) -> dict[str, Any]:
    """Return the status under the contract's names, zeros included, numbers as numbers."""
    return {
        "version": status.version,
        "router": _fields(status.router),
        "replicas": [_fields(replica) for replica in status.replicas],
    }


def status_view(status: pb.GetStatusResponse) -> RenderableType:
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
    return Group(line, _replicas(status))


def _replicas(status: pb.GetStatusResponse) -> Table:
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
