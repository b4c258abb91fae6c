"""What a router tells the cluster's scaling of its requests, and what it hears back: the nouns of `octavo-signal`.

    router --RouterReport, every REPORT_PERIOD_S--> SignalLine --> Outlook --> router

Standard library only, for the actor and Serve's controller read it as well. Counters (`*_total`) only grow while a
router lives (`epoch`), so that a lost report loses nothing; everything else is how it is now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

REPORT_PERIOD_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSignal:
    """One model in one router. Sequences: a request counts once for each of its choices."""

    num_queued: int = 0
    """Sequences that wait for a replica."""
    queued_tokens: int = 0
    num_running: int = 0
    """Sequences of this router that a replica has."""
    num_aboard: int = 0
    """Sequences that replicas have, of all routers, by what they report."""
    owed_prefill_tokens: int = 0
    """Prompt tokens that its replicas have yet to compute, for all routers."""
    oldest_wait_s: float = 0.0
    """Of those that wait."""
    num_arrived_total: int = 0
    """Sequences that were asked for, those turned away among them."""
    num_turned_away_total: int = 0
    """Of those, the ones that another replica might have answered: refused because the queue was full or the deadline
    too near, and those whose time ran out while they waited."""
    num_ended_total: int = 0
    """Sequences that have left a replica, however they ended."""
    served_s_total: float = 0.0
    """What these together have spent there."""
    running_s: float = 0.0
    """What those that run have spent there so far, together."""
    num_ready: int = 0
    """Replicas that may be sent work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """What one router says of itself."""

    router_id: str
    epoch: int
    """Of the router's process."""
    address: str = ""
    """Of all routers of its node."""
    own_address: str = ""
    """Of this router alone."""
    metrics_address: str = ""
    """Where it tells its own metrics; empty if nowhere."""
    cluster_metrics_address: str = ""
    """Where it tells those of all processes."""
    pid: int = 0
    node_id: str = ""
    state: str = "serving"
    """"serving" or "draining"."""
    started_at: float = 0.0
    """Seconds since 1970."""
    num_queued_tokens: int = 0
    max_queued_tokens: int = 0
    num_queued_requests: int = 0
    num_running_requests: int = 0
    num_accepted_total: int = 0
    num_ended_total: int = 0
    num_sessions: int = 0
    models: Mapping[str, ModelSignal] = field(default_factory=dict)
    """By the name that requests call them."""
    overrides: Mapping[str, int] = field(default_factory=dict)
    """What operators have asked for, as this router heard last: an actor that has just restarted knows no other way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingReplica:
    """A replica that is not ready yet."""

    replica_id: str
    stage: str
    """"starting", "fetching", "loading", "packing" or "warming"."""
    since_s: float
    """How long ago its start began."""
    node_id: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutlook:
    """What has been decided for one model."""

    target: int
    """Replicas that there shall be."""
    min_replicas: int
    """As of now: a schedule counts."""
    max_replicas: int
    reason: str
    """Of the last decision that changed the target, in words."""
    decided_at: float
    """When that was, in seconds since 1970."""
    override: int | None = None
    """What an operator has asked for (`octavo scale`); None: the signal decides."""
    demand: float = 0.0
    """Sequences that there should be places for, as last seen."""
    start_s: float | None = None
    """How long the last replica took from its process's start until it was ready; None: none has started yet."""
    ready_in_s: float | None = None
    """When the next replica is expected to be ready, by `start_s`, if one is starting or wanted; else None."""
    starting: tuple[StartingReplica, ...] = ()
    failure: str = ""
    """Why its replicas do not start, if they do not."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What every router hears back."""

    models: Mapping[str, ModelOutlook] = field(default_factory=dict)
    routers: tuple[RouterReport, ...] = ()
    """All routers of which something was heard lately, whoever asks among them."""
    metrics_address: str = ""
    """Where the actor tells its own metrics."""
    node_id: str = ""
    """Of the actor."""


class SignalLine(Protocol):
    """The way to `octavo-signal`; picklable. `cluster.signal` implements it."""

    async def report(self, report: RouterReport) -> Outlook:
        """Hand a report in. Raises ConnectionError if nobody is there, TimeoutError if nobody answers."""
