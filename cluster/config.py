"""What a cluster is told: one TOML file, OCTAVO_* variables over it, command-line options over both.

    [engine]                 OCTAVO_ENGINE__DTYPE=fp32        octavo serve --model ...
    dtype = "fp32"

A variable is named after its key, in capitals, with two underscores where the file has a section. Every section is a
frozen dataclass; an unknown key, a value of the wrong type or one that breaks a rule raises ConfigError with key, rule
and value. Derived values are returned by functions and never written back. Reads no file but the one it is given.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from router.config import RouterConfig
from workers.config import EngineConfig
from workers.errors import ConfigError

ENV_PREFIX = "OCTAVO_"
ENV_CREDENTIALS = frozenset(
    {
        "OCTAVO_TOKEN",
        "OCTAVO_CA_FILE",
        "OCTAVO_CERT_FILE",
        "OCTAVO_KEY_FILE",
        "OCTAVO_VICTIM_TOKEN",
        "OCTAVO_ATTACKER_TOKEN",
    }
)
"""Clients' (cluster/cli_dial.py, cluster/cli_isolation.py)."""
ENV_RESERVED = ENV_CREDENTIALS | {"OCTAVO_CONFIG", "OCTAVO_CACHE_DIR", "OCTAVO_SECRET_FILE", "OCTAVO_ADDRESS"}
"""Variables that are no configuration keys: those, the file, the node's cache, the node's secret, a client's router."""
_KUBERNETES_LINK = re.compile(r"OCTAVO_(SERVICE_|PORT$|PORT_)|OCTAVO_\w+_SERVICE_(HOST|PORT)|OCTAVO_\w+_PORT(_|$)")
"""Kubernetes puts these into every pod beside a service called octavo."""

