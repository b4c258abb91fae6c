"""The processes of the router rig: a replica or a router, told what to be by one line of JSON on standard input.

    in    {"role": "replica", "secret", "id", "is_encrypted", "engine": {...}, "tells_time"}
    in    {"role": "router", "secret", "id", "is_encrypted", "port", "shares_port", "config": {...}, "placement",
           "replicas": [[id, address], ...]}
    out   {"address"}, a router also "own_address", which no other has           it serves
    in    end of file: end, also when the parent died

`is_encrypted`: the data ports speak TLS.

Nobody starts them but `RouterRig`.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from typing import Any

import uvloop

from workers.handshake import ClusterKeys


def main() -> None:
    """Be what the first line says until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes our standard input
    job = json.loads(sys.stdin.readline())
    keys = ClusterKeys.derive(bytes.fromhex(job["secret"]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as Ray has it for actors
        runner.run(_replica(job, keys) if job["role"] == "replica" else _router(job, keys))


async def _replica(job: dict[str, Any], keys: ClusterKeys) -> None:
    from load_tests.rigs.router_clock import clock_engine
    from load_tests.rigs.router_model import rig_manifest
    from workers.config import EngineConfig
    from workers.data_plane import DataPlaneServer
    from workers.fake import FakeEngine
    from workers.thread import EngineThread

    config = EngineConfig(engine="fake", **job["engine"])
    config.check()
    make = clock_engine if job["tells_time"] else FakeEngine
    engine = make(config, manifest=rig_manifest(), hash_key=keys.prefix_hash)
    credentials = None
    if job["is_encrypted"]:
        from workers.peer_tls import server_credentials  # takes a while

        credentials = server_credentials(keys.data_plane_tls)
    server = DataPlaneServer(replica_id=job["id"], key=keys.data_plane, credentials=credentials)
    thread = EngineThread(engine, server.notify, max_token_age_s=config.max_token_age_s)
    await server.start(thread)
    await _serve(address=server.address)
    await server.stop()
    thread.close()
    await asyncio.to_thread(thread.join, 2.0)


async def _router(job: dict[str, Any], keys: ClusterKeys) -> None:
    from load_tests.rigs.router_model import rig_model
    from load_tests.rigs.router_policies import make_placement
    from router import garbage
    from router.config import RouterConfig
    from router.dispatcher import Dispatcher
    from router.hello import RouterIdentity
    from router.server import RouterServer
    from router.types import ReplicaAddress

    config = RouterConfig(**job["config"])
    config.check()
    model = rig_model()
    identity = RouterIdentity(
        router_id=job["id"],
        epoch=time.time_ns(),
        keys=keys,
        model_fingerprint=model.manifest.model_fingerprint,
        tokenizer_fingerprint=model.manifest.tokenizer_fingerprint,
    )
    placement = make_placement(job["placement"], random.Random())
    dispatcher = Dispatcher(config, identity, placement=placement)
    dispatcher.start()
    addresses = [
        ReplicaAddress(replica_id=name, address=address, node_id="rig", is_encrypted=job["is_encrypted"])
        for name, address in job["replicas"]
    ]
    dispatcher.update_replicas(addresses)
    server = RouterServer(
        config,
        {model.manifest.name: model},
        dispatcher,
        router_id=identity.router_id,
        version="rig",
        so_reuseport=job["shares_port"],
        salt_key=keys.tenant_salt,
    )
    observer = _observer(model.manifest.name)
    server.observe(observer)
    dispatcher.measure(observer.metrics)
    port = server.bind("127.0.0.1", job["port"])
    own_port = server.bind("127.0.0.1", 0) if job["shares_port"] else port
    await server.start()
    while not all(view.state == "ready" for view in dispatcher.replicas()):  # noqa: ASYNC110  nobody tells when they are
        await asyncio.sleep(0.01)
    garbage.settle()
    await _serve(address=f"127.0.0.1:{port}", own_address=f"127.0.0.1:{own_port}")
    await server.stop()
    await dispatcher.stop()


def _observer(model: str) -> Any:
    """Return who is told of requests, as in a cluster's router: what it remembers, and metrics as Prometheus text."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider

    from cluster.telemetry_meter import Histograms, QuickMeterProvider, collecting
    from router.config import ObserverConfig
    from router.metrics import RouterMetrics
    from router.observer import RequestObserver

    histograms = Histograms()
    reader = collecting(PrometheusMetricReader, histograms)()
    meters = QuickMeterProvider(MeterProvider([reader], shutdown_on_exit=False), histograms)
    return RequestObserver(ObserverConfig(), RouterMetrics(meters.get_meter("rig"), [model], max_tenants=50))


async def _serve(**addresses: str) -> None:
    """Say where, and return when standard input ends."""
    print(json.dumps(addresses), flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await lines.read()


if __name__ == "__main__":
    main()
