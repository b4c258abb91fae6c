"""What a cluster is told: one TOML file, OCTAVO_* variables over it, command-line options over both.

    [engine]                 OCTAVO_ENGINE__DTYPE=fp32        octavo serve --model ...
    dtype = "fp32"

A variable is named after its key, in capitals, with two underscores where the file has a section. Every section is a
frozen dataclass; an unknown key, a value of the wrong type or one that breaks a rule raises ConfigError with key, rule
and value. Derived values are returned by functions and never written back. Reads no file but the one it is given.

Several models have a table each, which goes over what the same source says for all of them:

    [models.small]           requests call it "small"
    model = "default"
    [models.small.engine]    over [engine], key by key
    threads = 2
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.autoscaling import ScalingConfig
from cluster.config_sections import (
    LogConfig,
    RayConfig,
    ReplicasConfig,
    ResourcesConfig,
    ServeConfig,
    TelemetryConfig,
    is_loopback,
    rule,
)
from cluster.config_tree import Tree, build, from_environ, merge, read, to_toml
from cluster.model_name import request_name
from router.config import RouterConfig
from workers.config import EngineConfig
from workers.errors import ConfigError

TABLES = "models"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model: its files, and the replicas that compute it. A table [models.NAME], or the keys of the same names
    outside of any."""

    model: str = "default"
    """ORG/NAME[@rev], a directory, a .gguf file, or default."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    @property
    def initial_replicas(self) -> int:
        """How many there are at the start."""
        return max(self.replicas.num_replicas, self.scaling.min_replicas if self.scaling.is_elastic else 0)

    @property
    def max_on_node(self) -> int:
        """How many a node must have room for."""
        return self.replicas.max_replicas or max(self.replicas.num_replicas, self.scaling.max_replicas)

    @property
    def usual_on_node(self) -> int:
        """Among how many a node's cores are divided."""
        return self.max_on_node if self.scaling.is_elastic else self.replicas.num_replicas

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        rule(self.model != "", "model", "must not be empty", self.model)
        for section in (self.replicas, self.resources, self.engine, self.scaling):
            section.check()
        rule(
            self.replicas.num_replicas >= 1 or self.scaling.is_elastic,
            "replicas.num_replicas",
            "must be >= 1 unless scaling.max_replicas is set",
            self.replicas.num_replicas,
        )
        devices = self.engine.devices_of_vllm
        rule(
            self.resources.num_gpus == 0 or self.resources.num_gpus >= devices,
            "resources.num_gpus",
            f"must be 0 or >= {devices}, over which engine.vllm spreads a replica",
            self.resources.num_gpus,
        )
        rule(
            not self.scaling.is_elastic or self.scaling.max_replicas >= self.replicas.num_replicas,
            "scaling.max_replicas",
            f"must be 0 or >= replicas.num_replicas ({self.replicas.num_replicas})",
            self.scaling.max_replicas,
        )


SHARED = tuple(each.name for each in dataclasses.fields(ModelConfig))
"""Keys that stand outside of any table as well: for the only model, or for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    model: str = "default"
    """As in `ModelConfig`; like the other keys of its names, what holds for models whose tables say nothing else."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    """By the names that requests call them. Empty: one model, which is called what its files are."""

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        for section in (self.serve, self.replicas, self.resources, self.engine, self.scaling):
            section.check()
        for other in (self.router, self.ray, self.log, self.telemetry):
            other.check()
        if not self.models:
            self._only().check()
        for name, model in self.models.items():
            _check_table(name, model)
        rule(
            self.serve.insecure or is_loopback(self.serve.host) or self.router.is_private,
            "serve.host",
            "must be a loopback address without TLS and auth, unless serve.insecure (--insecure) is set",
            self.serve.host,
        )

    def deployments(self) -> dict[str, ModelConfig]:
        """Return the models, by the names that requests call them."""
        return dict(self.models) or {request_name(self.model): self._only()}

    def num_cpus(self, model: ModelConfig, cores: float) -> float:
        """Return what one replica of `model` reserves on a node of `cores`."""
        return model.resources.num_cpus or cores / (sum(each.max_on_node for each in self._all()) + 1)

    def threads(self, model: ModelConfig, cores: float) -> int:
        """Return how many threads one replica of `model` computes with."""
        return model.engine.threads or max(1, int(cores) // max(1, sum(each.usual_on_node for each in self._all())))

    def replicas_per_node(self, model: ModelConfig) -> int:
        """Return how many replicas, of all models, share a node's memory with one of `model`."""
        return model.engine.replicas_per_node or sum(each.max_on_node for each in self._all())

    def engine_config(self, model: ModelConfig, cores: float) -> EngineConfig:
        """Return what an engine of `model` is set up with on a node of `cores`: nothing in it is left to derive."""
        return dataclasses.replace(
            model.engine, threads=self.threads(model, cores), replicas_per_node=self.replicas_per_node(model)
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_toml(self) -> str:
        """Return the whole configuration as the file that would give it."""
        return to_toml(self)

    def _only(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in SHARED})

    def _all(self) -> Iterable[ModelConfig]:
        return self.deployments().values()


def load(path: Path | None, environ: Mapping[str, str], options: Tree) -> ClusterConfig:
    """Return the checked configuration of a file, variables and options, each over the one before, tables included.

    Raises ConfigError.
    """
    tree: Tree = read(path) if path is not None else {}
    for source in (from_environ(environ), options):
        tree = _over(tree, source)
    return from_tree(tree)


def from_tree(tree: Tree) -> ClusterConfig:
    """Return the checked configuration of a nested mapping. Raises ConfigError."""
    outside = {key: value for key, value in tree.items() if key != TABLES}
    config = build(ClusterConfig, outside)
    tables = tree.get(TABLES, {})
    rule(isinstance(tables, Mapping), TABLES, "must be tables, each [models.NAME]", tables)
    shared = {key: value for key, value in outside.items() if key in SHARED}
    models = {name: _model(name, table, shared) for name, table in tables.items()}
    config = dataclasses.replace(config, models=models)
    config.check()
    return config


def _over(tree: Tree, source: Tree) -> Tree:
    """Return `tree` with `source` over it: what it says for all models goes over the tables that there are, too,
    but for the model itself."""
    tables = tree.get(TABLES)
    shared = {key: value for key, value in source.items() if key in SHARED and key != "model"}
    if isinstance(tables, Mapping):
        over = {name: merge(table, shared) if isinstance(table, Mapping) else table for name, table in tables.items()}
        tree = {**tree, TABLES: over}
    return merge(tree, source)


def _model(name: str, table: object, shared: Tree) -> ModelConfig:
    key = f"{TABLES}.{name}"
    rule(isinstance(table, Mapping), key, "must be a section", table)
    assert isinstance(table, Mapping)
    return build(ModelConfig, merge(shared, table), f"{key}.")


def _check_table(name: str, model: ModelConfig) -> None:
    rule(_MODEL_NAME.fullmatch(name) is not None, TABLES, "must be named with 1 to 64 of [A-Za-z0-9._-]", name)
    try:
        model.check()
    except ConfigError as error:
        raise ConfigError(f"{TABLES}.{name}.{error}") from None
