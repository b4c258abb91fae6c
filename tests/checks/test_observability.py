"""deploy/observability: what Grafana, Prometheus and the collector are told names only what the cluster has.

Prometheus' own checks need `promtool` (Debian's package prometheus), Grafana's types the package
grafana-foundation-sdk; without them those tests are skipped by name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from octavo.metrics import CATALOGUE
from octavo.names import Attribute, Reason, Span

from load_tests.prometheus import panel_questions
from load_tests.rigs.telemetry_queries import series_names
from scripts.dashboards import __main__ as dashboards
from scripts.dashboards.panels import DASHBOARDS
from scripts.dashboards.queries import label
from scripts.render_manifests import kustomize
from tests.checks.manifests import picks, ports_of
from tests.checks.test_deploy_kubernetes import CORE_VERSIONS

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy/observability"
SERIES = frozenset(name for metric in CATALOGUE for name in series_names(metric, metric.text_name))
LABELS = {"process", "instance", "job", "le", "severity"} | {
    label(attribute) for metric in CATALOGUE for attribute in metric.attributes
}
NAME = re.compile(r"\b(?:octavo|gen_ai|vllm)[a-z_:0-9]*")


def load(name: str) -> Any:
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def rules(kind: str) -> dict[str, str]:
    """Return the expressions of alerts.yml, by what they record or alert of."""
    found = (rule for group in load("alerts.yml")["groups"] for rule in group["rules"])
    return {rule[kind]: rule["expr"] for rule in found if kind in rule}


def promtool(*arguments: str) -> str:
    """Return what promtool says; its complaint fails the test."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool: Prometheus is not installed (Debian's package prometheus)")
    done = subprocess.run(
        [found, *arguments], cwd=OBSERVABILITY, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dashboards_are_what_their_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboards.stale() == [], "run 'make docs'"
    monkeypatch.setattr(dashboards, "FOLDER", tmp_path)
    assert dashboards.main(["--check"]) == 1
    assert dashboards.main([]) == 0
    assert dashboards.main(["--check"]) == 0


def test_every_metric_has_a_panel() -> None:
    shown = set(NAME.findall(" ".join(each.expression for each in panel_questions())))
    unseen = [metric.name for metric in CATALOGUE if not shown & set(series_names(metric, metric.text_name))]
    assert unseen == []


def test_queries_name_only_metrics_and_labels_that_there_are() -> None:
    queries = [*(each.expression for each in panel_questions()), *rules("record").values(), *rules("alert").values()]
    named = {name for query in queries for name in NAME.findall(query.replace('job="octavo"', ""))}
    assert named - SERIES - LABELS - rules("record").keys() == set()
    assert len(named & SERIES) > 50


def test_panels_do_not_lie_over_each_other() -> None:
    for dashboard in DASHBOARDS:
        path = OBSERVABILITY / f"grafana/dashboards/{dashboard.name}.json"
        places = [panel["gridPos"] for panel in json.loads(path.read_text())["panels"]]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize(
    "path", sorted((OBSERVABILITY / "grafana/dashboards").glob("*.json")), ids=lambda path: path.stem
)
def test_grafana_knows_every_field(path: Path) -> None:
    """Read into Grafana's own types and written again, nothing is lost."""
    pytest.importorskip("grafana_foundation_sdk", reason="the package grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.models.dashboard import Dashboard

    given = json.loads(path.read_text())
    assert _lost(given, json.loads(json.dumps(Dashboard.from_json(given).to_json(), default=_plain)), "") == []


def test_a_field_that_grafana_does_not_know_is_noticed() -> None:
    types = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="the package grafana-foundation-sdk is not installed"
    )
    given = {"title": "", "panels": [{"type": "stat", "titel": ""}]}
    assert _lost(given, json.loads(json.dumps(types.Dashboard.from_json(given).to_json(), default=_plain)), "") != []


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else str(value)


def _lost(given: Any, kept: Any, path: str) -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [lost for key in given for lost in _lost(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [lost for a, b in zip(given, kept, strict=True) for lost in _lost(a, b, f"{path}[]")]
    return [] if given == kept else [f"{path}: {given!r} became {kept!r}"]


def test_prometheus_takes_its_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


def test_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tried() -> None:
    tried = {
        case["alertname"]
        for test in load("alerts_test.yml")["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tried == rules("alert").keys()


def test_prometheus_takes_every_panels_query(tmp_path: Path) -> None:
    as_rules = [{"record": f"panel:{number}", "expr": each.expression} for number, each in enumerate(panel_questions())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": as_rules}]}))
    promtool("check", "rules", str(path))


def test_rules_name_reasons_that_there_are() -> None:
    named = {
        reason for rule in rules("record").values() for reason in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|INTERNAL", rule)
    }
    assert "NO_REPLICA" in named
    assert named <= set(vars(Reason).values())


def test_the_collector_tells_kept_traces_by_what_spans_have() -> None:
    policies = load("kubernetes/collector.yaml")["processors"]["tail_sampling"]["policies"]
    text = json.dumps(policies)
    attributes = set(vars(Attribute).values())
    keys = set(re.findall(r'(?:"key": "|attributes\[\\")([^"\\]+)', text))
    assert keys <= attributes
    assert {Attribute.ERROR_TYPE, Attribute.ATTEMPT, Attribute.TIME_TO_FIRST_TOKEN} == keys
    assert set(re.findall(r'name == \\"([^"\\]+)', text)) <= set(vars(Span).values())
    (deadlines,) = (each["string_attribute"]["values"] for each in policies if each["name"] == "deadline-misses")
    assert set(deadlines) == {reason for reason in vars(Reason).values() if str(reason).startswith("DEADLINE")}


def test_the_collectors_pipelines_name_what_is_set_up() -> None:
    config = load("kubernetes/collector.yaml")
    for pipeline in config["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= config[part].keys()
    assert set(config["service"]["extensions"]) == config["extensions"].keys()


def test_the_collector_is_where_its_service_and_the_cluster_look() -> None:
    config = load("kubernetes/collector.yaml")
    deployment, service, policy = yaml.safe_load_all((OBSERVABILITY / "kubernetes/pods.yaml").read_text())
    template = deployment["spec"]["template"]
    listens = int(config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2])
    health = int(config["extensions"]["health_check"]["endpoint"].rpartition(":")[2])
    assert ports_of(template) == {"otlp": listens, "health": health}
    assert service["spec"]["ports"] == [{"name": "otlp", "port": listens, "targetPort": "otlp"}]
    for selector in (service["spec"]["selector"], policy["spec"]["podSelector"]):
        assert picks(selector, template["metadata"]["labels"])
    endpoint = f"http://{service['metadata']['name']}:{listens}"
    assert load("kubernetes/kustomization.yaml")["patches"][0]["patch"].count(endpoint) == 1


@pytest.mark.parametrize("kubernetes", CORE_VERSIONS)
def test_kubernetes_takes_the_collector(kubernetes: str) -> None:
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="schemas: the package kubernetes-validate is not installed"
    )
    for each in yaml.safe_load_all((OBSERVABILITY / "kubernetes/pods.yaml").read_text()):
        schemas.validate(each, kubernetes, strict=True)


def test_an_overlay_takes_the_collector_in(tmp_path: Path) -> None:
    deploy = shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    folder = deploy / "kubernetes/overlays/cpu"
    with (folder / "kustomization.yaml").open("a") as file:
        file.write("components: [../../../observability/kubernetes]\n")
    built = kustomize(folder)
    if built is None:
        pytest.skip("kustomize: neither kustomize nor kubectl is on PATH")
    objects = list(yaml.safe_load_all(built))
    assert sum(each["metadata"]["name"].startswith("octavo-collector") for each in objects) == 4
    (service,) = (each for each in objects if each["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        names = [each["name"] for each in group["template"]["spec"]["containers"][0]["env"]]
        assert names.count("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == 1
