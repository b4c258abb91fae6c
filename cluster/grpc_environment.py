"""The environment by which gRPC's core is set up, which it reads when a process first uses it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

EXPERIMENTS: Final = "GRPC_EXPERIMENTS"
LEAN: Final = "-event_engine_client,-event_engine_listener"
"""Without gRPC's event engine the thread that waits for completions reads the sockets, too: one hand-over between
threads less for each message. In turns with the engine, medians of six on two cores with other work on them, a request
for one token took 11, 11 and 12 % less processor time of router, replica and client over Session, and 4, 11 and 5 %
less over Generate; single runs differ by more than that."""


def grpc_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to `environ` for a router or a replica: nothing against what the operator chose."""
    return {EXPERIMENTS: environ.get(EXPERIMENTS, LEAN)}


def process_environment() -> dict[str, str]:
    """Return the environment for a process with a router or a replica that this one starts without Ray."""
    return os.environ | grpc_environment(os.environ)
