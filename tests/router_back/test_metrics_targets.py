"""Where a router looks for the metrics of the other processes."""

from __future__ import annotations

from router import membership
from router.metrics_targets import metrics_targets
from router.outlook import LastOutlook
from router.signal import Outlook, RouterReport
from router.types import ReplicaAddress


def replica(name: str, metrics: str, node: str = "here") -> ReplicaAddress:
    return ReplicaAddress(replica_id=name, address="127.0.0.1:1", node_id=node, metrics=metrics)


def router(name: str, metrics: str, node: str = "here") -> RouterReport:
    return RouterReport(router_id=name, epoch=1, metrics_address=metrics, node_id=node)


def test_everybody_is_asked_who_can_be_reached() -> None:
    members = (
        replica("a", "http://127.0.0.1:1/metrics"),
        replica("b", "http://10.0.0.2:1/metrics", "there"),
        replica("far", "http://127.0.0.1:3/metrics", "there"),
        replica("six", "http://[::1]:3/metrics", "there"),
        replica("mute", ""),
    )
    membership.publish("metrics-1", members[:2])
    membership.publish("metrics-2", members[2:])
    outlook = LastOutlook()
    routers = (router("R", "http://localhost:1/metrics"), router("S", "http://localhost:1/metrics", "there"))
    outlook.heard(Outlook(routers=routers, metrics_address="http://127.0.0.1:9/metrics", node_id="here"))
    try:
        assert metrics_targets(outlook, "here") == {
            "a": "http://127.0.0.1:1/metrics",
            "b": "http://10.0.0.2:1/metrics",
            "R": "http://localhost:1/metrics",
            "octavo-signal": "http://127.0.0.1:9/metrics",
        }
    finally:
        for group in ("metrics-1", "metrics-2"):
            membership.publish(group, ())
    assert metrics_targets(LastOutlook(), "here") == {}
