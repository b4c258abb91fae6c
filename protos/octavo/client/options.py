"""How a client behaves. Read from nowhere: whoever makes the client says what differs from the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.client.backoff import Backoff


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

    def check(self) -> None:
        for name in ClientOptions.__slots__:
            value = getattr(self, name)
            if name != "backoff" and not value > 0:
                raise ValueError(f"{name} must be > 0, is {value!r}")
