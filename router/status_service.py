"""StatusService: the cluster as this router sees it, what it has heard of scaling and of other routers, and what it can
tell of single requests: to each tenant of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import grpc.aio
from octavo.names import Reason
from octavo.v1 import status_service_pb2 as pb
from octavo.v1.status_service_pb2_grpc import StatusServiceServicer

from router import status
from router.identity import Identities
from router.intake import Intake
from router.model import Models, UnservedModel
from router.record_messages import to_message
from router.self_report import SelfReport
from router.signal import ModelOutlook, ModelSignal, RouterReport
from router.types import ReplicaView
from router.violations import shown
from workers.errors import NotFoundError

DEFAULT_LISTED: Final = 10
MAX_LISTED: Final = 100


class StatusServicer(StatusServiceServicer):
    def __init__(
        self, models: Models, about: SelfReport, intake: Intake, identities: Identities, *, version: str
    ) -> None:
        self._models = models
        self._about = about
        self._intake = intake
        self._identities = identities
        self._version = version

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        about, now = self._about, time.time()
        routers = {report.router_id: report for report in about.routers()}
        own = routers[about.router_id]
        return pb.GetStatusResponse(
            version=self._version,
            router=_router(own, now),
            replicas=[_replica(view, about.token_rates.per_second(view.replica_id)) for view in about.replicas()],
            models=[self._model(name, own.models) for name in self._models],
            routers=[_router(report, now) for report in routers.values()],
        )

    async def GetRequestRecord(  # noqa: N802
        self, request: pb.GetRequestRecordRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetRequestRecordResponse:
        found = self._intake.find(request.id.strip(), tenant=self._identities.identify(context).tenant)
        if not found:
            limit = self._intake.observer.records.max_records
            error = NotFoundError(
                f"this router remembers no request and no trace {shown(request.id)} of yours; it knows those that "
                f"it has, and the last {limit} that have ended",
                reason=Reason.REQUEST_NOT_FOUND,
            )
            await status.abort(context, error)
        router_id = self._about.router_id
        return pb.GetRequestRecordResponse(records=[to_message(record, router_id) for record in found])

    async def ListRequestRecords(  # noqa: N802
        self, request: pb.ListRequestRecordsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListRequestRecordsResponse:
        records, tenant = self._intake.observer.records, self._identities.identify(context).tenant
        number = min(request.max_records or DEFAULT_LISTED, MAX_LISTED)
        return pb.ListRequestRecordsResponse(
            records=[
                to_message(record, self._about.router_id)
                for record in records.slowest(number, tenant=tenant, model=request.model)
            ],
            num_kept=len(records),
            max_kept=records.max_records,
        )

    def _model(self, name: str, signals: Mapping[str, ModelSignal]) -> pb.ModelStatus:
        model, outlook = self._models[name], self._about.outlook.model(name)
        signal = signals.get(name, ModelSignal())
        message = pb.ModelStatus(
            name=name,
            failure=model.failure if isinstance(model, UnservedModel) else "",
            num_ready=signal.num_ready,
            num_queued=signal.num_queued,
            num_running=signal.num_aboard,
            oldest_wait_s=signal.oldest_wait_s,
            num_turned_away_total=signal.num_turned_away_total,
        )
        if outlook is not None:
            message.MergeFrom(_outlook(outlook))
            message.failure = message.failure or outlook.failure
        return message


def _outlook(outlook: ModelOutlook) -> pb.ModelStatus:
    return pb.ModelStatus(
        has_outlook=True,
        target=outlook.target,
        min_replicas=outlook.min_replicas,
        max_replicas=outlook.max_replicas,
        reason=outlook.reason,
        decided_at=outlook.decided_at,
        override=outlook.override,
        demand=outlook.demand,
        start_s=outlook.start_s,
        ready_in_s=outlook.ready_in_s,
    )


def _router(report: RouterReport, now: float) -> pb.RouterStatus:
    return pb.RouterStatus(
        id=report.router_id,
        state=report.state,
        uptime_s=max(now - report.started_at, 0.0),
        num_queued_requests=report.num_queued_requests,
        num_queued_tokens=report.num_queued_tokens,
        num_running_requests=report.num_running_requests,
        max_queued_tokens=report.max_queued_tokens,
        num_accepted_total=report.num_accepted_total,
        num_ended_total=report.num_ended_total,
        num_sessions=report.num_sessions,
        pid=report.pid,
        address=report.address,
        own_address=report.own_address,
        node_id=report.node_id,
        metrics_address=report.cluster_metrics_address,
    )


def _replica(view: ReplicaView, tokens_per_s: float) -> pb.ReplicaStatus:
    load = view.load
    return pb.ReplicaStatus(
        id=view.replica_id,
        model=view.model,
        state=view.state,
        detail=view.detail,
        address=view.address,
        pid=view.pid,
        node_id=view.node_id,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        block_size=view.block_size,
        owed_prefill_tokens=load.owed_prefill_tokens,
        prefix_cache_queries=load.prefix_cache_queries,
        prefix_cache_hits=load.prefix_cache_hits,
        num_preemptions=load.num_preemptions,
        num_drafted_tokens=load.num_drafted_tokens,
        num_accepted_tokens=load.num_accepted_tokens,
        kernels=view.kernels,
        dtype=view.dtype,
        engine=view.engine,
        epoch=view.epoch,
        num_resyncs=view.num_resyncs,
        tokens_per_s=tokens_per_s,
        starting_s=view.starting_s,
    )
