"""Runs a cluster from a configuration until it is told to stop, and leaves nothing behind.

    reserve the port -> look at keys, certificates and model -> connect to Ray -> deploy -> wait until ready -> announce
    -> wait for a signal -> drain routers -> delete the application -> disconnect -> nothing of ours is left

Each step is bounded in time. Ray is connected before any gRPC channel of ours exists: after one its start may hang. A
Ray that was found is left as it was but for our application; a Ray that was started here ends with us.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cluster.boot import ClusterBoot, forwarded
from cluster.config import ClusterConfig
from cluster.config_sections import is_loopback
from router.config import RouterConfig
from router.key_file import read
from router.tls import CertificateSource
from workers.errors import ModelFileError, PortInUseError, StartupError
from workers.types import Boot

if TYPE_CHECKING:
    from cluster.deployment import RouterView


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What is announced once every replica can be reached through the router."""

    event: str = "ready"
    address: str
    """Of all routers."""
    routers: list[str]
    """The address of each alone."""
    metrics: str
    """Where the first of them tells the metrics of all processes as Prometheus text; empty if nowhere."""
    pid: int
    ray_address: str
    models: list[str]
    failures: dict[str, str]
    """Why other models cannot be served, by their names."""
    replicas: list[dict[str, str | int]]
    """Of each its "id" and "pid"."""
    version: str


class Stopped(KeyboardInterrupt):
    """A signal came before the cluster was ready."""


class StopSignal:
    """SIGINT and SIGTERM: the first asks to drain, the second to hurry. For the main thread.

    Until `is_serving` is set, the first one raises `Stopped` wherever the main thread is.
    """

    def __init__(self) -> None:
        self.is_serving = False
        self._stop = threading.Event()
        self._hurry = threading.Event()

    def install(self) -> None:
        """Take the signals over; again after anything that takes them itself, as connecting to Ray does."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def wait(self) -> None:
        self._stop.wait()

    def ignore(self) -> None:
        """The work is done: one more signal must not change how the process ends."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @property
    def is_hurried(self) -> bool:
        return self._hurry.is_set()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop.is_set():
            self._hurry.set()
            return
        self._stop.set()
        if not self.is_serving:
            raise Stopped


def run(
    config: ClusterConfig, stop: StopSignal, *, announce: Callable[[Ready], None], note: Callable[[str], None]
) -> None:
    """Run the cluster of `config` until `stop`. `note` gets lines for people, some of them before it is ready.

    Raises StartupError when it does not start; whatever had started is gone then.
    """
    stop.install()
    with suppress(Stopped), ExitStack() as cluster:
        port = cluster.enter_context(reserved_port(config))
        cluster.enter_context(reserved_metrics_port(config))
        if not config.ray.address:
            check_trust(config.router)
            fetch_models(config, ClusterBoot.of(config), note)
        # Imports of Ray come late: a wrong option must not wait for them, and a Ray of our own is told first, by its
        # environment, that it is to stay on loopback.
        from cluster.ray_connection import connected

        note("starting Ray" if not config.ray.address else f"attaching to the Ray at {config.ray.address}")
        connection = cluster.enter_context(connected(config.ray, note, forwarded(os.environ)))
        stop.install()
        from cluster.deployment import Deployment, start_serve
        from cluster.serve_view import look

        config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, port=port))
        deployment = Deployment(config, connection.variables)
        cluster.callback(lambda: deployment.remove(is_hurried=lambda: stop.is_hurried))
        for name, model in config.deployments().items():
            note(f"deploying {model.initial_replicas} replicas of {name}")
        start_serve()
        if look(config.serve.app) is not None:
            raise StartupError(
                f"that Ray runs an application {config.serve.app} already: change it with `octavo apply`, or name"
                " another with --app"
            )
        deployment.deploy()
        routers = deployment.await_ready()
        for replica in routers[0].replicas:
            if replica["memory"]:
                note(f"replica {replica['id']}: {replica['memory']}")
        stop.is_serving = True
        announce(_ready(routers, deployment.failures(), connection.address))
        stop.wait()
        note("draining; once more to hurry")
    stop.ignore()


def _ready(routers: Sequence[RouterView], failures: Mapping[str, str], ray_address: str) -> Ready:
    router = routers[0]
    failures = {**failures, **router.failures}
    return Ready(
        address=router.address,
        routers=[each.own_address for each in routers],
        metrics=router.metrics,
        pid=os.getpid(),
        ray_address=ray_address,
        models=[name for name in router.models if name not in failures],
        failures=failures,
        replicas=[{"id": replica["id"], "pid": replica["pid"]} for replica in router.replicas],
        version=version(),
    )


def fetch_models(config: ClusterConfig, boot: Boot, note: Callable[[str], None]) -> None:
    """Have all models in this node's cache. Some may fail, of which `note` is told; raises ModelFileError if all do."""
    num_left = len(config.deployments())
    for name, model in config.deployments().items():
        try:
            boot.model_files(model.model)
        except ModelFileError as error:
            num_left -= 1
            if not num_left:
                raise
            note(f"model {name} cannot be served: {error}")


def check_trust(config: RouterConfig) -> None:
    """Raises ConfigError if routers on this node could not read their keys or certificates."""
    if config.keys_file:
        read(Path(config.keys_file))
    if config.tls_cert_file:
        CertificateSource(config)


def version() -> str:
    return importlib.metadata.version("octavo")


@contextmanager
def reserved_port(config: ClusterConfig) -> Iterator[int]:
    """Yield the port that the router is to listen on, and keep others off it meanwhile. Raises PortInUseError.

    Routers set SO_REUSEPORT, with which a port in use would go unnoticed, so it is tried without. Afterwards a socket
    that is bound but does not listen holds it: connections go to listeners only, and nobody else is given the port.
    A cluster that is attached to may be on other machines; then the number is taken as it is.
    """
    if config.ray.address and not is_loopback(config.serve.host):
        yield config.serve.port
        return
    with _reserved("serve.port", config.serve.host, config.serve.port, "--port") as port:
        yield port


@contextmanager
def reserved_metrics_port(config: ClusterConfig) -> Iterator[None]:
    """Keep others off the port of all processes' metrics, unless each router is to have a free one. Raises
    PortInUseError."""
    telemetry = config.telemetry
    is_elsewhere = config.ray.address and not is_loopback(telemetry.metrics_host)
    if is_elsewhere or not telemetry.metrics or not telemetry.metrics_port:
        yield
        return
    name = "telemetry.metrics_port"
    with _reserved(name, telemetry.metrics_host, telemetry.metrics_port, "OCTAVO_TELEMETRY__METRICS_PORT"):
        yield


@contextmanager
def _reserved(name: str, host: str, number: int, option: str) -> Iterator[int]:
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, name, (host, number), option)
        port: int = probe.getsockname()[1]
    with socket.socket(family) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(holder, name, (host, port), option)
        yield port


def _bind(sock: socket.socket, name: str, address: tuple[str, int], option: str) -> None:
    try:
        sock.bind(address)
    except OSError as error:
        host, port = address
        raise PortInUseError(
            f"{name} {port} on {host} cannot be bound: {error.strerror}; choose another with {option}, or 0 for any"
        ) from error
