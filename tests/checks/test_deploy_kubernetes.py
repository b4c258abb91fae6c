"""deploy/kubernetes without a cluster: rendered by kustomize, held against Kubernetes' schemas and what KubeRay takes,
and read by Ray and by Octavo. deploy/README.md says what that leaves open."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import from_tree
from scripts.render_manifests import HEADER, KUBERNETES, OVERLAYS, digest, kustomize, render, rendered
from tests.checks import kuberay
from tests.checks.manifests import COMPONENT, PART_OF, Deployed, environment, ports_of, secret_at

ROOT = KUBERNETES.parents[1]
CORE_VERSIONS = ("1.31", "1.37")
GROUP_VERSION = "ray.io/v1"
CLIENTS = {"octavo/clients": "true"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}


@pytest.fixture(params=OVERLAYS)
def deployed(request: pytest.FixtureRequest) -> Deployed:
    return Deployed(request.param)


@pytest.fixture(scope="module")
def views() -> dict[str, Any]:
    """What Ray and the application read out of each overlay; ray_view.py says what that is."""
    command = [sys.executable, "-m", "tests.checks.ray_view", *(rendered(overlay) for overlay in OVERLAYS)]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=150, stdout=subprocess.PIPE, text=True)
    return dict(zip(OVERLAYS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_was_rendered_is_of_these_sources(overlay: str) -> None:
    header = rendered(overlay).read_text().splitlines(keepends=True)[0]
    assert header == HEADER.format(digest=digest(overlay)), "run scripts/render_manifests.py"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_that_again(overlay: str) -> None:
    fresh = render(overlay)
    if fresh is None:
        pytest.skip("kustomize: neither kustomize nor kubectl is on PATH")
    assert list(yaml.safe_load_all(fresh)) == list(yaml.safe_load_all(rendered(overlay).read_text()))


def test_kustomize_makes_the_secrets_of_files_beside_it(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES / "secrets", tmp_path / "secrets")
    for name in ("octavo.secret", "keys.json", "tls.crt", "tls.key"):
        (tmp_path / "secrets" / name).write_text(name)
    built = kustomize(tmp_path / "secrets")
    if built is None:
        pytest.skip("kustomize: neither kustomize nor kubectl is on PATH")
    secrets = {each["metadata"]["name"]: set(each["data"]) for each in yaml.safe_load_all(built)}
    assert secrets == {
        "octavo-secret": {"octavo.secret"},
        "octavo-keys": {"keys.json"},
        "octavo-router-tls": {"tls.crt", "tls.key"},
    }


@pytest.mark.parametrize("kubernetes", CORE_VERSIONS)
def test_kubernetes_takes_all_that_is_its_own(deployed: Deployed, kubernetes: str) -> None:
    """Pod templates too, which KubeRay hands on as they are."""
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="schemas: the package kubernetes-validate is not installed"
    )
    own = [each for each in deployed.objects if each["apiVersion"] != GROUP_VERSION]
    assert {each["kind"] for each in own} == {"Service", "PodDisruptionBudget", "NetworkPolicy"}
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": group}, "template": template}
        for group, template in deployed.templates.items()
    ]
    for each in own + templates:
        schemas.validate(each, kubernetes, strict=True)


def test_kuberay_takes_the_ray_service(deployed: Deployed) -> None:
    jsonschema.validate(deployed.service, kuberay.RAY_SERVICE)
    assert kuberay.complaints(deployed.service) == []
    assert deployed.cluster["rayVersion"] == version("ray")
    assert deployed.cluster["enableInTreeAutoscaling"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda service: service["metadata"].update(name="Octavo"), "no DNS label"),
        (lambda service: service["spec"]["rayClusterConfig"].update(rayVersion="2.9.0"), "2.52"),
        (lambda service: head(service)["spec"]["containers"][0].pop("ports"), "a port called serve"),
        (lambda service: head(service)["spec"].update(restartPolicy="Always"), "restartPolicy"),
        (lambda service: head(service)["spec"]["containers"][0].pop("resources"), "limits"),
        (lambda service: group(service).update(maxReplicas=0), "minReplicas > maxReplicas"),
        (lambda service: group(service).update(resources={"CPU": "1"}), "both"),
        (lambda service: group(service)["rayStartParams"].update(labels="a=b"), "labels"),
        (lambda service: group(service).update(groupName="cpu"), "one name"),
    ],
)
def test_what_kuberay_would_refuse_is_noticed(change: Any, complaint: str) -> None:
    service = yaml.safe_load(yaml.safe_dump(Deployed("cpu").service))
    change(service)
    assert any(complaint in said for said in kuberay.complaints(service))


def test_a_misspelt_field_is_noticed() -> None:
    service = yaml.safe_load(yaml.safe_dump(Deployed("cpu").service))
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscale"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscale"):
        jsonschema.validate(service, kuberay.RAY_SERVICE)


def head(service: Any) -> Any:
    return service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]


def group(service: Any) -> Any:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def test_every_deployment_fits_one_group_and_only_that_one(deployed: Deployed, views: dict[str, Any]) -> None:
    """As Ray's own autoscaler reads what pods of a group have, and the application what its processes want."""
    node_types, wanted = (views[deployed.overlay][each] for each in ("node_types", "deployments"))
    assert {name: places(request, node_types) for name, request in wanted.items()} == {
        "Router": {"routers": 1},
        "Worker": {deployed.overlay: 1},
    }
    config = from_tree(deployed.args)
    routers, workers = node_types["routers"], node_types[deployed.overlay]
    assert routers["min_workers"] == config.serve.num_routers < routers["max_workers"]
    assert workers["min_workers"] == config.scaling.min_replicas
    assert workers["max_workers"] >= 1.25 * config.scaling.max_replicas, (
        "a rollout starts a quarter before it stops any"
    )
    assert config.engine.threads <= workers["resources"]["CPU"]


