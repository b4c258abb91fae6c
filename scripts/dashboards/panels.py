"""What stands on the five dashboards, as one table: titles, units and queries. How Grafana wants it: `grafana.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from octavo import metrics as m
from octavo.names import Attribute

from scripts.dashboards.queries import MODEL, legend, mean, most, quantile, rate, ratio, total

Unit = Literal["short", "s", "reqps", "percentunit", "ops", "none"]


@dataclass(frozen=True, slots=True)
class Query:
    expression: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    unit: Unit
    queries: tuple[Query, ...]
    is_number: bool = False
    """One number instead of lines over time."""
    is_stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    name: str
    title: str
    panels: tuple[Panel, ...]
    has_tenants: bool = False


def lines(title: str, unit: Unit, *queries: tuple[str, str]) -> Panel:
    return Panel(title=title, unit=unit, queries=tuple(Query(*query) for query in queries))


def number(title: str, unit: Unit, expression: str) -> Panel:
    return Panel(title=title, unit=unit, queries=(Query(expression, ""),), is_number=True)


def by(title: str, unit: Unit, metric: m.Metric, attribute: str, otherwise: str = "") -> Panel:
    """Rates of a counter, stacked, one area for each value of an attribute; `otherwise`: of series without one."""
    shown = [
        Query(
            rate(metric, attribute, where=f'{attribute.replace(".", "_")}!=""' if otherwise else ""), legend(attribute)
        )
    ]
    if otherwise:
        shown.append(Query(rate(metric, where=f'{attribute.replace(".", "_")}=""'), otherwise))
    return Panel(title=title, unit=unit, queries=tuple(shown), is_stacked=True)


def spread(title: str, unit: Unit, metric: m.Metric, *attributes: str) -> Panel:
    """The median, the 90th and the 99th percentile of a histogram."""
    names = "".join(f" {legend(attribute)}" for attribute in attributes)
    return lines(
        title, unit, *((quantile(share, metric, *attributes), f"p{share * 100:g}{names}") for share in (0.5, 0.9, 0.99))
    )


_REASON: Final = Attribute.ERROR_TYPE
_FAILED: Final = 'error_type!=""'

OVERVIEW: Final = Dashboard(
    name="overview",
    title="Octavo: overview",
    panels=(
        number("Requests/s", "reqps", rate(m.REQUESTS)),
        number("Failed", "percentunit", ratio(rate(m.REQUESTS, where=_FAILED), rate(m.REQUESTS))),
        number("First token, p99", "s", quantile(0.99, m.TIME_TO_FIRST_TOKEN)),
        number("Tokens/s", "ops", rate(m.GENERATED_TOKENS)),
        number("Waiting", "none", total(m.QUEUE_REQUESTS)),
        number("Replicas", "none", most(m.REPLICAS, MODEL, where='octavo_replica_state="ready"')),
        by("Requests by error", "reqps", m.REQUESTS, _REASON, "well"),
        spread("Time to first token", "s", m.TIME_TO_FIRST_TOKEN),
        spread("Time per output token", "s", m.TIME_PER_OUTPUT_TOKEN),
        spread("Request duration", "s", m.REQUEST_DURATION),
        by("Tokens of ended requests/s", "ops", m.TOKENS_USED, Attribute.TOKEN_TYPE),
        by("Choices by finish reason", "ops", m.FINISHED_CHOICES, Attribute.FINISH_REASON),
        by("Refused by reason", "reqps", m.REJECTIONS, _REASON),
        by("Deadlines missed by reason", "reqps", m.DEADLINE_MISSES, _REASON),
        by("Answers that went on elsewhere", "ops", m.RESUMES, _REASON),
        lines(
            "Mean time of a request by part",
            "s",
            (mean(m.QUEUE_DURATION), "queue"),
            (mean(m.PREFILL_DURATION), "prefill"),
            (mean(m.DECODE_DURATION), "decode"),
        ),
    ),
)

ROUTER: Final = Dashboard(
    name="router",
    title="Octavo: router",
    panels=(
        lines("Waiting requests", "none", (total(m.QUEUE_REQUESTS, MODEL), legend(MODEL))),
        lines("Waiting tokens", "short", (total(m.QUEUE_TOKENS, MODEL), legend(MODEL))),
        lines("Wait of the oldest", "s", (most(m.QUEUE_OLDEST, MODEL), legend(MODEL))),
        spread("Time in the queue", "s", m.QUEUE_DURATION),
        lines(
            "Requests and credit at replicas",
            "short",
            (total(m.REQUESTS_DISPATCHED), "requests there"),
            (total(m.CREDIT_TOKENS), "tokens that may go"),
        ),
        spread("Requests of a batch", "none", m.BATCH_REQUESTS),
        spread("Prompt tokens of a batch", "short", m.BATCH_TOKENS),
        by("Placements by what decided", "ops", m.PLACEMENTS, Attribute.RULE),
        lines(
            "Prompt tokens found at the chosen replica",
            "percentunit",
            (
                ratio(rate(m.PLACEMENT_MATCHED_TOKENS), rate(m.BATCH_TOKENS, suffix="_sum")),
                "of what was dispatched",
            ),
        ),
        lines(
            "Sessions and known blocks",
            "short",
            (total(m.SESSIONS), "sessions"),
            (total(m.INDEX_BLOCKS), "blocks of caches"),
        ),
        lines("Spans lost/s", "ops", (rate(m.SPANS_DROPPED, "process"), "{{process}}")),
        lines("Processes whose metrics were not there/s", "ops", (rate(m.SILENT_PROCESSES), "not there")),
    ),
)

ENGINE: Final = Dashboard(
    name="engine",
    title="Octavo: engine",
    panels=(
        spread("Step time", "s", m.STEP_DURATION),
        Panel(
            title="Time of steps by part",
            unit="percentunit",
            queries=(Query(rate(m.STEP_PHASE_SECONDS, Attribute.STEP_PHASE), legend(Attribute.STEP_PHASE)),),
            is_stacked=True,
        ),
        lines(
            "Tokens/s",
            "ops",
            (rate(m.PROMPT_TOKENS), "prompts"),
            (rate(m.GENERATED_TOKENS), "generated"),
            (rate(m.COMPUTED_TOKENS), "computed"),
        ),
        lines("Tokens of a step", "short", (f"{rate(m.COMPUTED_TOKENS)} / {rate(m.STEPS)}", "mean")),
        lines(
            "Sequences",
            "none",
            (total(m.ENGINE_RUNNING, "instance"), "running {{instance}}"),
            (total(m.ENGINE_WAITING, "instance"), "waiting {{instance}}"),
        ),
        lines("Prompt tokens owed", "short", (total(m.ENGINE_OWED_TOKENS, "instance"), "{{instance}}")),
        lines("KV blocks in use", "percentunit", (most(m.KV_USAGE, "instance"), "{{instance}}")),
        Panel(
            title="KV blocks by state",
            unit="short",
            queries=(Query(total(m.KV_BLOCKS, Attribute.BLOCK_STATE), legend(Attribute.BLOCK_STATE)),),
            is_stacked=True,
        ),
        lines(
            "Prompt tokens found in the cache",
            "percentunit",
            (ratio(rate(m.PREFIX_CACHE_HITS), rate(m.PREFIX_CACHE_QUERIES)), "hits"),
        ),
        lines(
            "Evictions and preemptions/s",
            "ops",
            (rate(m.PREFIX_CACHE_EVICTIONS), "cached blocks evicted"),
            (rate(m.PREEMPTIONS), "sequences preempted"),
        ),
        lines(
            "Tokens guessed ahead/s",
            "ops",
            (rate(m.DRAFTED_TOKENS), "guessed"),
            (rate(m.ACCEPTED_TOKENS), "right"),
        ),
    ),
)

SCALING: Final = Dashboard(
    name="scaling",
    title="Octavo: scaling",
    panels=(
        lines(
            "Replicas by state",
            "none",
            (most(m.REPLICAS, MODEL, Attribute.REPLICA_STATE), f"{legend(MODEL)} {legend(Attribute.REPLICA_STATE)}"),
        ),
        lines("Replicas that there shall be", "none", (most(m.REPLICAS_TARGET, MODEL), legend(MODEL))),
        lines(
            "Demand, running and waiting",
            "none",
            (most(m.SCALE_DEMAND, MODEL), f"demand {legend(MODEL)}"),
            (total(m.ENGINE_RUNNING, MODEL), f"running {legend(MODEL)}"),
            (total(m.QUEUE_REQUESTS, MODEL), f"waiting {legend(MODEL)}"),
        ),
        by("Changes/s", "ops", m.SCALE_DECISIONS, Attribute.SCALE_DIRECTION),
    ),
)

TENANTS: Final = Dashboard(
    name="tenants",
    title="Octavo: tenants",
    has_tenants=True,
    panels=(
        by("Requests/s", "reqps", m.TENANT_REQUESTS, Attribute.TENANT),
        lines(
            "Tokens/s",
            "ops",
            (
                rate(m.TENANT_TOKENS, Attribute.TENANT, Attribute.TOKEN_TYPE),
                f"{legend(Attribute.TENANT)} {legend(Attribute.TOKEN_TYPE)}",
            ),
        ),
        lines(
            "Time in the queue, p99",
            "s",
            (quantile(0.99, m.TENANT_QUEUE_DURATION, Attribute.TENANT), legend(Attribute.TENANT)),
        ),
        lines(
            "Failed requests/s",
            "reqps",
            (
                rate(m.TENANT_REQUESTS, Attribute.TENANT, _REASON, where=_FAILED),
                f"{legend(Attribute.TENANT)} {legend(_REASON)}",
            ),
        ),
    ),
)

DASHBOARDS: Final = (OVERVIEW, ROUTER, ENGINE, SCALING, TENANTS)
