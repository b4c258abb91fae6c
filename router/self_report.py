"""What one router says of itself: to the cluster's scaling, and to whoever asks for its status."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from router.intake import Intake
from router.outlook import LastOutlook
from router.sessions import Sessions
from router.signal import ModelSignal, RouterReport
from router.token_rates import TokenRates
from router.types import Backend, ReplicaView


class SelfReport:
    """`models` are the names of all that it serves or should; may grow. Whoever has bound the ports says where they are
    in `address`, of all routers of the node, and `own_address`, and where metrics are told in the other two."""

    def __init__(
        self,
        intake: Intake,
        sessions: Sessions,
        backend: Backend,
        models: Collection[str],
        *,
        router_id: str,
        outlook: LastOutlook,
    ) -> None:
        self.router_id = router_id
        self.epoch = time.time_ns()
        self.address = self.own_address = self.node_id = ""
        self.metrics_address = self.cluster_metrics_address = ""
        self.outlook = outlook
        """What was heard of the others, and of scaling."""
        self.token_rates = TokenRates()
        self._intake = intake
        self._sessions = sessions
        self._backend = backend
        self._models = models
        self._started_at = time.time()

    def report(self) -> RouterReport:
        backlog = self._backend.backlog()
        return RouterReport(
            router_id=self.router_id,
            epoch=self.epoch,
            address=self.address,
            own_address=self.own_address,
            metrics_address=self.metrics_address,
            cluster_metrics_address=self.cluster_metrics_address,
            pid=os.getpid(),
            node_id=self.node_id,
            state="draining" if self._intake.is_draining else "serving",
            started_at=self._started_at,
            num_queued_tokens=backlog.num_queued_tokens,
            max_queued_tokens=backlog.max_queued_tokens,
            num_queued_requests=backlog.num_queued_requests,
            num_running_requests=backlog.num_running_requests,
            num_accepted_total=self._intake.num_accepted,
            num_ended_total=self._intake.num_ended,
            num_sessions=self._sessions.num_open,
            models={name: self._backend.signal(name) for name in self._models},
            overrides=self.outlook.overrides,
        )

    def signal(self, model: str) -> ModelSignal:
        return self._backend.signal(model)

    def routers(self) -> list[RouterReport]:
        """Return what all routers say that are known, this one now."""
        own = self.report()
        others = [report for report in self.outlook.routers if report.router_id != self.router_id]
        return sorted([own, *others], key=lambda report: report.router_id)

    def replicas(self) -> list[ReplicaView]:
        """Return what all replicas are and do, those that are starting among them."""
        views = list(self._backend.replicas())
        known = {view.replica_id for view in views}
        for name in self._models:
            outlook = self.outlook.model(name)
            for start in outlook.starting if outlook is not None else ():
                if start.replica_id not in known:
                    views.append(
                        ReplicaView(
                            replica_id=start.replica_id,
                            model=name,
                            state="starting",
                            detail=start.stage,
                            pid=start.pid,
                            node_id=start.node_id,
                            starting_s=start.since_s,
                        )
                    )
        return views

    def sample(self) -> None:
        """Take note of how far replicas are; about as often as a report is made."""
        self.token_rates.sample(self._backend.replicas(), time.monotonic())
