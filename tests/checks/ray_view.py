"""What Ray, and the application on it, read out of rendered overlays; run as a script, in a process of its own: Serve
warns while it is imported.

Prints JSON, for each path that it is given: `node_types` as Ray's autoscaler for KubeRay derives them, and
`deployments`, by name what each process of the application asks of a node, with what the Serve configuration says over
it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from cluster import app
from cluster.config import from_tree
from cluster.secret import SecretSource


def asked(options: dict[str, Any]) -> dict[str, float]:
    amounts = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")} | (options.get("resources") or {})
    return {name: amount for name, amount in amounts.items() if amount}


def deployments(serve: object) -> dict[str, dict[str, float]]:
    (application,) = ServeDeploySchema.model_validate(serve).applications
    assert application.import_path == "cluster.app:app"
    config = from_tree(application.args)
    router = app.build(config, cores=1, secret=SecretSource(), environ=None)._bound_deployment
    workers = router.init_kwargs["workers"].values()
    bound = [router, *(each._bound_deployment for each in workers)]
    options = {each.name: each.ray_actor_options for each in bound}
    for each in application.deployments:
        assert each.name in options, f"{each.name} is no deployment of the application"
        options[each.name] = each.ray_actor_options.model_dump(exclude_unset=True)
    return {name: asked(each) for name, each in options.items()}


def view(path: str) -> dict[str, Any]:
    with open(path) as file:
        (service,) = (each for each in yaml.safe_load_all(file) if each["kind"] == "RayService")
    custom_resource = {"metadata": {"name": "octavo", "namespace": "d"}, "spec": service["spec"]["rayClusterConfig"]}
    node_types = _derive_autoscaling_config_from_ray_cr(custom_resource)["available_node_types"]
    return {"node_types": node_types, "deployments": deployments(yaml.safe_load(service["spec"]["serveConfigV2"]))}


if __name__ == "__main__":
    json.dump([view(path) for path in sys.argv[1:]], sys.stdout)
