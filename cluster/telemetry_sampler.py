"""Which spans are kept: what OTEL_TRACES_SAMPLER says, and what is linked to a span that is kept.

A batch or a step stands in no request's tree but is linked to all of them; it is worth keeping exactly if one of them
is. Imports the SDK.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from workers.errors import ConfigError

SAMPLER, ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
_ROOTS: Final[Mapping[str, Callable[[float], Sampler]]] = {
    "always_on": lambda _: ALWAYS_ON,
    "always_off": lambda _: ALWAYS_OFF,
    "traceidratio": TraceIdRatioBased,
}
_PARENT_BASED: Final = "parentbased_"


def sampler(environ: Mapping[str, str]) -> Sampler:
    """Return the sampler that the variables of the specification name. Raises ConfigError."""
    name = environ.get(SAMPLER, "").strip().lower() or f"{_PARENT_BASED}always_on"
    root = _ROOTS.get(name.removeprefix(_PARENT_BASED))
    if root is None:
        names = ", ".join([*_ROOTS, *(_PARENT_BASED + each for each in _ROOTS)])
        raise ConfigError(f"{SAMPLER} must be one of {names}, is {name!r}")
    inner = root(_ratio(environ) if name.endswith("ratio") else 1.0)
    return LinkedSampler(ParentBased(inner) if name.startswith(_PARENT_BASED) else inner)


class LinkedSampler(Sampler):
    """Keeps what is linked to a span that is kept, and of the rest what `inner` keeps."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(  # the SDK's seam
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if links and any(link.context.trace_flags.sampled for link in links):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links)

    def get_description(self) -> str:
        return f"Linked{{{self._inner.get_description()}}}"


def _ratio(environ: Mapping[str, str]) -> float:
    text = environ.get(ARGUMENT, "").strip() or "1"
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"{ARGUMENT} must be a number in [0, 1], is {text!r}")
    return ratio
