"""PromQL over the catalogue of metrics: queries are made of metrics and attributes, so that they cannot name others."""

from __future__ import annotations

from octavo.metrics import Metric
from octavo.names import Attribute

RATE = "$__rate_interval"
MODEL = Attribute.REQUEST_MODEL


def label(attribute: str) -> str:
    """Return what an attribute is called in Prometheus."""
    return attribute.replace(".", "_")


def legend(attribute: str) -> str:
    return "{{" + label(attribute) + "}}"


def series(metric: Metric, *, suffix: str = "", where: str = "") -> str:
    """Return a selector of `metric`'s series: of the models that the dashboard's variable chooses."""
    matchers = [f'{label(MODEL)}=~"$model"'] if MODEL in metric.attributes else []
    if Attribute.TENANT in metric.attributes:
        matchers.append(f'{label(Attribute.TENANT)}=~"$tenant"')
    inside = ", ".join([*matchers, *([where] if where else [])])
    return f"{metric.text_name}{suffix}" + (f"{{{inside}}}" if inside else "")


def total(metric: Metric, *by: str, suffix: str = "", where: str = "") -> str:
    """The sum of a gauge."""
    return f"sum{_by(*by)}({series(metric, suffix=suffix, where=where)})"


def most(metric: Metric, *by: str, where: str = "") -> str:
    """The largest of a gauge: of what several routers say of the same thing, or of the replica that has most."""
    return f"max{_by(*by)}({series(metric, where=where)})"


def rate(metric: Metric, *by: str, suffix: str = "", where: str = "") -> str:
    """A second's increase of a counter."""
    return f"sum{_by(*by)}(rate({series(metric, suffix=suffix, where=where)}[{RATE}]))"


def mean(metric: Metric, *by: str) -> str:
    """What a histogram's values are on average."""
    return f"{rate(metric, *by, suffix='_sum')} / {rate(metric, *by, suffix='_count')}"


def quantile(share: float, metric: Metric, *by: str) -> str:
    """The value of a histogram below which `share` of all are."""
    return f"histogram_quantile({share:g}, {rate(metric, 'le', *by, suffix='_bucket')})"


def ratio(part: str, whole: str) -> str:
    """A share, 0 where there is no part."""
    return f"({part} or vector(0)) / {whole}"


def _by(*attributes: str) -> str:
    return f" by ({', '.join(map(label, attributes))}) " if attributes else ""
