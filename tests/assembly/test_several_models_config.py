"""Tables of models in the configuration: what goes over what, how they share a node, and how one is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import cli
from cluster.config import from_tree, load
from cluster.lifecycle import fetch_models
from cluster.model_name import request_name
from workers.errors import ConfigError, ModelFileError
from workers.types import ModelFiles, Process

FILE = """
model = "all.gguf"
[engine]
dtype = "bf16"
chunk_tokens = 32
[models.small.engine]
chunk_tokens = 64
[models."large-1.5"]
model = "large.gguf"
[models."large-1.5".scaling]
max_replicas = 4
schedule = ["mon-fri 08:00-18:00 3"]
"""


def test_a_table_goes_over_the_sections_of_its_source_and_each_source_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(FILE)
    variables = {"OCTAVO_ENGINE__CHUNK_TOKENS": "128", "OCTAVO_MODELS__SMALL__ENGINE__THREADS": "7"}
    for environ, chunk_tokens in (({}, (64, 32)), (variables, (128, 128))):
        models = load(file, environ, {"replicas": {"num_replicas": 2}}).deployments()
        small, large = models["small"], models["large-1.5"]
        assert (small.model, large.model) == ("all.gguf", "large.gguf")
        assert (small.engine.chunk_tokens, large.engine.chunk_tokens) == chunk_tokens
        assert {model.engine.dtype for model in models.values()} == {"bf16"}
        assert {model.replicas.num_replicas for model in models.values()} == {2}
        assert small.engine.threads == (7 if environ else 0)
        assert (small.scaling.is_elastic, large.scaling.schedule) == (False, ("mon-fri 08:00-18:00 3",))


def test_what_is_printed_gives_the_same_models() -> None:
    config = from_tree(tomllib.loads(FILE))
    assert from_tree(tomllib.loads(config.to_toml())) == config
    assert from_tree(json.loads(config.to_json())) == config


def test_models_share_a_node() -> None:
    scaling = {"max_replicas": 4, "min_replicas": 2}
    config = from_tree({"models": {"a": {"replicas": {"num_replicas": 3}}, "b": {"scaling": scaling}}})
    a, b = config.deployments().values()
    assert (a.initial_replicas, b.initial_replicas) == (3, 2)
    assert config.num_cpus(a, 16) == config.num_cpus(b, 16) == 16 / (3 + 4 + 1)
    assert config.threads(a, 16) == config.threads(b, 16) == 16 // (3 + 4)
    assert config.replicas_per_node(a) == config.replicas_per_node(b) == 7
    assert config.engine_config(b, 16).threads == 2


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (3, ["models must be tables", "3"]),
        ({"a": 3}, ["models.a must be a section", "3"]),
        ({"a": {"speed": 1}}, ["models.a.speed", "models.a.engine", "is no key"]),
        ({"a": {"serve": {}}}, ["models.a.serve", "is no key"]),
        ({"a": {"engine": {"dtype": "fp64"}}}, ["models.a.engine.dtype must be one of", "fp64"]),
        ({"a": {"engine": {"block_size": "16"}}}, ["models.a.engine.block_size must be an integer", "'16'"]),
        ({"a": {"model": ""}}, ["models.a.model must not be empty"]),
        ({"a": {"replicas": {"num_replicas": 0}}}, ["models.a.replicas.num_replicas", "scaling.max_replicas"]),
        ({"a": {"scaling": {"schedule": ["always 3"]}}}, ["models.a.scaling.schedule", "always 3"]),
        (
            {"a": {"replicas": {"num_replicas": 3}, "scaling": {"max_replicas": 2}}},
            ["models.a.scaling.max_replicas", "(3)", "2"],
        ),
        ({"a:b": {}}, ["models must be named", "a:b"]),
    ],
)
def test_a_refusal_names_the_table(models: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_tree({"models": models})
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_model_that_scales_may_begin_with_none() -> None:
    config = from_tree({"replicas": {"num_replicas": 0}, "scaling": {"max_replicas": 2, "min_replicas": 0}})
    assert [model.initial_replicas for model in config.deployments().values()] == [0]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("default", "default"),
        ("fake", "fake"),
        ("/models/small.q4.gguf", "small.q4"),
        ("/models/some.directory/", "some.directory"),
        ("Org/Name-1.5@main", "Org/Name-1.5"),
    ],
)
def test_a_model_without_a_table_is_called_what_its_files_are(model: str, name: str) -> None:
    assert request_name(model) == name
    assert list(from_tree({"model": model}).deployments()) == [name]


def test_an_option_that_means_one_model_is_refused_where_there_are_tables(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(FILE)
    for command in ("serve", "plan"):
        done = CliRunner().invoke(cli.app, [command, "--config", f"{tmp_path}/cluster.toml", "--model", "other"])
        assert isinstance(done.exception, ConfigError)
        assert "small, large-1.5" in str(done.exception)


class Shelf:
    """A `Boot` that has the files of some models."""

    def __init__(self, *there: str) -> None:
        self.there = there

    def start_process(self, role: str) -> Process:
        raise AssertionError(role)

    def model_files(self, name: str) -> ModelFiles:
        if name not in self.there:
            raise ModelFileError(f"{name} is not there")
        return ModelFiles(weights=Path(), tokenizer_json=Path(), chat_template=None, manifest=Path())


def test_a_start_goes_on_as_long_as_one_model_can_be_had() -> None:
    config = from_tree({"models": {"a": {"model": "a.gguf"}, "b": {"model": "b.gguf"}}})
    notes: list[str] = []
    fetch_models(config, Shelf("b.gguf"), notes.append)
    assert notes == ["model a cannot be served: a.gguf is not there"]
    with pytest.raises(ModelFileError, match=r"b.gguf is not there"):
        fetch_models(config, Shelf(), notes.append)
    with pytest.raises(ModelFileError, match=r"only.gguf is not there"):
        fetch_models(from_tree({"model": "only.gguf"}), Shelf(), notes.append)
