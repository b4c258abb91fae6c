"""A dashboard as Grafana's JSON. Pure; schema 39, which Grafana 10.2 and later read."""

from __future__ import annotations

from typing import Any, Final

from octavo.metrics import REPLICAS, TENANT_REQUESTS
from octavo.names import Attribute

from scripts.dashboards.panels import Dashboard, Panel
from scripts.dashboards.queries import label

SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
COLUMNS: Final = 24
NUMBER: Final = (4, 4)
LINES: Final = (8, 7)
"""Width and height of a panel, in Grafana's grid of 24 columns."""


def render(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"octavo-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["octavo"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "editable": True,
        "graphTooltip": 1,
        "links": [
            {
                "type": "dashboards",
                "title": "Octavo",
                "tags": ["octavo"],
                "asDropdown": True,
                "icon": "external link",
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {"list": _variables(dashboard)},
        "panels": _panels(dashboard),
    }


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}
    found = [source, _values("model", REPLICAS.text_name, Attribute.REQUEST_MODEL)]
    if dashboard.has_tenants:
        found.append(_values("tenant", TENANT_REQUESTS.text_name, Attribute.TENANT))
    return found


def _values(name: str, series: str, attribute: str) -> dict[str, Any]:
    """A variable whose choices are the values of a label."""
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values({series}, {label(attribute)})",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": "All", "value": "$__all"},
    }


def _panels(dashboard: Dashboard) -> list[dict[str, Any]]:
    """Lay panels out from left to right, in rows of one kind."""
    placed, x, y, row_height = [], 0, 0, 0
    for number, panel in enumerate(dashboard.panels, start=1):
        width, height = NUMBER if panel.is_number else LINES
        if x + width > COLUMNS or (row_height and height != row_height):
            x, y = 0, y + row_height
        placed.append({"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **_panel(panel)})
        x, row_height = x + width, height
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    custom = {"fillOpacity": 25 if panel.is_stacked else 0, "lineWidth": 1, "showPoints": "never"}
    if panel.is_stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, **({} if panel.is_number else {"custom": custom})}
    return {
        "type": "stat" if panel.is_number else "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _stat() if panel.is_number else _time_series(),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _stat() -> dict[str, Any]:
    calculation = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    return {"reduceOptions": calculation, "graphMode": "area", "colorMode": "value", "textMode": "auto"}


def _time_series() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
