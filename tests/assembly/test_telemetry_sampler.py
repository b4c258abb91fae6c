"""Which spans are kept: by OTEL_TRACES_SAMPLER, and what is linked to one that is kept."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags

from cluster.telemetry_sampler import sampler
from workers.errors import ConfigError

KEPT, DROPPED = (SpanContext(7, number, is_remote=True, trace_flags=TraceFlags(number)) for number in (1, 2))


def is_kept(name: str, argument: str = "", *, parent: SpanContext | None = None, links: tuple[Link, ...] = ()) -> bool:
    variables = {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}
    tracer = TracerProvider(sampler(variables), shutdown_on_exit=False).get_tracer("test")
    context = None if parent is None else trace.set_span_in_context(NonRecordingSpan(parent))
    return tracer.start_span("any", context, links=links).is_recording()


@pytest.mark.parametrize(
    ("name", "argument", "alone", "below_kept", "below_dropped"),
    [
        ("", "", True, True, False),
        ("parentbased_always_off", "", False, True, False),
        ("parentbased_traceidratio", "0", False, True, False),
        ("parentbased_traceidratio", "1.0", True, True, False),
        ("parentbased_traceidratio", "", True, True, False),
        ("always_off", "", False, False, False),
        ("Always_On", "", True, True, True),
        ("traceidratio", "0.0", False, False, False),
    ],
)
def test_spans_are_kept_as_the_variables_say(
    name: str, argument: str, alone: bool, below_kept: bool, below_dropped: bool
) -> None:
    assert is_kept(name, argument) == alone
    assert is_kept(name, argument, parent=KEPT) == below_kept
    assert is_kept(name, argument, parent=DROPPED) == below_dropped


def test_a_batch_is_kept_if_one_of_its_requests_is() -> None:
    for name in ("always_off", "parentbased_traceidratio"):
        assert is_kept(name, "0", links=(Link(DROPPED), Link(KEPT)))
        assert not is_kept(name, "0", links=(Link(DROPPED),))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "must be one of always_on, .*, is 'sometimes'"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1.5"}, r"in \[0, 1\], is '1.5'"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "all"}, r"in \[0, 1\], is 'all'"),
    ],
)
def test_what_is_no_sampler_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sampler(variables)
