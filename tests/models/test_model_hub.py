"""Models from the hub, against a stand-in on loopback: public, private, gated, missing, unreachable, offline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.models import fetch_model
from tests.models.hub_stand_in import COMMIT, Hub, Repository, running
from tests.models.model_directories import directory_files
from workers.types import ModelManifest

SCRIPT = """
import sys
from cluster.models import fetch_model
from workers.errors import ModelFileError
try:
    print(fetch_model(sys.argv[1]).manifest)
except ModelFileError as error:
    sys.exit(str(error))
"""


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
    repositories = {
        "org/public": Repository({**files, **extra}, revisions=("main", "v1")),
        "org/private": Repository(files, token="secret"),
        "org/gated": Repository(files, token="secret", is_gated=True),
        "org/pickles": Repository({"config.json": files["config.json"], "pytorch_model.bin": b"a pickle"}),
    }
    with running(Hub(repositories)) as hub:
        yield hub


class Node:
    """A machine with caches of its own. huggingface_hub reads its settings on import, so each fetch is a process."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OCTAVO_"))
        }
        self.environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OCTAVO_CACHE_DIR": str(home / "octavo"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "NO_PROXY": "127.0.0.1",
        }

    def fetch(self, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, name],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def manifest(self, name: str, **environment: str) -> ModelManifest:
        done = self.fetch(name, **environment)
        assert done.returncode == 0, done.stderr
        return ModelManifest.from_json(Path(done.stdout.strip()).read_text())

    def refusal(self, name: str, **environment: str) -> str:
        done = self.fetch(name, **environment)
        assert done.returncode == 1, done.stdout
        return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def node(hub: Hub, tmp_path: Path) -> Node:
    return Node(hub, tmp_path)


def test_a_public_model_is_fetched_once_and_only_what_is_needed(hub: Hub, node: Node):
    manifest = node.manifest("org/public@v1")
    assert (manifest.name, manifest.architecture, manifest.licence) == ("org/public", "llama", "apache-2.0")
    assert hub.downloaded == {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    num_requests = len(hub.requests)
    assert node.manifest("org/public@v1", HF_HUB_OFFLINE="1") == manifest
    assert len(hub.requests) == num_requests, "offline means offline"
    assert node.manifest(f"org/public@{COMMIT}") == manifest
    assert not [request for request in hub.requests[num_requests:] if "/resolve/" in request], "nothing fetched twice"


def test_a_private_model_needs_the_token_and_looks_missing_without(node: Node):
    assert "no such repository, or a private one" in node.refusal("org/private")
    assert "no such repository" in node.refusal("org/private", HF_TOKEN="wrong")
    assert node.manifest("org/private", HF_TOKEN="secret").name == "org/private"


def test_a_gated_model_says_what_to_do(node: Node):
    for environment in ({}, {"HF_TOKEN": "wrong"}):
        text = node.refusal("org/gated", **environment)
        assert text.startswith("org/gated at http://127.0.0.1:")
        assert "is gated: accept the model's terms on its page, and set HF_TOKEN" in text
    assert node.manifest("org/gated", HF_TOKEN="secret").name == "org/gated"


def test_what_does_not_exist_is_named(node: Node):
    assert "org/missing at http" in node.refusal("org/missing")
    assert "the repository has no revision 'v9'" in node.refusal("org/public@v9")
    assert "must have model.safetensors or model.safetensors.index.json" in node.refusal("org/pickles")


def test_without_the_hub_only_what_is_cached_is_served(node: Node):
    text = node.refusal("org/public", HF_HUB_OFFLINE="1")
    assert "not (completely) in the hub's cache" in text
    assert "HF_HUB_OFFLINE forbids to fetch it" in text
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        text = node.refusal("org/public", HF_ENDPOINT=endpoint)
        assert "it cannot be fetched" in text
        node.manifest("org/public")
        assert node.manifest("org/public", HF_ENDPOINT=endpoint).name == "org/public"


def test_a_gguf_file_that_is_missing_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path):
    from workers.errors import ModelFileError

    with pytest.raises(ModelFileError, match="or does not exist"):
        fetch_model("org/model.gguf", cache_dir=tmp_path)
    assert hub.requests == []
