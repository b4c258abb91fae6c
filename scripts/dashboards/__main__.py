"""Writes deploy/observability/grafana/dashboards; with --check says which are not what the table says, and fails.

Run as ``python -m scripts.dashboards [--check]`` from the repository's root, by `make docs` and `make check`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scripts.dashboards.grafana import render
from scripts.dashboards.panels import DASHBOARDS

FOLDER = Path(__file__).resolve().parents[2] / "deploy/observability/grafana/dashboards"


def files() -> dict[Path, str]:
    """Return what each file shall have."""
    return {
        FOLDER / f"{dashboard.name}.json": json.dumps(render(dashboard), indent=1) + "\n" for dashboard in DASHBOARDS
    }


def stale() -> list[str]:
    return [path.name for path, text in files().items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        for name in (found := stale()):
            print(f"the dashboard {name} is not what the table says: run 'make docs'", file=sys.stderr)
        return bool(found)
    for path, text in files().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
