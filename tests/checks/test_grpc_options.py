"""Options of gRPC channels and servers are strings, and one that gRPC does not know has no effect and no error."""

from __future__ import annotations

import re
from pathlib import Path

from grpc._cython import cygrpc

ROOT = Path(__file__).resolve().parents[2]
OPTION = re.compile(r'\("(grpc\.[\w.]+)",')


def test_grpc_knows_every_option() -> None:
    """One was misspelt, so that another one held for it: a Session on which nothing happened for two minutes was cut
    off as a flood of pings."""
    library = Path(cygrpc.__file__).read_bytes()
    sources = [path for folder in ("protos", "router", "workers") for path in (ROOT / folder).rglob("*.py")]
    options = {option for path in sources for option in OPTION.findall(path.read_text())}
    assert len(options) > 10
    assert {option for option in options if option.encode() + b"\0" not in library} == set()
