"""Models from the hub, against a stand-in on loopback: public, private, gated, missing, unreachable, offline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from cluster.models import fetch_model
from tests.models.hub_stand_in import COMMIT, Hub, Repository, running
from tests.models.model_directories import directory_files
from workers.errors import ModelFileError
from workers.types import ModelManifest


@pytest.fixture
def hub(tmp_path: Path):
    files = directory_files(tmp_path / "origin")
    extra = {
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"the weights again",
        "onnx/model.safetensors": b"something else",
        "remote_code.py": b"raise SystemExit",
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    }
    pickled = {name: data for name, data in files.items() if name != "model.safetensors"}
    pickled |= {"pytorch_model.bin": b"a pickle", "training_args.bin": b"another one"}
    repositories = {
        "org/public": Repository({**files, **extra}, revisions=("main", "v1")),
        "org/private": Repository(files, token="secret"),
        "org/gated": Repository(files, token="secret", is_gated=True),
        "org/pickles": Repository(pickled),
        "org/empty": Repository({"config.json": files["config.json"]}),
    }
    with running(Hub(repositories)) as hub:
        yield hub


class Node:
    """A machine with caches of its own. huggingface_hub reads most settings once, so they are set where it keeps them;
    `test_the_environment_counts` shows that they come from the environment."""

    def __init__(self, hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._hub = hub
        self._home = home
        self._monkeypatch = monkeypatch

    def fetch(
        self, name: str, *, token: str | None = None, is_offline: bool = False, endpoint: str = ""
    ) -> ModelManifest:
        with self._monkeypatch.context() as patch:
            patch.delenv("HF_TOKEN", raising=False)
            patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
            patch.setattr(constants, "HF_TOKEN_PATH", str(self._home / "token"))
            patch.setattr(constants, "HF_HUB_CACHE", str(self._home / "hub"))
            patch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
            endpoint = endpoint or self._hub.endpoint
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            files = fetch_model(name, cache_dir=self._home / "octavo")
        return ModelManifest.from_json(files.manifest.read_text())

    def refusal(self, name: str, **settings: Any) -> str:
        with pytest.raises(ModelFileError) as caught:
            self.fetch(name, **settings)
        return str(caught.value)


@pytest.fixture
def node(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    yield Node(hub, tmp_path, monkeypatch)
    close_session()


def test_a_public_model_is_fetched_once_and_only_what_is_needed(hub: Hub, node: Node):
    manifest = node.fetch("org/public@v1")
    assert (manifest.name, manifest.architecture, manifest.licence) == ("org/public", "llama", "apache-2.0")
    assert hub.downloaded == {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    num_requests = len(hub.requests)
    assert node.fetch("org/public@v1", is_offline=True) == manifest
    assert len(hub.requests) == num_requests, "offline means offline"
    assert node.fetch(f"org/public@{COMMIT}") == manifest
    assert not [request for request in hub.requests[num_requests:] if "/resolve/" in request], "nothing fetched twice"


def test_a_private_model_needs_the_token_and_looks_missing_without(node: Node):
    assert "no such repository, or a private one" in node.refusal("org/private")
    assert "no such repository" in node.refusal("org/private", token="wrong")
    assert node.fetch("org/private", token="secret").name == "org/private"


def test_a_gated_model_says_what_to_do(node: Node):
    for token in (None, "wrong"):
        text = node.refusal("org/gated", token=token)
        assert text.startswith("org/gated at http://127.0.0.1:")
        assert "is gated: accept the model's terms on its page, and set HF_TOKEN" in text
    assert node.fetch("org/gated", token="secret").name == "org/gated"


def test_what_does_not_exist_is_named(node: Node):
    assert "org/missing at http" in node.refusal("org/missing")
    assert "the repository has no revision 'v9'" in node.refusal("org/public@v9")
    assert "must have model.safetensors or model.safetensors.index.json" in node.refusal("org/empty")


def test_pickled_weights_are_fetched_where_there_are_no_safetensors(hub: Hub, node: Node):
    assert node.fetch("org/pickles").weights_format == "pickles"
    assert hub.downloaded == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    assert node.fetch("org/pickles", is_offline=True).weights_format == "pickles"


def test_without_the_hub_only_what_is_cached_is_served(node: Node):
    text = node.refusal("org/public", is_offline=True)
    assert "not (completely) in the hub's cache" in text
    assert "HF_HUB_OFFLINE forbids to fetch it" in text
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        text = node.refusal("org/public", endpoint=endpoint)
        assert "it cannot be fetched" in text
        node.fetch("org/public")
        assert node.fetch("org/public", endpoint=endpoint).name == "org/public"


def test_a_gguf_file_that_is_missing_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path):
    with pytest.raises(ModelFileError, match="or does not exist"):
        fetch_model("org/model.gguf", cache_dir=tmp_path)
    assert hub.requests == []


def test_the_environment_counts(hub: Hub, tmp_path: Path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and the own cache, as a user sets them."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "secret",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "OCTAVO_CACHE_DIR": str(tmp_path / "octavo"),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from cluster.models import fetch_model; print(fetch_model('org/private').weights)"],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "hf")
    assert len(list((tmp_path / "octavo" / "models").glob("org-private-*/manifest.json"))) == 1
