"""What KubeRay takes for a RayService, as far as deploy/ uses it: a JSON schema of ray.io/v1 as of KubeRay 1.6, and the
operator's own rules.

Written after the field reference of KubeRay and Ray's documentation of it, not copied from the custom resource
definition, which no package carries. It knows no field that deploy/ does not use, so that a misspelt one is refused.
Pod templates are left to Kubernetes' own schemas.
"""

from __future__ import annotations

import re
from typing import Any, Final

MAX_NAME: Final = 41
"""Characters: the operator appends to it for what it makes."""


def fields(required: tuple[str, ...] = (), **properties: object) -> dict[str, object]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD_TEMPLATE = fields(("spec",), metadata={"type": "object"}, spec={"type": "object"})
HEAD = fields(("template",), rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, template=POD_TEMPLATE)
GROUP = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName={"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=POD_TEMPLATE,
)
AUTOSCALER = fields(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    resources={"type": "object"},
    securityContext={"type": "object"},
)
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=AUTOSCALER,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": GROUP},
)
RAY_SERVICE = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata={"type": "object"},
    spec=fields(
        ("rayClusterConfig",),
        serveConfigV2=TEXT,
        rayClusterConfig=CLUSTER,
        excludeHeadPodFromServeSvc={"type": "boolean"},
        rayClusterDeletionDelaySeconds=COUNT,
        upgradeStrategy=fields(type={"enum": ["NewCluster", "None", "NewClusterWithIncrementalUpgrade"]}),
    ),
)


def complaints(service: dict[str, Any]) -> list[str]:
    """Return what the operator would say against a RayService whose fields are those of the schema."""
    name, cluster = service["metadata"]["name"], service["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]} | {each["groupName"]: each for each in cluster["workerGroupSpecs"]}
    said = []
    if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{MAX_NAME - 2}}}[a-z0-9])?", name):
        said.append(f"{name}: no DNS label of at most {MAX_NAME} characters")
    if len(groups) != 1 + len(cluster["workerGroupSpecs"]):
        said.append("two groups have one name")
    if cluster.get("authOptions", {}).get("mode") == "token" and version(cluster.get("rayVersion", "")) < (2, 52):
        said.append("token authentication needs rayVersion 2.52 or later")
    head_ports = {port.get("name") for port in containers(groups["head"])[0].get("ports", [])}
    if "serve" not in head_ports:
        said.append("head: the first container needs a port called serve")
    for group, spec in groups.items():
        said += [f"{group}: {what}" for what in _complaints_of_group(spec, is_v2=is_v2(cluster))]
    return said


def _complaints_of_group(spec: dict[str, Any], *, is_v2: bool) -> list[str]:
    said = []
    parameters = spec.get("rayStartParams", {})
    if spec.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        said.append("resources both in resources and in rayStartParams")
    if "labels" in parameters:
        said.append("rayStartParams.labels is not supported")
    if is_v2 and spec["template"]["spec"].get("restartPolicy", "Never") != "Never":
        said.append("restartPolicy must be Never with autoscaler v2")
    if spec.get("minReplicas", 0) > spec.get("maxReplicas", 0):
        said.append("minReplicas > maxReplicas")
    if not containers(spec)[0].get("resources", {}).get("limits"):
        said.append("limits of the first container say what Ray may count on, there are none")
    return said


def containers(group: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = group["template"]["spec"]["containers"]
    return found


def is_v2(cluster: dict[str, Any]) -> bool:
    return cluster.get("enableInTreeAutoscaling", False) and cluster["autoscalerOptions"].get("version") == "v2"


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
