"""The numbers of a report, by the names that thresholds use; each is a number, or None where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from load_tests.generator.histogram import Histogram
from load_tests.generator.tally import Tally

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
TIMES = {
    "first_token_s": "from the scheduled arrival to the first token",
    "per_token_s": "between tokens, the mean of each answer",
    "gap_s": "between two arrivals of one answer",
    "total_s": "from the scheduled arrival to the end",
    "age_s": "of a token at the client, since the engine made it",
    "lag_s": "by which the generator was late to send",
    "queue_s": "in the router's queue, by its own accounts",
}
COUNTS = {
    "sent": "requests sent",
    "ok": "answered to the end",
    "cancelled": "cancelled by the scenario",
    "refused": "refused as they had to be",
    "errors": "ended in another way",
    "error_share": "of all",
    "late": "answered after their deadline",
    "good": "answered within the SLO",
    "good_share": "of all but cancelled and refused",
    "offered_per_s": "requests offered a second",
    "requests_per_s": "answered to the end, a second",
    "goodput_per_s": "answered within the SLO, a second",
    "tokens_per_s": "output tokens a second",
    "tokens": "output tokens",
    "cached_share": "of prompt tokens, found in a replica's cache",
    "computed_prompt_tokens": "prompt tokens that were computed",
    "balance": "most loaded replica over the mean, in computed tokens",
    "duration_s": "from the beginning to the last end",
    "generator_cpu_us_per_token": "µs of the generator's CPU",
    "generator_cpu_us_per_request": "the same",
    "generator_cpu_share": "of one core, busiest process",
}
FIGURES = (*COUNTS, *(f"{time}.{point}" for time in TIMES for point in (*PERCENTILES, "mean", "max")))


def compute_figures(
    tally: Tally, *, arrivals_s: float, cpu_s: Sequence[float], replicas: Sequence[str]
) -> dict[str, float | None]:
    """Return all of `FIGURES`. `cpu_s` is what each process of the generator used; `replicas` are all that there were,
    so that those without a request count in the balance."""
    every, duration = tally.all, max(tally.last_end_s, 1e-9)
    judged = every.sent - every.cancelled - every.refused
    loads = dict.fromkeys(replicas, 0) | {name: share.load for name, share in tally.replicas.items()}
    figures: dict[str, float | None] = {
        "sent": every.sent,
        "ok": every.ok,
        "cancelled": every.cancelled,
        "refused": every.refused,
        "errors": every.failed,
        "error_share": _share(every.failed, every.sent),
        "late": tally.late,
        "good": every.good,
        "good_share": _share(every.good, judged),
        "offered_per_s": every.sent / min(arrivals_s, duration),
        "requests_per_s": every.ok / duration,
        "goodput_per_s": every.good / duration,
        "tokens_per_s": every.tokens / duration,
        "tokens": every.tokens,
        "cached_share": _share(tally.cached_tokens, tally.prompt_tokens),
        "computed_prompt_tokens": tally.prompt_tokens - tally.cached_tokens,
        "balance": _balance(loads),
        "duration_s": tally.last_end_s,
        "generator_cpu_us_per_token": _share(1e6 * sum(cpu_s), every.tokens),
        "generator_cpu_us_per_request": _share(1e6 * sum(cpu_s), every.sent),
        "generator_cpu_share": max(cpu_s, default=0.0) / duration,
    }
    histograms = (every.first_token, tally.per_token, tally.gap, every.total, tally.age, tally.lag, tally.queue)
    for name, histogram in zip(TIMES, histograms, strict=True):
        figures |= _points(name, histogram)
    return figures


def _points(name: str, histogram: Histogram) -> dict[str, float | None]:
    points = {f"{name}.{point}": histogram.percentile(share) for point, share in PERCENTILES.items()}
    return {**points, f"{name}.mean": histogram.mean, f"{name}.max": histogram.max if histogram.count else None}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _balance(loads: Mapping[str, int]) -> float | None:
    total = sum(loads.values())
    return max(loads.values()) * len(loads) / total if total else None
