"""The one table of metrics: what each is called, what it counts and in which unit, by which attributes, and its alias.

Standard library only, but for `recording_meter`. `Metric.create` makes the instrument with any meter of the
OpenTelemetry API. Names are those of the GenAI semantic conventions where they have one, else under ``octavo.``. As
Prometheus text a name has underscores, its unit, and ``_total`` if it only grows (`octavo.queue.requests` is
``octavo_queue_requests``). `alias` is what vLLM calls the same there, so that dashboards made for it work. Values of
attributes are from closed sets, or bounded in number: no request, no replica and no prompt has a series of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from octavo.names import Attribute

Kind = Literal["counter", "histogram", "observable_counter", "observable_gauge", "gauge"]
Where = Literal["router", "replica", "scaling", "every process"]

SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
"""Bounds of what may take from a step to an answer."""
FINE_SECONDS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Bounds of what happens for each token or step."""
TOKEN_SECONDS: Final = (
    *(
        0.0005,
        0.001,
        0.0025,
        0.005,
        0.0075,
        0.01,
        0.015,
        0.025,
        0.035,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.75,
    ),
    *(1.0, 2.5),
)
"""Bounds of the time from token to token: those of OpenTelemetry's conventions, and finer ones below and between."""
COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    kind: Kind
    unit: str
    """In UCUM, as OpenTelemetry has it: ``s``, ``{token}``, ``1``."""
    about: str
    """One sentence, without a full stop."""
    where: Where
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds."""
    alias: str = ""

    @property
    def text_name(self) -> str:
        """What it is called in Prometheus text; a histogram's samples have ``_bucket``, ``_sum`` and ``_count`` after
        it."""
        name = self.name.replace(".", "_")
        unit = "_seconds" if self.unit == "s" else ""
        return name + unit + ("_total" if self.kind.endswith("counter") else "")

    def create(self, meter: Any, callback: Callable[[Any], Sequence[Any]] | None = None) -> Any:
        """Return the instrument from an OpenTelemetry meter; `callback` observes an observable one."""
        make = getattr(meter, f"create_{self.kind}")
        if self.kind.startswith("observable"):
            return make(self.name, [callback], unit=self.unit, description=self.about)
        if self.kind == "histogram":
            bounds = list(self.buckets)
            return make(self.name, unit=self.unit, description=self.about, explicit_bucket_boundaries_advisory=bounds)
        return make(self.name, unit=self.unit, description=self.about)


def recording_meter(scope: str) -> Any | None:
    """Return a meter of this process's provider of metrics; None while there is only the API's own, which records
    nothing: then it is cheapest to ask nothing of it."""
    from opentelemetry import metrics

    provider = metrics.get_meter_provider()
    is_the_apis_own = f"{type(provider).__module__}.".startswith(f"{metrics.__name__}.")
    return None if is_the_apis_own else provider.get_meter(scope)


def bound(instrument: Any, labels: Mapping[str, str]) -> Callable[[float], None]:
    """Return what counts or records with these labels: for half the price, where the instrument knows how."""
    bind = getattr(instrument, "bind", None)
    if bind is not None:
        found: Callable[[float], None] = bind(labels)
        return found
    write = instrument.add if hasattr(instrument, "add") else instrument.record
    return partial(write, attributes=labels)


_MODEL = (Attribute.REQUEST_MODEL,)

# Requests, as clients see them. Recorded once a request, when it has ended.
REQUEST_DURATION = Metric(
    name="gen_ai.server.request.duration",
    kind="histogram",
    unit="s",
    about="From a request's arrival until its end, however it ended",
    where="router",
    attributes=(Attribute.OPERATION_NAME, Attribute.REQUEST_MODEL, Attribute.ERROR_TYPE),
    buckets=SECONDS,
    alias="vllm:e2e_request_latency_seconds",
)
TIME_TO_FIRST_TOKEN = Metric(
    name="gen_ai.server.time_to_first_token",
    kind="histogram",
    unit="s",
    about="From a request's arrival until its first token was there",
    where="router",
    attributes=(Attribute.OPERATION_NAME, Attribute.REQUEST_MODEL),
    buckets=SECONDS,
    alias="vllm:time_to_first_token_seconds",
)
TIME_PER_OUTPUT_TOKEN = Metric(
    name="gen_ai.server.time_per_output_token",
    kind="histogram",
    unit="s",
    about="Time of an answer after its first token, divided by the tokens after the first",
    where="router",
    attributes=(Attribute.OPERATION_NAME, Attribute.REQUEST_MODEL),
    buckets=TOKEN_SECONDS,
    alias="vllm:request_time_per_output_token_seconds",
)
QUEUE_DURATION = Metric(
    name="octavo.request.queue.duration",
    kind="histogram",
    unit="s",
    about="How long a request waited in the router before it was sent to a replica, all attempts together",
    where="router",
    attributes=_MODEL,
    buckets=SECONDS,
    alias="vllm:request_queue_time_seconds",
)
PREFILL_DURATION = Metric(
    name="octavo.request.prefill.duration",
    kind="histogram",
    unit="s",
    about="How long the last replica took to compute a request's prompt",
    where="router",
    attributes=_MODEL,
    buckets=SECONDS,
    alias="vllm:request_prefill_time_seconds",
)
DECODE_DURATION = Metric(
    name="octavo.request.decode.duration",
    kind="histogram",
    unit="s",
    about="From a request's first token until its last, in the last replica",
    where="router",
    attributes=_MODEL,
    buckets=SECONDS,
    alias="vllm:request_decode_time_seconds",
)
REQUESTS = Metric(
    name="octavo.requests",
    kind="counter",
    unit="{request}",
    about="Requests that have ended, by the reason of their error; without one, all was well",
    where="router",
    attributes=(Attribute.OPERATION_NAME, Attribute.REQUEST_MODEL, Attribute.ERROR_TYPE),
)
FINISHED_CHOICES = Metric(
    name="octavo.choices.finished",
    kind="counter",
    unit="{choice}",
    about="Choices of answers, by why they ended",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.FINISH_REASON),
    alias="vllm:request_success",
)
TOKENS_USED = Metric(
    name="octavo.tokens",
    kind="counter",
    unit="{token}",
    about="Tokens of requests that have ended: of prompts (input, and cached of these) and of answers (output)",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.TOKEN_TYPE),
)
REJECTIONS = Metric(
    name="octavo.rejections",
    kind="counter",
    unit="{request}",
    about="Requests that were refused before they were queued, by reason",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.ERROR_TYPE),
)
DEADLINE_MISSES = Metric(
    name="octavo.deadline.misses",
    kind="counter",
    unit="{request}",
    about="Requests whose deadline passed or could no longer be met after they had been queued, by reason",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.ERROR_TYPE),
)
RESUMES = Metric(
    name="octavo.resumes",
    kind="counter",
    unit="{attempt}",
    about="Answers that went on at another replica, by why the one before was left",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.ERROR_TYPE),
)

# Tenants. At most `telemetry.max_tenants` have a series; the others are "other" together.
TENANT_REQUESTS = Metric(
    name="octavo.tenant.requests",
    kind="counter",
    unit="{request}",
    about="Requests that have ended, by tenant",
    where="router",
    attributes=(Attribute.TENANT, Attribute.ERROR_TYPE),
)
TENANT_TOKENS = Metric(
    name="octavo.tenant.tokens",
    kind="counter",
    unit="{token}",
    about="Tokens of requests that have ended, by tenant",
    where="router",
    attributes=(Attribute.TENANT, Attribute.TOKEN_TYPE),
)
TENANT_QUEUE_DURATION = Metric(
    name="octavo.tenant.queue.duration",
    kind="histogram",
    unit="s",
    about="How long requests waited in the router, by tenant",
    where="router",
    attributes=(Attribute.TENANT,),
    buckets=SECONDS,
)

# The router now.
QUEUE_REQUESTS = Metric(
    name="octavo.queue.requests",
    kind="observable_gauge",
    unit="{request}",
    about="Requests that wait for a replica",
    where="router",
    attributes=_MODEL,
)
QUEUE_TOKENS = Metric(
    name="octavo.queue.tokens",
    kind="observable_gauge",
    unit="{token}",
    about="Prompt tokens of those",
    where="router",
    attributes=_MODEL,
)
QUEUE_OLDEST = Metric(
    name="octavo.queue.oldest",
    kind="observable_gauge",
    unit="s",
    about="How long the oldest of those has waited",
    where="router",
    attributes=_MODEL,
)
REQUESTS_DISPATCHED = Metric(
    name="octavo.requests.dispatched",
    kind="observable_gauge",
    unit="{request}",
    about="Requests of this router that replicas have now",
    where="router",
    attributes=_MODEL,
)
CREDIT_TOKENS = Metric(
    name="octavo.credit.tokens",
    kind="observable_gauge",
    unit="{token}",
    about="Tokens of prefill that this router may still send, all replicas together",
    where="router",
    attributes=_MODEL,
)
REPLICAS = Metric(
    name="octavo.replicas",
    kind="observable_gauge",
    unit="{replica}",
    about="Replicas as this router sees them, by state",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.REPLICA_STATE),
)
SESSIONS = Metric(
    name="octavo.sessions",
    kind="observable_gauge",
    unit="{session}",
    about="Sessions that are open",
    where="router",
)
INDEX_BLOCKS = Metric(
    name="octavo.prefix_index.blocks",
    kind="observable_gauge",
    unit="{block}",
    about="Blocks of replicas' caches that this router knows, each replica's counted",
    where="router",
    attributes=_MODEL,
)
BATCH_REQUESTS = Metric(
    name="octavo.batch.requests",
    kind="histogram",
    unit="{request}",
    about="Requests that left the queue together",
    where="router",
    attributes=_MODEL,
    buckets=COUNTS,
)
BATCH_TOKENS = Metric(
    name="octavo.batch.tokens",
    kind="histogram",
    unit="{token}",
    about="Prompt tokens of those together, what they share counted once",
    where="router",
    attributes=_MODEL,
    buckets=TOKENS,
)
PLACEMENTS = Metric(
    name="octavo.placements",
    kind="counter",
    unit="{decision}",
    about="Decisions on a request's replica, by what decided",
    where="router",
    attributes=(Attribute.REQUEST_MODEL, Attribute.RULE),
)
PLACEMENT_MATCHED_TOKENS = Metric(
    name="octavo.placement.matched_tokens",
    kind="counter",
    unit="{token}",
    about="Prompt tokens that the chosen replicas had in their caches, as the router knew",
    where="router",
    attributes=_MODEL,
)

# The engine of a replica.
ENGINE_RUNNING = Metric(
    name="octavo.engine.running",
    kind="observable_gauge",
    unit="{sequence}",
    about="Sequences that take part in steps",
    where="replica",
    attributes=_MODEL,
    alias="vllm:num_requests_running",
)
ENGINE_WAITING = Metric(
    name="octavo.engine.waiting",
    kind="observable_gauge",
    unit="{sequence}",
    about="Sequences that wait for a place or for blocks",
    where="replica",
    attributes=_MODEL,
    alias="vllm:num_requests_waiting",
)
ENGINE_OWED_TOKENS = Metric(
    name="octavo.engine.owed_prefill_tokens",
    kind="observable_gauge",
    unit="{token}",
    about="Prompt tokens that are yet to be computed",
    where="replica",
    attributes=_MODEL,
)
KV_USAGE = Metric(
    name="octavo.kv.usage",
    kind="observable_gauge",
    unit="1",
    about="Share of the KV blocks that sequences hold",
    where="replica",
    attributes=_MODEL,
    alias="vllm:kv_cache_usage_perc",
)
KV_BLOCKS = Metric(
    name="octavo.kv.blocks",
    kind="observable_gauge",
    unit="{block}",
    about="KV blocks: held by sequences (used), with content that can be found again (cached), or neither (free)",
    where="replica",
    attributes=(Attribute.REQUEST_MODEL, Attribute.BLOCK_STATE),
)
PREFIX_CACHE_QUERIES = Metric(
    name="octavo.prefix_cache.queries",
    kind="observable_counter",
    unit="{token}",
    about="Prompt tokens that were looked for in the cache",
    where="replica",
    attributes=_MODEL,
    alias="vllm:prefix_cache_queries",
)
PREFIX_CACHE_HITS = Metric(
    name="octavo.prefix_cache.hits",
    kind="observable_counter",
    unit="{token}",
    about="Prompt tokens that were found in the cache",
    where="replica",
    attributes=_MODEL,
    alias="vllm:prefix_cache_hits",
)
PREFIX_CACHE_EVICTIONS = Metric(
    name="octavo.prefix_cache.evictions",
    kind="observable_counter",
    unit="{block}",
    about="Cached blocks that made way for others",
    where="replica",
    attributes=_MODEL,
)
PREEMPTIONS = Metric(
    name="octavo.engine.preemptions",
    kind="observable_counter",
    unit="{sequence}",
    about="Sequences that gave their blocks up to others, to be computed again",
    where="replica",
    attributes=_MODEL,
    alias="vllm:num_preemptions",
)
PROMPT_TOKENS = Metric(
    name="octavo.engine.prompt_tokens",
    kind="observable_counter",
    unit="{token}",
    about="Prompt tokens of the sequences that were taken in, the cached ones among them",
    where="replica",
    attributes=_MODEL,
    alias="vllm:prompt_tokens",
)
GENERATED_TOKENS = Metric(
    name="octavo.engine.generated_tokens",
    kind="observable_counter",
    unit="{token}",
    about="Tokens that were generated",
    where="replica",
    attributes=_MODEL,
    alias="vllm:generation_tokens",
)
COMPUTED_TOKENS = Metric(
    name="octavo.engine.computed_tokens",
    kind="observable_counter",
    unit="{token}",
    about="Tokens that went through the model, of prompts and of answers",
    where="replica",
    attributes=_MODEL,
)
DRAFTED_TOKENS = Metric(
    name="octavo.engine.drafted_tokens",
    kind="observable_counter",
    unit="{token}",
    about="Tokens that were guessed ahead",
    where="replica",
    attributes=_MODEL,
    alias="vllm:spec_decode_num_draft_tokens",
)
ACCEPTED_TOKENS = Metric(
    name="octavo.engine.accepted_tokens",
    kind="observable_counter",
    unit="{token}",
    about="Of those guessed ahead, those that were right",
    where="replica",
    attributes=_MODEL,
    alias="vllm:spec_decode_num_accepted_tokens",
)
STEPS = Metric(
    name="octavo.engine.steps",
    kind="observable_counter",
    unit="{step}",
    about="Steps of the engine",
    where="replica",
    attributes=_MODEL,
)
STEP_DURATION = Metric(
    name="octavo.engine.step.duration",
    kind="histogram",
    unit="s",
    about="Time of a step, whole",
    where="replica",
    attributes=_MODEL,
    buckets=FINE_SECONDS,
)
STEP_PHASE_SECONDS = Metric(
    name="octavo.engine.step.phase.time",
    kind="observable_counter",
    unit="s",
    about="Time of all steps together, by part: schedule, run, sample, emit",
    where="replica",
    attributes=(Attribute.REQUEST_MODEL, Attribute.STEP_PHASE),
)

# Scaling.
REPLICAS_TARGET = Metric(
    name="octavo.replicas.target",
    kind="gauge",
    unit="{replica}",
    about="Replicas that there shall be",
    where="scaling",
    attributes=_MODEL,
)
SCALE_DEMAND = Metric(
    name="octavo.scale.demand",
    kind="gauge",
    unit="{sequence}",
    about="Sequences that there should be places for",
    where="scaling",
    attributes=_MODEL,
)
SCALE_DECISIONS = Metric(
    name="octavo.scale.decisions",
    kind="counter",
    unit="{decision}",
    about="Changes of the number of replicas",
    where="scaling",
    attributes=(Attribute.REQUEST_MODEL, Attribute.SCALE_DIRECTION),
)

# Telemetry itself.
SPANS_DROPPED = Metric(
    name="octavo.telemetry.dropped_spans",
    kind="observable_counter",
    unit="{span}",
    about="Spans that were lost, because the queue was full or the collector did not take them",
    where="every process",
)
SILENT_PROCESSES = Metric(
    name="octavo.telemetry.silent_processes",
    kind="counter",
    unit="{process}",
    about="Processes that did not answer when this router collected everybody's metrics",
    where="router",
)

CATALOGUE: Final[tuple[Metric, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of this file."""
