"""How a client behaves. Read from nowhere: whoever makes the client says what differs from the defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from octavo.client.backoff import Backoff

_MAX_KEY: Final = 64
_KEY: Final = re.compile(rf"[a-z0-9_.-]{{1,{_MAX_KEY}}}")
_MAX_VALUE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How a client behaves; times in seconds. `check` raises ValueError with the rule and the value."""

    window: int = 1024
    """Tokens of one request that may be on their way or unread."""
    retry_timeout_s: float = 30.0
    """How long a request without a router is tried again, also when it has no deadline."""
    connect_timeout_s: float = 5.0
    close_timeout_s: float = 1.0
    """How long leaving the client waits for routers to take the last cancels."""
    call_timeout_s: float = 10.0
    """Deadline of the calls that are not requests: models, tokenize, status, health."""
    keepalive_s: float = 30.0
    max_message_bytes: int = 16 * 1024 * 1024
    """At most what the router takes (its `max_message_bytes`)."""
    backoff: Backoff = field(default_factory=Backoff)
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(key, value) pairs of ASCII text that are sent with every call: a Session and all its requests have the same. A
    value may be a secret, so none is shown anywhere."""

    def check(self) -> None:
        for name in ClientOptions.__slots__:
            value = getattr(self, name)
            if name not in ("backoff", "metadata") and not value > 0:
                raise ValueError(f"{name} must be > 0, is {value!r}")
        for key, text in self.metadata:
            _check_pair(key, text)


def _check_pair(key: str, value: str) -> None:
    if not _KEY.fullmatch(key) or key.startswith("grpc-") or key.endswith("-bin"):
        raise ValueError(
            f"metadata: a key must have 1 to {_MAX_KEY} characters [a-z0-9_.-], not begin with grpc- and not end with "
            f"-bin, is {key!r}"
        )
    if len(value) > _MAX_VALUE or not (value.isascii() and value.isprintable()):
        raise ValueError(
            f"metadata: the value of {key} must have at most {_MAX_VALUE} printable ASCII characters, has {len(value)} "
            f"of which some may be none"
        )
