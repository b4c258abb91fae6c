"""Where requests are, as a router's decision log says while it is written (router/decision_log.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Placement:
    request_id: str
    replica: str


class Placements:
    """Reads `path` from its beginning, which it may not have yet; for a file that is not renamed meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0
        """Bytes, of whole lines."""

    def read(self) -> list[Placement]:
        """Return what was placed since the last call. Blocks for the file."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._num_read)
                text, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._num_read += len(text) + len(newline)
        told = [json.loads(line) for line in text.splitlines() if line]
        return [Placement(fields["request"], fields["replica"]) for fields in told if "request" in fields]
