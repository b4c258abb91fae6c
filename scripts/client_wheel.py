"""Builds the octavo-client wheel and environments that have nothing but it and what it asks for."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PROTOS = Path(__file__).resolve().parent.parent / "protos"
MIN_SETUPTOOLS = 77
"""As protos/pyproject.toml has it; an older one, or none, and the build gets an environment of its own."""


class InstallError(Exception):
    """pip failed; the text is what it said."""


def build_wheel(directory: Path) -> Path:
    """Build the wheel of ``protos/`` in `directory`, leaving the sources as they are. Raises InstallError."""
    sources = directory / "protos"
    shutil.copytree(PROTOS, sources, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    arguments = ["wheel", "--no-deps", "--wheel-dir", str(directory), str(sources)]
    if _setuptools() >= MIN_SETUPTOOLS:
        arguments.insert(1, "--no-build-isolation")
    _pip(*arguments)
    [wheel] = directory.glob("octavo_client-*.whl")
    return wheel


def make_environment(directory: Path, *requirements: str) -> Path:
    """Make a virtual environment with these requirements only; return its interpreter. Raises InstallError."""
    venv.create(directory, with_pip=False, system_site_packages=False, symlinks=True)
    python = directory / "bin" / "python"
    _pip("--python", str(python), "install", "--no-compile", "--only-binary", ":all:", *requirements)
    return python


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"pip {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


def _setuptools() -> int:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0
