"""The sections of the configuration that are the cluster's own: frozen values that know their rules."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    host: str = "127.0.0.1"
    """Where the router listens."""
    port: int = 50051
    """0: a free one."""
    num_routers: int = 0
    """Router processes, which share the replicas; 0: as many as there are nodes. Those of one node share the port: the
    system gives each new connection to one of them."""
    insecure: bool = False
    """Listen beyond loopback although there is no TLS (router.tls_cert_file), or no client has to prove who it is
    (router.keys_file, router.tls_client_ca_file)."""
    app: str = "octavo"
    """The name of the Ray Serve application."""
    start_timeout_s: float = 600.0
    """How long the cluster may take until all replicas are ready."""

    def check(self) -> None:
        rule(_is_host(self.host), "serve.host", "must be an IP address or a host name", self.host)
        rule(0 <= self.port <= 65535, "serve.port", "must be in [0, 65535]", self.port)
        rule(self.num_routers >= 0, "serve.num_routers", "must be >= 0", self.num_routers)
        rule(re.fullmatch(r"[\w.-]+", self.app) is not None, "serve.app", "must be a name of [A-Za-z0-9_.-]", self.app)
        rule(self.start_timeout_s > 0, "serve.start_timeout_s", "must be > 0", self.start_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasConfig:
    num_replicas: int = 1
    """At the start, and always unless scaling.max_replicas is set."""
    max_replicas: int = 0
    """What a node must have room for; 0: num_replicas or scaling.max_replicas, whichever is more."""
    health_check_period_s: float = 2.0
    """How often Serve asks each router and replica whether it is well."""
    health_check_timeout_s: float = 30.0
    """After so long without an answer Serve replaces it."""

    def check(self) -> None:
        rule(self.num_replicas >= 0, "replicas.num_replicas", "must be >= 0", self.num_replicas)
        rule(
            self.max_replicas == 0 or self.max_replicas >= self.num_replicas,
            "replicas.max_replicas",
            f"must be 0 or >= replicas.num_replicas ({self.num_replicas})",
            self.max_replicas,
        )
        for name in ("health_check_period_s", "health_check_timeout_s"):
            rule(getattr(self, name) > 0, f"replicas.{name}", "must be > 0", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesConfig:
    """What one replica reserves in Ray. Routers and the cluster's actors reserve nothing."""

    num_cpus: float = 0.0
    """0: cores of a node / (replicas that it must have room for, of all models, + 1), so that the replacement of a
    draining replica fits."""
    num_gpus: float = 0.0
    """Those of one replica are GPUs of one node, for Ray places a process on a node that has all it asks for."""
    memory_bytes: int = 0
    """0: none."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of Ray, name to amount."""

    def check(self) -> None:
        rule(self.num_cpus >= 0, "resources.num_cpus", "must be >= 0", self.num_cpus)
        rule(self.num_gpus >= 0, "resources.num_gpus", "must be >= 0", self.num_gpus)
        rule(self.memory_bytes >= 0, "resources.memory_bytes", "must be >= 0", self.memory_bytes)
        for name, amount in self.custom.items():
            rule(amount > 0, f"resources.custom.{name}", "must be > 0", amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    address: str = ""
    """Empty: start a Ray of our own on loopback. "auto" or HOST:PORT: attach to one, and leave it running."""
    temp_dir: str = ""
    """Of a Ray of our own; short, for Ray keeps sockets there. Empty: a new directory, removed after a clean end."""
    object_store_bytes: int = 80 * 1024 * 1024
    """Of a Ray of our own. Tokens do not go through it."""

    def check(self) -> None:
        rule(
            self.address in ("", "auto") or re.fullmatch(r".+:\d+", self.address) is not None,
            "ray.address",
            "must be empty, auto or HOST:PORT",
            self.address,
        )
        rule(len(self.temp_dir) <= 40, "ray.temp_dir", "must have at most 40 characters", self.temp_dir)
        rule(
            self.object_store_bytes >= 78_643_200,
            "ray.object_store_bytes",
            "must be >= 78643200",
            self.object_store_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    level: str = "info"
    """Of what is written at all."""
    format: str = "plain"
    """plain, or json: one object a line."""
    requests: bool = False
    """Write a line for each request that has ended: ids, tenant, model, times, tokens, reason."""
    prompts: bool = False
    """Put the text of prompts and answers into those lines. Nothing else ever logs them."""

    def check(self) -> None:
        levels = ("debug", "info", "warning", "error")
        rule(self.level in levels, "log.level", f"must be one of {', '.join(levels)}", self.level)
        rule(self.format in ("plain", "json"), "log.format", "must be one of plain, json", self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """Where spans and metrics go by OTLP is said by the OTEL_* variables of the OpenTelemetry specification."""

    metrics: bool = True
    """Whether each router and replica serves its metrics as Prometheus text over HTTP, without TLS or credentials."""
    metrics_host: str = "127.0.0.1"
    """Where they listen for it, each at a port of its own."""
    metrics_port: int = 0
    """Where routers serve the metrics of all processes together; those of one node share it. 0: a free one each."""
    vllm_aliases: bool = True
    """Serve metrics that vLLM has as well under its names, too."""
    max_tenants: int = 50
    """So many tenants have series of their own; the others count as "other"."""
    max_kept_requests: int = 2048
    """So many ended requests each router remembers for `octavo trace`; 0: none."""

    def check(self) -> None:
        rule(
            _is_host(self.metrics_host),
            "telemetry.metrics_host",
            "must be an IP address or a host name",
            self.metrics_host,
        )
        rule(0 <= self.metrics_port <= 65535, "telemetry.metrics_port", "must be in [0, 65535]", self.metrics_port)
        rule(self.max_tenants >= 0, "telemetry.max_tenants", "must be >= 0", self.max_tenants)
        rule(self.max_kept_requests >= 0, "telemetry.max_kept_requests", "must be >= 0", self.max_kept_requests)


def rule(holds: bool, key: str, text: str, value: object) -> None:
    """Raises ConfigError with key, rule and value unless it `holds`."""
    if not holds:
        raise ConfigError(f"{key} {text}, is {value!r}")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host) is not None
    return True
