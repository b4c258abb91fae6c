"""One request as planned: everything that is sent, and what is done to its answer; known before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.client import GenerateOptions, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    request_id: str
    kind: str
    tenant: str
    prompt: Prompt
    model: str = ""
    timeout_s: float | None = None
    cancel_after_s: float | None = None
    """After the sending; None: read to the end."""
    read_pause_s: float = 0.0
    """Between two reads of its answer."""
    expected: str = ""
    """The name of the status that must come back, for a request that must be refused."""
    options: GenerateOptions = field(default_factory=GenerateOptions)
