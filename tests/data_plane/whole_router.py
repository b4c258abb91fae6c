"""A whole router in this process: its front on a loopback socket, its back, and replicas with the fake engine, with
metrics and records as a cluster's router has them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
from octavo.client import Client
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import status_service_pb2 as status_pb
from octavo.v1 import types_pb2 as types
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub
from octavo.v1.status_service_pb2_grpc import StatusServiceStub
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from cluster.telemetry_meter import Histograms, QuickMeterProvider, collecting
from router.backends import Backends
from router.config import ObserverConfig, RouterConfig
from router.dispatcher import Dispatcher
from router.metrics import RouterMetrics
from router.observer import RequestObserver
from router.server import RouterServer
from tests.data_plane.rig import FAST, ROUTER, VOCAB, Replica, until
from tests.router.rig import served_model

MODEL = "toy"
Labels = frozenset[tuple[str, Any]]


class Meters:
    """Metrics that a test reads: a router's, or those of several with the same meter."""

    def __init__(self) -> None:
        histograms = Histograms()
        self._reader = collecting(InMemoryMetricReader, histograms)()
        self._provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.meter = QuickMeterProvider(self._provider, histograms).get_meter("octavo.router")

    def points(self, name: str) -> dict[Labels, Any]:
        """Return the points of a metric by their labels; none if there is no such metric."""
        data = self._reader.get_metrics_data()
        scopes = [scope for each in data.resource_metrics for scope in each.scope_metrics] if data is not None else []
        found = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        return {frozenset((point.attributes or {}).items()): point for each in found for point in each.data.data_points}

    def value(self, name: str, /, **labels: str) -> Any:
        """Return the sum, over all points with `labels` (whose last word is enough), of the values or counts."""
        return sum(
            point.count if hasattr(point, "count") else point.value
            for known, point in self.points(name).items()
            if all(_has(dict(known), label, value) for label, value in labels.items())
        )


def _has(labels: Mapping[str, str], name: str, value: str) -> bool:
    return any(key.rpartition(".")[2] == name and each == value for key, each in labels.items())


class WholeRouter:
    """`client` speaks to it."""

    def __init__(self, address: str, client: Client, dispatcher: Dispatcher, observer: RequestObserver) -> None:
        self.address = address
        self.client = client
        self.dispatcher = dispatcher
        self.observer = observer
        self.meters: Meters

    async def records(self, name: str, *metadata: tuple[str, str]) -> list[status_pb.RequestRecord]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            request = status_pb.GetRequestRecordRequest(id=name)
            response = await StatusServiceStub(channel).GetRequestRecord(request, metadata=metadata, timeout=10)
        return list(response.records)

    async def ask(self, token_id: int, *metadata: tuple[str, str], name: str = "") -> None:
        """Have a short answer made over Generate, without the client's retries."""
        prompt = types.Prompt(token_ids=types.TokenIds(ids=[token_id]))
        request = pb.GenerateRequest(prompt=prompt, max_tokens=2, client_request_id=name)
        async with grpc.aio.insecure_channel(self.address) as channel:
            async for _ in InferenceServiceStub(channel).Generate(request, timeout=20, metadata=metadata):
                pass

    async def record(self, name: str) -> status_pb.RequestRecord:
        (record,) = await self.records(name)
        return record


@asynccontextmanager
async def whole_router(
    replicas: Sequence[Replica], *, observer: ObserverConfig | None = None, meters: Meters | None = None, **config: Any
) -> AsyncIterator[WholeRouter]:
    """A router that all `replicas`, which it starts and stops, are ready for."""
    meters, observing = meters or Meters(), observer or ObserverConfig()
    metrics = RouterMetrics(meters.meter, [MODEL], max_tenants=observing.max_tenants)
    observed = RequestObserver(observing, metrics)
    backends, dispatcher = Backends(), Dispatcher(RouterConfig(**config), ROUTER, link_times=FAST)
    dispatcher.measure(metrics)
    dispatcher.start()
    backends.add(MODEL, dispatcher)
    model = served_model(MODEL)
    manifest = dataclasses.replace(model.manifest, vocab_size=VOCAB, max_model_len=1_000, eos_token_ids=())
    model = dataclasses.replace(model, manifest=manifest)
    server = RouterServer(RouterConfig(**config), {MODEL: model}, backends, router_id="router-1", version="0")
    server.observe(observed)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    async with AsyncExitStack() as stack:
        stack.push_async_callback(backends.stop)
        await server.start()
        stack.push_async_callback(server.stop)
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.stop)
        dispatcher.update_replicas([replica.address for replica in replicas])
        await until(lambda: sum(view.state == "ready" for view in dispatcher.replicas()) == len(replicas))
        router = WholeRouter(address, await stack.enter_async_context(Client(address)), dispatcher, observed)
        router.meters = meters
        yield router
