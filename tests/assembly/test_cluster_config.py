"""The configuration: file, variables, options; what is refused, and in which words."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, from_tree, load
from workers.config import EngineConfig
from workers.errors import ConfigError


def test_each_source_goes_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('model = "file"\n[engine]\ndtype = "bf16"\nblock_size = 8\n[router]\nkeepalive_s = 3\n')
    variables = {"OCTAVO_ENGINE__DTYPE": "fp32", "OCTAVO_ENGINE__NUM_BLOCKS": "7", "OCTAVO_SERVE__INSECURE": "true"}
    config = load(file, variables, {"engine": {"num_blocks": 9}})
    assert config.model == "file"
    assert config.engine == EngineConfig(dtype="fp32", block_size=8, num_blocks=9)
    assert config.router.keepalive_s == 3.0
    assert config.serve.insecure


def test_a_replica_of_vllm_has_all_the_gpus_that_it_is_spread_over() -> None:
    spread = {"engine": {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}}
    assert from_tree({**spread, "resources": {"num_gpus": 2}}).engine.devices_of_vllm == 2
    assert from_tree(spread).resources.num_gpus == 0, "on CPUs"
    others = {"engine": {"vllm": {"tensor_parallel_size": 2}}, "resources": {"num_gpus": 1}}
    assert from_tree(others).engine.devices_of_vllm == 1, "no matter to other engines"


def test_what_is_printed_gives_the_same_configuration() -> None:
    config = from_tree({"model": 'a "quoted" name', "resources": {"custom": {"accelerator:x y": 0.5}}})
    assert from_tree(tomllib.loads(config.to_toml())) == config
    assert from_tree(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"speed": 1}, ["speed", "is no key"]),
        ({"engine": {"speed": 1}}, ["engine.speed", "engine.dtype", "is no key"]),
        ({"engine": 3}, ["engine must be a section", "3"]),
        ({"engine": {"block_size": "16"}}, ["engine.block_size must be an integer", "'16'"]),
        ({"engine": {"block_size": True}}, ["engine.block_size must be an integer", "True"]),
        ({"engine": {"block_size": 1.5}}, ["engine.block_size must be an integer", "1.5"]),
        ({"router": {"keepalive_s": float("nan")}}, ["router.keepalive_s must be finite", "nan"]),
        ({"router": {"keepalive_s": 0}}, ["router.keepalive_s must be > 0", "0.0"]),
        ({"serve": {"port": 70_000}}, ["serve.port must be in [0, 65535]", "70000"]),
        ({"serve": {"host": "0.0.0.0"}}, ["serve.host", "--insecure", "0.0.0.0"]),
        ({"serve": {"host": "::"}}, ["serve.host", "--insecure"]),
        ({"replicas": {"num_replicas": 3, "max_replicas": 2}}, ["replicas.max_replicas", "(3)", "2"]),
        ({"ray": {"address": "somewhere"}}, ["ray.address must be empty, auto or HOST:PORT", "somewhere"]),
        ({"resources": {"custom": {"gpu": -1}}}, ["resources.custom.gpu must be > 0"]),
        ({"log": {"format": "xml"}}, ["log.format must be one of plain, json", "xml"]),
        ({"engine": {"vllm": {"tensor_parallel_size": 0}}}, ["engine.vllm.tensor_parallel_size must be", ">= 1", "0"]),
        (
            {"engine": {"engine": "vllm", "vllm": {"tensor_parallel_size": 4}}, "resources": {"num_gpus": 2}},
            ["resources.num_gpus must be 0 or >= 4, over which engine.vllm spreads a replica", "2.0"],
        ),
    ],
)
def test_a_refusal_names_key_rule_and_value(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_tree(tree)
    assert [word for word in words if word not in str(refused.value)] == []
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OCTAVO_ENGINE__BLOCK_SIZE", "many", ["engine.block_size", "OCTAVO_ENGINE__BLOCK_SIZE", "an integer", "many"]),
        ("OCTAVO_ENGINE__PREFIX_CACHE", "maybe", ["engine.prefix_cache", "true or false", "maybe"]),
        ("OCTAVO_ENGNE__DTYPE", "fp32", ["engne", "is no key"]),
        ("OCTAVO_TYPO", "1", ["typo", "is no key", "OCTAVO_TYPO"]),
    ],
)
def test_a_refused_variable_is_named(name: str, value: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, {name: value}, {})
    assert [word for word in words if word not in str(refused.value)] == []


def test_variables_that_are_no_keys_are_left_alone() -> None:
    """A pod beside a Kubernetes service called octavo finds these in its environment."""
    others = {
        "OCTAVO_SERVICE_HOST": "10.0.0.1",
        "OCTAVO_PORT": "tcp://10.0.0.1:50051",
        "OCTAVO_PORT_50051_TCP_ADDR": "10.0.0.1",
        "OCTAVO_HEADLESS_SERVICE_PORT": "50051",
        "OCTAVO_CACHE_DIR": "/somewhere",
        "OCTAVO_SECRET_FILE": "/somewhere/else",
    }
    assert load(None, others, {}) == ClusterConfig()


def test_a_key_that_ends_with_port_is_none_of_those() -> None:
    """Variables of keys that end so were taken for Kubernetes' own, and ignored."""
    variables = {
        "OCTAVO_SERVE__PORT": "7",
        "OCTAVO_ROUTER__HEALTH_PORT": "8",
        "OCTAVO_TELEMETRY__METRICS_PORT": "9",
        "OCTAVO_ROUTER_SERVICE_PORT_GRPC": "10",
        "OCTAVO_ROUTER_PORT": "tcp://10.0.0.1:11",
    }
    config = load(None, variables, {})
    assert (config.serve.port, config.router.health_port, config.telemetry.metrics_port) == (7, 8, 9)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(tmp_path / "missing.toml", {}, {})
    (tmp_path / "bad.toml").write_text("model = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load(tmp_path / "bad.toml", {}, {})


def test_a_replacement_of_a_draining_replica_fits_beside_all_others() -> None:
    config = from_tree({"replicas": {"num_replicas": 2, "max_replicas": 3}})
    (model,) = config.deployments().values()
    assert config.num_cpus(model, 8) == 2.0
    assert config.threads(model, 8) == 4
    assert config.threads(model, 1) == 1
    assert config.replicas_per_node(model) == 3
    own = from_tree({"resources": {"num_cpus": 1.5}, "engine": {"threads": 3, "replicas_per_node": 4}})
    (model,) = own.deployments().values()
    assert own.num_cpus(model, 8) == 1.5
    assert own.threads(model, 8) == 3
    assert own.replicas_per_node(model) == 4
