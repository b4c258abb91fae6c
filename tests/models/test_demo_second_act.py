"""The demo's second act without a cluster: what a stream tells of itself, the tree of a trace, and how both look."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import grpc
import pytest
from octavo.client import Delta, Usage
from octavo.names import Attribute
from octavo.names import Span as SpanName
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from rich.console import Console

from cluster.demo_crash import Outcome, Victim, is_descendant, staged
from cluster.demo_crash_view import views
from cluster.demo_placements import Placement, Placements
from cluster.demo_stream import Stream, busiest, first_differences
from cluster.demo_trace import Collector, Span, collecting, has_moved, outline, tree

FIRST, SECOND = "Worker-aaaa1111", "Worker-bbbb2222"
TRACE_ID = "0" * 31 + "7"


def tokens(*token_ids: int) -> Delta:
    return Delta("".join(f" {each}" for each in token_ids), token_ids)


def usage(replica: str) -> Usage:
    return Usage(
        prompt_tokens=100,
        cached_tokens=90,
        generated_tokens=4,
        queue_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
        replica=replica,
    )


def killed_stream() -> Stream:
    """Two tokens of one replica, a kill, a late token, and 0.75 s later a token of another replica."""
    stream = Stream(1, "[bold]this[/]", "r1")
    stream.trace_id = TRACE_ID
    stream.placed(FIRST)
    assert not stream.took(tokens(11), 10.0)
    assert not stream.took(tokens(12), 10.25)
    stream.lost()
    assert stream.is_waiting
    assert not stream.took(tokens(13), 10.5), "it was on its way when the replica was killed"
    stream.placed(SECOND)
    assert stream.is_waiting, "the other replica has not said anything"
    assert stream.took(tokens(14), 11.25)
    assert not stream.took(tokens(15), 11.375), "it went on once"
    return stream


def whole_stream() -> Stream:
    stream = Stream(2, "that", "r2")
    stream.placed(SECOND)
    stream.took(tokens(21, 22), 10.0)
    stream.took(tokens(23), 10.5)
    stream.ended(usage(SECOND))
    return stream


def test_a_stream_knows_its_pauses_and_where_it_went_on():
    stream = killed_stream()
    assert stream.tokens_at_loss == 2
    assert (stream.went_on_after_s, stream.longest_pause_s) == (0.75, 0.75)
    assert stream.replicas == [FIRST, SECOND]
    assert not stream.is_waiting
    stream.ended(usage(SECOND))
    assert stream.replicas == [FIRST, SECOND]
    assert stream.tokens_per_s(99.0) == pytest.approx(4 / 1.375)


def test_a_pause_before_the_first_token_is_none():
    stream = Stream(1, "?", "r1")
    assert stream.tokens_per_s(5.0) is None
    stream.took(Delta("", ()), 4.0)
    stream.took(tokens(1, 2), 5.0)
    assert stream.longest_pause_s == 0
    stream.took(Delta("held back", ()), 8.0)
    stream.took(tokens(3), 9.0)
    assert stream.longest_pause_s == 4.0, "between arrivals of tokens, whatever else comes"
    assert stream.tokens_per_s(9.0) == 0.25


def test_the_end_tells_of_a_placement_that_was_not_seen():
    stream = Stream(1, "?", "r1")
    stream.placed(FIRST)
    stream.ended(usage(SECOND))
    assert stream.replicas == [FIRST, SECOND]
    assert stream.has_moved


def test_the_busiest_replica_is_that_of_most_streams_that_run():
    streams = [Stream(number, "?", str(number)) for number in range(5)]
    assert busiest(streams) == ""
    for stream, replica in zip(streams, (FIRST, SECOND, SECOND, SECOND, FIRST), strict=True):
        stream.placed(replica)
    assert busiest(streams) == SECOND
    for stream in streams[2:4]:
        stream.ended(usage(SECOND))
    assert busiest(streams) == FIRST


def test_answers_are_identical_or_differ_from_a_place_on():
    ours = [[1, 2, 3], [1, 2, 3], [1, 2], [], [1, 2, 3]]
    theirs = [[1, 2, 3], [1, 9, 3], [1, 2, 3], [], [1, 2]]
    assert first_differences(ours, theirs) == [None, 1, 2, None, 2]


def test_placements_come_once_and_in_whole_lines(tmp_path):
    path = tmp_path / "log"
    placements = Placements(path)
    assert placements.read() == []
    lines = [json.dumps({"request": f"r{n}", "replica": FIRST, "attempt": 1}) for n in range(3)]
    path.write_text(f'{lines[0]}\n{{"dropped": 3}}\n{lines[1]}\n{lines[2][:9]}')
    assert placements.read() == [Placement("r0", FIRST), Placement("r1", FIRST)]
    with path.open("a") as file:
        file.write(f"{lines[2][9:]}\n")
    assert placements.read() == [Placement("r2", FIRST)]
    assert placements.read() == []


def test_only_a_process_of_our_own_is_a_descendant():
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    with subprocess.Popen(command) as child:
        try:
            assert is_descendant(child.pid, os.getpid())
            assert not is_descendant(os.getpid(), child.pid)
            assert not is_descendant(os.getppid(), os.getpid())
            assert not is_descendant(1, os.getpid())
        finally:
            for process in _below(child.pid):
                os.kill(process, 9)
            child.kill()


def _below(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


def span(name: str, span_id: str, parent_id: str, start_ms: int, end_ms: int, **attributes) -> Span:
    return Span(
        service="octavo-router",
        name=name,
        trace_id=TRACE_ID,
        span_id=span_id,
        parent_id=parent_id,
        start_ns=start_ms * 10**6,
        end_ns=end_ms * 10**6,
        attributes={getattr(Attribute, key.upper()): value for key, value in attributes.items()},
    )


SPANS = [  # as they arrive: children, which end first, before their parents, and the replica's apart from the router's
    span(SpanName.DISPATCH, "b", "a", 5, 905, attempt=1, replica=FIRST, error_type="REPLICA_LOST"),
    span(SpanName.QUEUE, "c", "a", 1, 5),
    span(SpanName.DECODE, "g", "e", 1000, 3100, output_tokens=120),
    span(SpanName.PREFILL, "f", "e", 920, 1000, input_tokens=200, cached_input_tokens=192),
    span(SpanName.QUEUE, "d", "a", 905, 906),
    span(SpanName.DISPATCH, "e", "a", 906, 3101, attempt=2, replica=SECOND),
    span(SpanName.SESSION_REQUEST, "a", "not here", 0, 3110, output_tokens=160, router="router-cccc3333"),
]


def test_a_trace_is_a_tree_in_the_order_of_time():
    (root,) = tree(SPANS)
    assert [child.span.span_id for child in root.children] == ["c", "b", "d", "e"]
    assert [child.span.span_id for child in root.children[3].children] == ["f", "g"]
    lines = [" ".join(line.split()) for line in outline([root])]
    assert lines == [
        "octavo.v1.InferenceService/Session request 3.11 s 160 tokens, through router cccc3333",
        "├─ octavo.queue < 10 ms",
        "├─ octavo.dispatch 900 ms attempt 1 on replica aaaa1111: REPLICA_LOST; the replica's own spans died with it",
        "├─ octavo.queue < 10 ms",
        "└─ octavo.dispatch 2.19 s attempt 2 on replica bbbb2222: goes on after token 40",
        "├─ octavo.prefill 80 ms 192 of 200 prompt tokens from its cache",
        "└─ octavo.decode 2.10 s 120 tokens",
    ]
    assert outline([]) == []


def test_a_trace_is_whole_with_the_request_and_the_last_replicas_decode():
    assert has_moved(SPANS)
    for number in range(len(SPANS)):
        rest = SPANS[:number] + SPANS[number + 1 :]
        is_needed = SPANS[number].span_id in {"a", "e", "g"}
        assert has_moved(rest) != is_needed, SPANS[number].span_id
    assert not has_moved([])


def test_the_collector_keeps_what_the_sdk_sends():
    with collecting({}) as collector:
        assert collector is not None
        assert collector.variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == collector.endpoint
        provider = TracerProvider(resource=Resource.create({"service.name": "octavo-router"}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint, insecure=True)))
        with provider.get_tracer("t").start_as_current_span("outer") as outer:
            with provider.get_tracer("t").start_as_current_span("inner", attributes={"n": 3, "of": ("a", "b")}):
                pass
            trace_id = f"{outer.get_span_context().trace_id:032x}"
        provider.shutdown()
        spans = collector.await_trace(trace_id, lambda spans: len(spans) == 2, 5.0)
        assert collector.await_trace("0" * 32, bool, 0.0) == []
    (root,) = tree(spans)
    assert (root.span.name, root.span.service) == ("outer", "octavo-router")
    (inner,) = root.children
    assert inner.span.attributes == {"n": 3, "of": ["a", "b"]}
    assert 0 < root.span.start_ns <= inner.span.start_ns <= inner.span.end_ns <= root.span.end_ns


def test_a_collector_of_the_users_own_is_left_alone():
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        with collecting({name: "true"}) as collector:
            assert collector is None


def test_a_collector_that_is_stopped_listens_no_more():
    collector = Collector()
    collector.stop()
    with grpc.insecure_channel(collector.endpoint.removeprefix("http://")) as channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            call(b"", timeout=60)


def outcome(*differences: int | None, dtype: str = "fp32", spans: list[Span] = SPANS) -> Outcome:
    stream = killed_stream()
    stream.ended(usage(SECOND))
    return Outcome(
        streams=[stream, whole_stream()],
        victim=Victim(FIRST, 4711, 1),
        differences=differences,
        dtype=dtype,
        total_s=3.0,
        undisturbed_s=2.0,
        traced=stream,
        trace=tree(spans),
    )


def show(shown: Outcome, *, as_json: bool = False, is_terminal: bool = False, width: int = 100) -> str:
    """What is printed of a second act of two streams."""
    file = io.StringIO()
    out = Console(file=file, width=width, height=24, force_terminal=is_terminal, color_system=None)
    _, view = views(out, Console(file=io.StringIO()), as_json=as_json)
    waiting = Stream(1, "[bold]this[/]", "r1")
    waiting.placed(FIRST)
    waiting.took(tokens(1), 1.0)
    view.begun([waiting, shown.streams[1]])
    waiting.lost()
    view.killed(shown.victim)
    view.ended()
    view.begun(shown.streams)
    view.went_on(shown.streams[0])
    view.ended()
    view.outcome(shown)
    return file.getvalue()


def test_lines_say_who_was_killed_who_goes_on_and_what_is_true_of_the_answers():
    text = show(outcome(None, None))
    assert "kill -9: replica aaaa1111, pid 4711, which carried 1 of them" in text
    assert "[1] goes on at replica bbbb2222 after 0.75 s" in text
    assert "[1] [bold]this[/]: aaaa1111 → bbbb2222 after 0.75 s\n     11 12 13 14 15\n" in text
    assert "2 of 2 answers are, token by token, those of the same run undisturbed (fp32, greedy); 1 of them" in text
    assert "longest pause of a stream was 0.75 s." in text
    assert "180 of 200 prompt tokens (90 %) were not computed" in text
    assert f"trace {TRACE_ID}:\n    octavo.v1.InferenceService/Session request" in text
    assert "\x1b" not in text


def test_lines_do_not_hide_what_went_otherwise_than_promised():
    shown = outcome(None, 3, dtype="int8", spans=[])
    shown.streams[1].longest_pause_s = 2.5
    text = show(shown)
    assert "1 of 2 answers" in text
    assert "The others differ from token 4 on: sums over other chunks round otherwise" in text
    assert "was 2.50 s, more than the 2 s that it should be at most." in text
    assert "its spans did not come here" in text


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_shows_the_streams_side_by_side_and_where_they_wait(width):
    text = show(outcome(None, None), is_terminal=True, width=width)
    line = next(line for line in text.splitlines() if "1. [bold]this[/]" in line)
    assert "2. that" in line
    assert "aaaa1111 is gone; waiting" in text
    assert "kill -9: replica aaaa1111" in text
    assert "aaaa1111 → bbbb2222 after 0.75 s" in text


def test_json_has_the_kill_every_stream_the_trace_and_the_figures():
    events = [json.loads(line) for line in show(outcome(None, 3), as_json=True).splitlines()]
    assert [event["event"] for event in events] == ["killed", "went_on", "stream", "stream", "trace", "second_act"]
    assert events[0]["pid"] == 4711
    assert events[1] == {
        "event": "went_on",
        "number": 1,
        "replica": SECOND,
        "tokens_at_loss": 2,
        "went_on_after_s": 0.75,
    }
    assert events[2]["replicas"] == [FIRST, SECOND]
    assert [event["first_difference"] for event in events[2:4]] == [None, 3]
    assert len(events[4]["spans"]) == len(SPANS)
    assert (events[5]["num_identical"], events[5]["longest_pause_s"]) == (1, 0.75)


def test_the_cluster_computes_exactly_unless_it_is_told_otherwise():
    with staged({}) as stage:
        assert stage.variables["OCTAVO_ENGINE__DTYPE"] == "fp32"
        assert stage.variables["OCTAVO_ROUTER__DECISION_LOG"] == str(stage.placements)
        assert stage.collector is not None
        assert stage.collector.variables.items() <= stage.variables.items()
        assert stage.placements.parent.is_dir()
    assert not stage.placements.parent.exists()
    for name in ("OCTAVO_ENGINE__DTYPE", "OCTAVO_CONFIG"):
        with staged({name: "bf16", "OTEL_SDK_DISABLED": "true"}) as stage:
            assert set(stage.variables) == {"OCTAVO_ROUTER__DECISION_LOG"}


def test_twelve_panels_fit_in_a_small_terminal():
    file = io.StringIO()
    out = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    _, view = views(out, Console(file=io.StringIO()), as_json=False)
    streams = [Stream(number, f"number {number}", str(number)) for number in range(1, 13)]
    for stream in streams:
        stream.placed(FIRST)
        stream.took(tokens(*range(100)), 1.0)
    view.begun(streams)
    shown = file.getvalue()
    view.ended()
    assert "12. number 12" in shown, "cropped by the terminal's height"
