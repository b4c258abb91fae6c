"""What kustomize rendered of deploy/kubernetes, and what its objects say of each other."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from scripts.render_manifests import rendered

PART_OF, COMPONENT = "app.kubernetes.io/part-of", "app.kubernetes.io/component"

Object = dict[str, Any]


@functools.cache
def objects(overlay: str) -> tuple[Object, ...]:
    return tuple(yaml.safe_load_all(rendered(overlay).read_text()))


class Deployed:
    """The objects of one overlay."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        self.objects = objects(overlay)
        (self.service,) = self.of_kind("RayService")
        self.cluster: Object = self.service["spec"]["rayClusterConfig"]
        self.serve: Object = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        (self.application,) = self.serve["applications"]
        self.args: Object = self.application["args"]

    def of_kind(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Object:
        (found,) = (each for each in self.of_kind(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def templates(self) -> dict[str, Object]:
        """Pod templates by group; `head` is the head's."""
        workers = {each["groupName"]: each["template"] for each in self.cluster["workerGroupSpecs"]}
        return {"head": self.cluster["headGroupSpec"]["template"]} | workers

    def selected(self, selector: Mapping[str, Any]) -> set[str]:
        """Return the groups whose pods a label selector (or a Service's plain one) picks."""
        return {group for group, each in self.templates.items() if picks(selector, each["metadata"]["labels"])}

    def admitted(self, group: str, *, pod: Mapping[str, str], namespace: Mapping[str, str] | None) -> set[str]:
        """Return the names of the ports of `group` that a pod with these labels may reach, "*" for all of them; its
        namespace is the cluster's own if None, else one with these labels."""
        ports: set[str] = set()
        for policy in self.of_kind("NetworkPolicy"):
            if group not in self.selected(policy["spec"]["podSelector"]):
                continue
            for rule in policy["spec"].get("ingress", []):
                if any(_is_peer(peer, pod, namespace) for peer in rule["from"]):
                    ports |= {str(port["port"]) for port in rule.get("ports", [{"port": "*"}])}
        return ports


def picks(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"} or "matchLabels" not in selector
    return selector.get("matchLabels", selector).items() <= labels.items()


def _is_peer(peer: Mapping[str, Any], pod: Mapping[str, str], namespace: Mapping[str, str] | None) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" not in peer:
        return namespace is None and picks(peer["podSelector"], pod)
    return picks(peer["namespaceSelector"], namespace or {}) and picks(peer.get("podSelector", {}), pod)


def ports_of(template: Object) -> dict[str, int]:
    """Return the ports that the first container of a pod names."""
    return {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", [])}


def secret_at(template: Object, path: str) -> tuple[str, str] | None:
    """Return the secret and the key in it that a pod finds at `path`, None if no volume has it."""
    spec = template["spec"]
    secrets = {each["name"]: each["secret"]["secretName"] for each in spec["volumes"]}
    for mount in spec["containers"][0]["volumeMounts"]:
        folder, _, key = path.rpartition("/")
        if mount["mountPath"] == folder:
            assert "subPath" not in mount, "what is mounted so is not renewed"
            assert mount["readOnly"]
            return secrets[mount["name"]], key
    return None


def environment(template: Object) -> dict[str, str]:
    entries: Iterable[Mapping[str, str]] = template["spec"]["containers"][0]["env"]
    return {each["name"]: each["value"] for each in entries}
