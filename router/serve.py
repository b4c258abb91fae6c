"""The router as Ray Serve sees it: a process with the public port, and the place where Serve says which replicas exist.

    Serve's controller --push--> MembershipRouter.update_replicas --> membership --call_soon_threadsafe--> Dispatcher

The only file of this package that knows Ray. Owns the order of start and stop, and the hand-over of membership between
Serve's thread and the event loop; requests never go through a Serve handle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from octavo.metrics import recording_meter
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from router import garbage, membership
from router.backends import Backends
from router.catalogue import Catalogue
from router.config import RouterSetup
from router.dispatcher import Dispatcher
from router.health_port import HealthPort
from router.hello import RouterIdentity
from router.metrics import RouterMetrics
from router.metrics_targets import metrics_targets
from router.model import ModelSource, ServedModel
from router.observer import RequestObserver
from router.outlook import LastOutlook
from router.reporter import Reporter
from router.server import RouterServer
from router.signal import SignalLine
from router.types import ReplicaAddress
from workers.handshake import ClusterKeys
from workers.types import Boot


class MembershipRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # ray has no types
    """Serve's routing policy for replicas: publishes their set. The few control calls may go to any of them.

    Serve pickles this class by value, with every global of this file that it names: only modules and plain functions.
    """

    def initialize_state(self, *, group: str) -> None:
        self._group = group

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        membership.publish(self._group, tuple(_address(replica) for replica in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # Without it Serve's retry loop spins while there is nobody to choose.
            pending_request.routing_context.should_backoff = True
        return [candidate_replicas]


class Router:
    """The user class of the deployment.

    `workers` are the handles of the deployments whose replicas do the work, by the names of their groups;
    `secret` says the cluster's secret, blocks, and is called once.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        *,
        boot: Boot,
        setup: RouterSetup,
        models: tuple[ModelSource, ...],
        secret: Callable[[], bytes],
        workers: Mapping[str, DeploymentHandle],
        version: str,
        signal: SignalLine,
    ) -> None:
        self._config = setup.config
        self._workers = workers
        self._process = await asyncio.to_thread(boot.start_process, "router")
        self._router_id = serve.get_replica_context().replica_id.unique_id
        self._identity = RouterIdentity(
            router_id=self._router_id,
            epoch=time.time_ns(),
            keys=ClusterKeys.derive(await asyncio.to_thread(secret)),
        )
        self._outlook = LastOutlook()
        meter, names = recording_meter("octavo.router"), [source.name for source in models]
        metrics = None if meter is None else RouterMetrics(meter, names, max_tenants=setup.observer.max_tenants)
        self._observer = RequestObserver(setup.observer, metrics)
        self._backends = Backends()
        self._catalogue = Catalogue(models, boot.model_files, self._serve_model)
        await self._catalogue.load()
        self._server = RouterServer(
            setup.config,
            self._catalogue.models,
            self._backends,
            router_id=self._router_id,
            version=version,
            so_reuseport=True,
            salt_key=self._identity.keys.tenant_salt,
            outlook=self._outlook,
        )
        self._server.observe(self._observer)
        await self._listen(*setup.listen)
        about = self._server.about
        about.address, about.own_address = self._address, self._own_address
        about.node_id = ray.get_runtime_context().get_node_id()
        about.metrics_address = self._process.metrics_address
        about.cluster_metrics_address = await asyncio.to_thread(
            self._process.merge, self._router_id, partial(metrics_targets, self._outlook, about.node_id)
        )
        self._reporter = Reporter(signal, about, after=self._server.health.refresh)
        self._reporter.start()
        garbage.settle()
        self._drained: asyncio.Task[bool] | None = None

    async def _listen(self, host: str, port: int) -> None:
        # The public port is the same for all routers of a node; the other one leads to this router alone.
        self._address, self._own_address = (f"{host}:{self._server.bind(host.strip('[]'), each)}" for each in (port, 0))
        self._health_port: HealthPort | None = None
        if self._config.health_port:
            self._health_port = HealthPort(self._server.health.servicer, host.strip("[]"), self._config.health_port)
        await self._server.start()
        if self._health_port is not None:
            await self._health_port.start()

    def record_replica_metadata(self) -> dict[str, str | int]:
        """Publish where this router listens. Serve asks once, after the start."""
        return {"addr": self._address, "own_addr": self._own_address, "router_id": self._router_id}

    def describe(self) -> dict[str, Any]:
        """Return what `cluster` wants to know of this router: its addresses, its models, its replicas."""
        replicas = [
            {
                "id": view.replica_id,
                "model": view.model,
                "pid": view.pid,
                "state": view.state,
                "detail": view.detail,
                "memory": view.memory,
            }
            for view in self._backends.replicas()
        ]
        return {
            "address": self._address,
            "own_address": self._own_address,
            "metrics": self._server.about.cluster_metrics_address,
            "models": [name for name in self._catalogue.models if name not in self._catalogue.failures],
            "failures": self._catalogue.failures,
            "replicas": replicas,
        }

    def check_health(self) -> None:
        """A router that answers this is well: its one event loop runs."""

    async def drain(self, *, has_successor: bool = False) -> None:
        """Take nothing new, and let what is there end within the configured grace. Callable again."""
        if self._drained is None:
            self._drained = asyncio.create_task(
                self._server.drain(self._config.drain_grace_s, has_successor=has_successor)
            )
        await self._drained

    async def __del__(self) -> None:
        """Serve's word for a graceful stop: drain, close, send the last spans."""
        if not hasattr(self, "_drained"):
            return
        # Who takes all routers away has them drain first; a single one that Serve stops is replaced, or one of several.
        await self.drain(has_successor=True)
        await self._reporter.stop()
        await self._catalogue.stop()
        await self._server.stop()
        if self._health_port is not None:
            await self._health_port.stop()
        await self._backends.stop()
        await asyncio.to_thread(self._process.stop)

    def _serve_model(self, source: ModelSource, model: ServedModel) -> None:
        """Take requests for `model` on, and hear of its replicas from now on."""
        identity = dataclasses.replace(
            self._identity,
            model_fingerprint=model.manifest.model_fingerprint,
            tokenizer_fingerprint=model.manifest.tokenizer_fingerprint,
        )
        dispatcher = Dispatcher(self._config, identity)
        dispatcher.look_out(partial(self._outlook.model, source.name))
        dispatcher.measure(self._observer.metrics)
        dispatcher.start()
        self._backends.add(source.name, dispatcher)
        loop = asyncio.get_running_loop()
        membership.watch(source.group, lambda set_: loop.call_soon_threadsafe(dispatcher.update_replicas, set_))
        # A handle listens to the controller from its first use on, and this is one.
        self._workers[source.group].options(method_name="check_health")


def _address(replica: RunningReplica) -> ReplicaAddress:
    metadata = replica.replica_metadata
    return ReplicaAddress(
        replica_id=metadata["replica_id"],
        address=metadata["addr"],
        node_id=metadata["node_id"],
        is_encrypted=metadata["is_encrypted"],
        memory=metadata["memory"],
        metrics=metadata.get("metrics", ""),
    )
