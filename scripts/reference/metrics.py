"""docs/metrics.md: every metric, by its names in OpenTelemetry and Prometheus, with unit, attributes and alias."""

from __future__ import annotations

from octavo.metrics import CATALOGUE, Metric

from scripts.reference.markdown import code, codes, table

INTRODUCTION = """\
# Metrics

Every router, every replica and the scaling actor count for themselves. They serve what they have as Prometheus text
and, where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_METRICS_EXPORTER=otlp` says so, send it by OTLP. A router serves all
of a cluster's processes together at the address that `octavo serve` announces as `metrics`, with the labels `process`
(router, replica, signal) and `instance`. [telemetry.md](telemetry.md) says how to use them.

Attributes become labels with underscores for dots. *vLLM* is the name of the same thing there: with
`telemetry.vllm_aliases` it is served as well, with the label `model_name`. A counter of Prometheus ends in `_total`,
a histogram has `_bucket`, `_sum` and `_count`.
"""
GROUPS = {
    "router": "From routers",
    "replica": "From replicas",
    "scaling": "From the actor that decides on scaling",
    "every process": "From every process",
}


def page() -> str:
    return "\n".join([INTRODUCTION, *(_group(where, title) for where, title in GROUPS.items())])


def _group(where: str, title: str) -> str:
    heads = ("metric", "as Prometheus text", "kind", "unit", "attributes", "vLLM", "meaning")
    rows = [_row(metric) for metric in CATALOGUE if metric.where == where]
    return f"## {title}\n\n" + table(heads, rows)


def _row(metric: Metric) -> tuple[str, ...]:
    return (
        code(metric.name),
        code(metric.text_name),
        metric.kind.removeprefix("observable_"),
        code(metric.unit),
        codes(metric.attributes),
        code(metric.alias),
        f"{metric.about}.",
    )
