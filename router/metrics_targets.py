"""Where the other processes of the cluster tell their metrics, as far as this router knows and can reach them."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from router import membership
from router.outlook import LastOutlook

SIGNAL: Final = "octavo-signal"
"""What the actor of that name is called among them."""


def metrics_targets(outlook: LastOutlook, node_id: str) -> dict[str, str]:
    """Return addresses by the names of replicas, routers and the actor. What listens on the loopback of another node
    than `node_id` cannot be reached, and is left out. Thread safe."""
    replicas = ((each.replica_id, each.metrics, each.node_id) for each in membership.members())
    routers = ((each.router_id, each.metrics_address, each.node_id) for each in outlook.routers)
    told = (*replicas, *routers, (SIGNAL, *outlook.signal_metrics))
    return {name: address for name, address, node in told if address and (node == node_id or not _is_local(address))}


def _is_local(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
