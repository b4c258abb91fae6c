"""What a Ray of our own is started without: that the functions by which Ray starts it are where they are looked for."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

from cluster.lean_ray import _replace

LOOK = """
import json
from cluster.lean_ray import without_extras
from ray._private import parameter, services, utils

def look():
    params = parameter.RayParams()
    return [params.include_log_monitor, params.no_monitor, utils.get_dashboard_dependency_error() is not None]

with without_extras():
    inside = [*look(), services.start_api_server(False, True)]
print(json.dumps({"inside": inside, "after": look()}))
"""


def test_ray_starts_no_log_monitor_autoscaler_and_dashboard_for_the_scope() -> None:
    # In a process of its own: here something else may have loaded the dashboard's libraries.
    said = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=150, check=True)
    assert json.loads(said.stdout) == {"inside": [False, True, True, ["", None]], "after": [None, False, False]}


def test_a_ray_without_such_a_function_starts_as_ever() -> None:
    later = SimpleNamespace(other=1)
    _replace(later, "start_api_server", lambda _: None)()
    assert vars(later) == {"other": 1}