def places(request: dict[str, float], node_types: dict[str, Any]) -> dict[str, int]:
    """Return how many times a request fits each group whose pods it fits."""
    fitting = {
        name: min(int(each["resources"].get(resource, 0) // amount) for resource, amount in request.items())
        for name, each in node_types.items()
    }
    return {name: times for name, times in fitting.items() if times}


def test_octavo_takes_the_application(deployed: Deployed) -> None:
    """from_tree also refuses a bind beyond loopback without TLS and proofs of identity. `ray_view` has Ray take it."""
    plain = yaml.safe_load((ROOT / "deploy/octavo.yaml").read_text())
    (application,) = plain.pop("applications")
    assert plain == {name: value for name, value in deployed.serve.items() if name != "applications"}
    for name in ("name", "route_prefix", "import_path"):
        assert deployed.application[name] == application[name]
    config = from_tree(deployed.args)
    assert not config.serve.insecure
    assert config.router.is_private


def test_the_router_serves_where_pods_services_and_policies_look(deployed: Deployed) -> None:
    config = from_tree(deployed.args)
    template = deployed.templates["routers"]
    assert ports_of(template) == {
        "grpc": config.serve.port,
        "grpc-health": config.router.health_port,
        "metrics": config.telemetry.metrics_port,
    }
    (container,) = template["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": config.router.health_port}
    service = deployed.named("Service", "octavo-routers")["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", False)
    assert deployed.selected(service["selector"]) == {"routers"}
    assert [(each["port"], each["targetPort"]) for each in service["ports"]] == [(config.serve.port, "grpc")]


def test_secrets_are_mounted_where_routers_and_nodes_read_them(deployed: Deployed) -> None:
    router = from_tree(deployed.args).router
    routers = deployed.templates["routers"]
    wanted = {secret_at(routers, path) for path in (router.tls_cert_file, router.tls_key_file, router.keys_file)}
    for template in deployed.templates.values():
        wanted.add(secret_at(template, environment(template)["OCTAVO_SECRET_FILE"]))
        assert all(each["secret"]["defaultMode"] == 0o440 for each in template["spec"]["volumes"])
        assert template["spec"]["securityContext"]["fsGroup"] == template["spec"]["securityContext"]["runAsGroup"]
    made = yaml.safe_load((KUBERNETES / "secrets/kustomization.yaml").read_text())
    assert made["generatorOptions"] == {"disableNameSuffixHash": True}
    assert wanted == {(each["name"], file) for each in made["secretGenerator"] for file in each["files"]}


def test_pods_run_confined_and_have_time_to_drain(deployed: Deployed) -> None:
    drain_s = from_tree(deployed.args).router.drain_grace_s
    for name, template in deployed.templates.items():
        spec = template["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["livenessProbe"].keys() & {"grpc", "httpGet"}, "KubeRay's own asks for Serve's proxy"
        assert container["readinessProbe"].keys() & {"grpc", "httpGet"}
        assert re.fullmatch(rf"octavo:{deployed.overlay}", container["image"])
        if name != "head":
            assert spec["automountServiceAccountToken"] is False
            *bash, script = container["lifecycle"]["preStop"]["exec"]["command"]
            assert bash == ["bash", "-c"]
            subprocess.run(["bash", "-n", "-c", script], check=True, timeout=60)
            (deadline,) = re.findall(r"--deadline-remaining-seconds (\d+)", script)
            assert 2 * drain_s < int(deadline) < spec["terminationGracePeriodSeconds"]


def test_evictions_take_one_router_and_one_replica_at_a_time(deployed: Deployed) -> None:
    budgets = {each["metadata"]["name"]: each["spec"] for each in deployed.of_kind("PodDisruptionBudget")}
    guarded = {name: deployed.selected(budget["selector"]) for name, budget in budgets.items()}
    assert guarded == {"octavo-routers": {"routers"}, "octavo-workers": {deployed.overlay}}
    assert all(budget["maxUnavailable"] == 1 for budget in budgets.values())


def test_only_the_public_port_is_open_and_only_to_clients(deployed: Deployed) -> None:
    inside = {PART_OF: "octavo", COMPONENT: "worker"}
    client = {"app": "shop"}
    reached = {
        (who, name): deployed.admitted(name, pod=pod, namespace=namespace)
        for name in deployed.templates
        for who, pod, namespace in [
            ("inside", inside, None),
            ("client", client, CLIENTS),
            ("operator", OPERATOR, {"kubernetes.io/metadata.name": "kuberay"}),
            ("prometheus", PROMETHEUS, {"kubernetes.io/metadata.name": "monitoring"}),
            ("neighbour", client, None),
            ("stranger", inside, {"kubernetes.io/metadata.name": "other"}),
        ]
    }
    open_ = {key: ports for key, ports in reached.items() if ports}
    everywhere = {("inside", name): {"*"} for name in deployed.templates}
    assert open_ == everywhere | {
        ("client", "routers"): {"grpc"},
        ("operator", "head"): {"dashboard"},
        ("prometheus", "routers"): {"metrics"},
    }
    assert {"grpc", "metrics"} <= ports_of(deployed.templates["routers"]).keys()
    assert {"dashboard"} <= ports_of(deployed.templates["head"]).keys()