Tree = Mapping[str, Any]
Section = TypeVar("Section")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    host: str = "127.0.0.1"
    """Where the router listens."""
    port: int = 50051
    """0: a free one."""
    num_routers: int = 1
    """Router processes, which share the replicas. Those of one node share the port: the system gives each new
    connection to one of them."""
    insecure: bool = False
    """Listen beyond loopback although there is no TLS (router.tls_cert_file), or no client has to prove who it is
    (router.keys_file, router.tls_client_ca_file)."""
    app: str = "octavo"
    """The name of the Ray Serve application."""
    start_timeout_s: float = 600.0
    """How long the cluster may take until all replicas are ready."""

    def check(self) -> None:
        _rule(_is_host(self.host), "serve.host", "must be an IP address or a host name", self.host)
        _rule(0 <= self.port <= 65535, "serve.port", "must be in [0, 65535]", self.port)
        _rule(self.num_routers >= 1, "serve.num_routers", "must be >= 1", self.num_routers)
        _rule(re.fullmatch(r"[\w.-]+", self.app) is not None, "serve.app", "must be a name of [A-Za-z0-9_.-]", self.app)
        _rule(self.start_timeout_s > 0, "serve.start_timeout_s", "must be > 0", self.start_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasConfig:
    num_replicas: int = 1
    max_replicas: int = 0
    """What a node must have room for; 0: num_replicas."""
    health_check_period_s: float = 2.0
    health_check_timeout_s: float = 30.0

    def check(self) -> None:
        _rule(self.num_replicas >= 1, "replicas.num_replicas", "must be >= 1", self.num_replicas)
        _rule(
            self.max_replicas == 0 or self.max_replicas >= self.num_replicas,
            "replicas.max_replicas",
            f"must be 0 or >= replicas.num_replicas ({self.num_replicas})",
            self.max_replicas,
        )
        for name in ("health_check_period_s", "health_check_timeout_s"):
            _rule(getattr(self, name) > 0, f"replicas.{name}", "must be > 0", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesConfig:
    """What one replica reserves in Ray. Routers and the actor with the secret reserve nothing."""

    num_cpus: float = 0.0
    """0: cores of a node / (max_replicas + 1), so that the replacement of a draining replica fits."""
    memory_bytes: int = 0
    """0: none."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of Ray, name to amount."""

    def check(self) -> None:
        _rule(self.num_cpus >= 0, "resources.num_cpus", "must be >= 0", self.num_cpus)
        _rule(self.memory_bytes >= 0, "resources.memory_bytes", "must be >= 0", self.memory_bytes)
        for name, amount in self.custom.items():
            _rule(amount > 0, f"resources.custom.{name}", "must be > 0", amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    address: str = ""
    """Empty: start a Ray of our own on loopback. "auto" or HOST:PORT: attach to one, and leave it running."""
    temp_dir: str = ""
    """Of a Ray of our own; short, for Ray keeps sockets there. Empty: a new directory, removed after a clean end."""
    object_store_bytes: int = 80 * 1024 * 1024
    """Of a Ray of our own. Tokens do not go through it."""

    def check(self) -> None:
        _rule(
            self.address in ("", "auto") or re.fullmatch(r".+:\d+", self.address) is not None,
            "ray.address",
            "must be empty, auto or HOST:PORT",
            self.address,
        )
        _rule(len(self.temp_dir) <= 40, "ray.temp_dir", "must have at most 40 characters", self.temp_dir)
        _rule(
            self.object_store_bytes >= 78_643_200,
            "ray.object_store_bytes",
            "must be >= 78643200",
            self.object_store_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    level: str = "info"
    format: str = "plain"
    """plain, or json: one object a line."""

    def check(self) -> None:
        levels = ("debug", "info", "warning", "error")
        _rule(self.level in levels, "log.level", f"must be one of {', '.join(levels)}", self.level)
        _rule(self.format in ("plain", "json"), "log.format", "must be one of plain, json", self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    model: str = "default"
    """ORG/NAME[@rev], a directory, a .gguf file, or default."""
    serve: ServeConfig = ServeConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    resources: ResourcesConfig = ResourcesConfig()
    router: RouterConfig = field(default_factory=RouterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = RayConfig()
    log: LogConfig = LogConfig()

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        _rule(self.model != "", "model", "must not be empty", self.model)
        for section in (self.serve, self.replicas, self.resources, self.router, self.engine, self.ray, self.log):
            section.check()
        _rule(
            self.serve.insecure or is_loopback(self.serve.host) or self.router.is_private,
            "serve.host",
            "must be a loopback address without TLS and auth, unless serve.insecure (--insecure) is set",
            self.serve.host,
        )

    def num_cpus(self, cores: float) -> float:
        """Return what one replica reserves on a node of `cores`."""
        return self.resources.num_cpus or cores / (max(self.replicas.max_replicas, self.replicas.num_replicas) + 1)

    def threads(self, cores: float) -> int:
        """Return how many threads one replica computes with."""
        return self.engine.threads or max(1, int(cores) // self.replicas.num_replicas)

    def replicas_per_node(self) -> int:
        """Return how many replicas share a node's memory."""
        return self.engine.replicas_per_node or max(self.replicas.max_replicas, self.replicas.num_replicas)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_toml(self) -> str:
        """Return the whole configuration as the file that would give it."""
        tree = dataclasses.asdict(self)
        lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict)]
        for name, section in tree.items():
            if isinstance(section, dict):
                lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
        return "\n".join(lines) + "\n"


def load(path: Path | None, environ: Mapping[str, str], options: Tree) -> ClusterConfig:
    """Return the checked configuration of a file, variables and options, each over the one before.

    Raises ConfigError.
    """
    tree = _read(path) if path is not None else {}
    return from_tree(_merge(_merge(tree, _from_environ(environ)), options))


def from_tree(tree: Tree) -> ClusterConfig:
    """Return the checked configuration of a nested mapping. Raises ConfigError."""
    config = _build(ClusterConfig, tree, "")
    config.check()
    return config


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


def _rule(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{key} {rule}, is {value!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from error


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in ENV_RESERVED or _KUBERNETES_LINK.match(name):
            continue
        *sections, key = name.removeprefix(ENV_PREFIX).lower().split("__")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = _Text(environ[name], name)
    return tree


class _Text(str):
    """A value that came as text and has yet to become what its key wants."""

    __slots__ = ("variable",)
    variable: str

    def __new__(cls, text: str, variable: str) -> _Text:
        value = super().__new__(cls, text)
        value.variable = variable
        return value


def _merge(under: Tree, over: Tree) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _build(kind: type[Section], tree: Tree, path: str) -> Section:
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if key not in hints:
            where = f" (from {value.variable})" if isinstance(value, _Text) else ""
            raise ConfigError(f"{name} must be one of {', '.join(f'{path}{hint}' for hint in hints)}, is no key{where}")
        values[key] = _value(hints[key], value, name)
    return kind(**values)


def _value(kind: Any, value: object, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        _rule(isinstance(value, Mapping), name, "must be a section", value)
        return _build(kind, value, f"{name}.")  # type: ignore[arg-type]  # checked above
    if kind not in (bool, int, float, str):  # the one mapping: resources.custom
        _rule(isinstance(value, Mapping), name, "must be a table of numbers", value)
        return {key: _value(float, amount, f"{name}.{key}") for key, amount in value.items()}  # type: ignore[attr-defined]
    if isinstance(value, _Text):
        value = _parse(kind, value, name)
    if kind is float and type(value) is int:
        value = float(value)
    _rule(type(value) is kind, name, f"must be {_KINDS[kind]}", value)
    if isinstance(value, float):
        _rule(math.isfinite(value), name, "must be finite", value)
    return value


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _parse(kind: type, text: _Text, name: str) -> object:
    if kind is bool:
        _rule(text in ("true", "false", "1", "0"), name, f"({text.variable}) must be true or false", str(text))
        return text in ("true", "1")
    try:
        return kind(text) if kind is not str else str(text)
    except ValueError:
        raise ConfigError(f"{name} ({text.variable}) must be {_KINDS[kind]}, is {str(text)!r}") from None


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
