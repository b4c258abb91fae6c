"""A Ray that somebody else runs: started here, told to end by SIGTERM, and looked at before it does.

Run as a script. Prints a "ready" line with its address and that of its dashboard, and at its end one with the Serve
applications and the named actors that it has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from cluster.app import app
from workers.errors import ConfigError


def check_builder(path: str) -> None:
    """The file for `serve deploy` is one, and its builder takes its arguments and refuses others."""
    with open(path) as file:
        deployed = ServeDeploySchema.model_validate(yaml.safe_load(file))
    (application,) = deployed.applications
    assert application.import_path == "cluster.app:app"
    assert isinstance(app(application.args), serve.Application)
    with pytest.raises(ConfigError, match=r"replicas\.number"):
        app({"replicas": {"number": 2}})


def say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    stop = threading.Event()
    context = ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=int(sys.argv[2]),
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=f"{os.getcwd()}/r",
    )
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    check_builder(sys.argv[1])
    say(
        event="ready",
        address=ray.get_runtime_context().gcs_address,
        dashboard=f"http://{context.address_info['webui_url']}",
    )
    stop.wait()
    actors = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    say(event="end", nodes=len(ray.nodes()), applications=sorted(serve.status().applications), actors=actors)
    ray.shutdown()


if __name__ == "__main__":
    main()
