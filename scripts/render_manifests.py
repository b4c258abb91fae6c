"""Builds the overlays in deploy/kubernetes into deploy/kubernetes/rendered, each headed by a digest of its sources.

With kustomize itself (`kustomize`, or the one in `kubectl`), which no package index has for this Python: so checks that
must do without it look at what was rendered, and at the digest. Run after each change in deploy/kubernetes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

KUBERNETES = Path(__file__).parents[1] / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu")
HEADER = "# Rendered by scripts/render_manifests.py from sources {digest}: do not edit.\n"


def rendered(overlay: str) -> Path:
    return KUBERNETES / "rendered" / f"{overlay}.yaml"


def digest(overlay: str) -> str:
    """Return a digest of everything that `overlay` is built from."""
    summed = hashlib.sha256()
    for folder in (KUBERNETES / "base", KUBERNETES / "overlays" / overlay):
        for path in sorted(folder.iterdir()):
            summed.update(f"{path.name}\0{len(path.read_bytes())}\0".encode() + path.read_bytes())
    return summed.hexdigest()[:16]


def kustomize(folder: Path) -> str | None:
    """Return what kustomize builds of a folder; None where there is no kustomize."""
    if found := shutil.which("kustomize"):
        command = [found, "build"]
    elif found := shutil.which("kubectl"):
        command = [found, "kustomize"]
    else:
        return None
    return subprocess.run([*command, folder], capture_output=True, text=True, timeout=60, check=True).stdout


def render(overlay: str) -> str | None:
    """Return the file of `overlay` as it should be; None where there is no kustomize."""
    built = kustomize(KUBERNETES / "overlays" / overlay)
    return None if built is None else HEADER.format(digest=digest(overlay)) + built


def main() -> int:
    for overlay in OVERLAYS:
        text = render(overlay)
        if text is None:
            print("render_manifests: needs kustomize or kubectl on PATH", file=sys.stderr)
            return 1
        rendered(overlay).parent.mkdir(exist_ok=True)
        rendered(overlay).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
