"""Arize Phoenix as a child process: a tracing back end that takes spans by OTLP over gRPC, and is asked by its API.

`bash load_tests/peers/phoenix.sh` installs it, in an environment of its own: its packages and ours need not agree.
"""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.server import ServerProcess, free_port

PROGRAM = Path.home() / ".cache/octavo-peers/phoenix/bin/phoenix"
"""Where `load_tests/peers/phoenix.sh` puts it."""
START_S = 120.0
QUERY_S = 20.0
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    span_id: str
    parent_id: str
    """Empty: none."""
    attributes: dict[str, Any]


class Phoenix:
    """`endpoint` is where spans go."""

    def __init__(self, port: int, otlp_port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.endpoint = f"http://127.0.0.1:{otlp_port}"

    def traces(self) -> dict[str, list[Span]]:
        """Return all spans, by the ids of their traces."""
        found: dict[str, list[Span]] = {}
        cursor = ""
        while True:
            page = self._get("projects/default/spans", limit=PAGE, **({"cursor": cursor} if cursor else {}))
            for each in page["data"]:
                span = Span(each["name"], each["context"]["span_id"], each["parent_id"] or "", each["attributes"])
                found.setdefault(each["context"]["trace_id"], []).append(span)
            cursor = page["next_cursor"] or ""
            if not cursor:
                return found

    def page(self, trace_id: str) -> str:
        """Return the address of the page that shows a trace."""
        (project,) = (each["id"] for each in self._get("projects")["data"] if each["name"] == "default")
        return f"{self.address}/projects/{project}/traces/{trace_id}"

    def _get(self, what: str, **parameters: object) -> Any:
        url = f"{self.address}/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=QUERY_S) as answer:
            return json.load(answer)


def is_installed() -> bool:
    return PROGRAM.exists()


@contextmanager
def receiving(folder: Path) -> Iterator[Phoenix]:
    """A Phoenix for the scope, its data in `folder`."""
    found = Phoenix(free_port(), free_port())
    variables = {
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": found.address.rpartition(":")[2],
        "PHOENIX_GRPC_PORT": found.endpoint.rpartition(":")[2],
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    server = ServerProcess([str(PROGRAM), "serve"], variables, folder / "phoenix.log")
    try:
        server.await_http(f"{found.address}/healthz", START_S)
        yield found
    finally:
        server.stop()
