"""Writes the pages of docs/ that follow from code; with --check says which are not what the code says, and fails.

Run as ``python -m scripts.reference [--check]`` from the repository's root, by `make docs` and `make check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from scripts.reference import commands, configuration, errors, metrics, spans

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTE = "<!-- Written by `make docs` from the code: change that. -->\n\n"
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration.page,
    "errors.md": errors.page,
    "metrics.md": metrics.page,
    "spans.md": spans.page,
    "commands.md": commands.page,
}


def stale() -> list[str]:
    """Return the pages that are not what the code says."""
    return [name for name, page in PAGES.items() if _text(DOCS / name) != NOTE + page()]


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        for name in (found := stale()):
            print(f"docs/{name} is not what the code says: run 'make docs'", file=sys.stderr)
        return bool(found)
    for name, page in PAGES.items():
        (DOCS / name).write_text(NOTE + page())
    return 0


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
