"""A Ray of several nodes on this machine, whose autoscaler starts and ends nodes as it would machines.

    with FakeNodes(cpus=1, max_nodes=3) as nodes:
        octavo serve --ray-address {nodes.address} ...

Ray's own fake provider does it (`autoscaler`: v1, or v2, which KubeRay uses): each node is a raylet with its agents,
all on loopback and one file system. There is one node, the head, until somebody asks for what does not fit it. The port
and the temporary directory are this Ray's alone; callers need no token. Whoever attaches leaves before the end.

Every process carries a mark in its environment, which Ray hands down: by it nodes are found and, at the end, what is
left of any of them is killed. Nobody else's Ray is looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from load_tests.process_tree import Process, await_end, tree
from load_tests.server import ServerProcess, free_port

HEAD: Final = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The head's node id, as Ray's provider expects it."""
ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: servers bind loopback
}
"""What a process that attaches needs, too."""
AUTOSCALERS: Final = ("v1", "v2")
START_S, LEFT_S = 120.0, 5.0
_MARK = "OF_FAKE_NODES"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_PROC = Path("/proc")


class FakeNodes:
    """Starts when entered, and is over when left. `cpus`: of each node, for Ray's books alone; `max_nodes`: with the
    head; `idle_s`: how long a node has nothing before it is ended; `lost_s`: how long one says nothing before it
    counts as gone for the autoscaler."""

    def __init__(
        self, *, cpus: int = 1, max_nodes: int = 3, idle_s: float = 6.0, lost_s: int = 5, autoscaler: str = "v1"
    ) -> None:
        assert autoscaler in AUTOSCALERS
        self._cpus = cpus
        self._max_workers = max_nodes - 1
        self._idle_s = idle_s
        self._lost_s = lost_s
        self._is_v2 = autoscaler == "v2"
        self._mark = uuid.uuid4().hex
        self._process: ServerProcess | None = None
        self.port = 0
        self.directory = Path()

    @property
    def address(self) -> str:
        """What to attach to."""
        return f"127.0.0.1:{self.port}"

    def nodes(self) -> dict[str, int]:
        """Return the pids of the nodes that there are, each a raylet's, by the node's id."""
        found = {}
        for process in self.processes():
            program, *arguments = _command(process.pid)
            if Path(program).name == "raylet":
                ids = [each.partition("=")[2] for each in arguments if each.startswith("--node_id=")]
                found |= dict.fromkeys(ids, process.pid)
        return found

    def lose(self, node_id: str) -> None:
        """Kill a node and all that runs on it at once, as when its machine loses power. Raises KeyError."""
        for process in reversed(tree(self.nodes()[node_id])):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def processes(self) -> list[Process]:
        """Return all of this Ray, those of replicas and routers too."""
        mark = f"{_MARK}={self._mark}".encode()
        marked = []
        for directory in _PROC.glob("[0-9]*"):
            with suppress(OSError):
                if mark in (directory / "environ").read_bytes():
                    marked += tree(int(directory.name))[:1]
        return marked

    def __enter__(self) -> Self:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="oct", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process. Idempotent."""
        if self._process is not None:
            self._process.stop()  # with all that it started: titles of some have taken the place of their marks
        left = self.processes()  # what has another parent by now
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        await_end(left, LEFT_S)
        await_end(self.processes(), 0.0)  # what those had started meanwhile
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        """Raises ServerError."""
        configuration = self.directory / "autoscaler.json"
        configuration.write_text(json.dumps(self._configuration()))
        variables = ENVIRONMENT | {
            _MARK: self._mark,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_HEARTBEAT_TIMEOUT_S": str(self._lost_s),
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        if self._is_v2:
            variables |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD}
        ray = str(Path(sys.executable).with_name("ray"))
        command = (ray, "start", "--head", "--block", *self._options(configuration))
        self._process = ServerProcess(command, variables, self.directory / "log")
        self._process.await_text("Ray runtime started", START_S)

    def _options(self, configuration: Path) -> list[str]:
        options = {
            "port": self.port,
            "node-ip-address": "127.0.0.1",
            "temp-dir": self.directory / "r",
            "num-cpus": self._cpus,
            "autoscaling-config": configuration,
            "include-dashboard": False,
            "include-log-monitor": False,
            "object-store-memory": 80 * 1024 * 1024,
            # The usual ones are one Ray's of a machine, and this may not be the only one.
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": 0,
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        return [f"--{name}={value}" for name, value in options.items()]

    def _configuration(self) -> dict[str, Any]:
        """Return what the autoscaler reads: a cluster of the head and of nodes like it, one kind."""
        provider = {
            "type": "fake_multinode",
            "gcs_address": self.address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        if self._is_v2:
            # By its own name v2 looks for an example file that Ray's wheel does not have.
            provider |= {"type": "external", "module": _PROVIDER, "launch_multiple": True, "head_node_id": HEAD}
        worker = {
            "resources": {"CPU": self._cpus, "object_store_memory": 80 * 1024 * 1024},
            "node_config": {},
            "min_workers": 0,
            "max_workers": self._max_workers,
        }
        head = {"resources": {"CPU": self._cpus}, "node_config": {}, "max_workers": 0}
        empty_lists = (
            "initialization_commands",
            "setup_commands",
            "head_setup_commands",
            "worker_setup_commands",
            "head_start_ray_commands",
            "worker_start_ray_commands",
            "cluster_synced_files",
            "rsync_exclude",
            "rsync_filter",
        )
        return {
            "cluster_name": "fake_multinode",
            "max_workers": self._max_workers,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": self._idle_s / 60,
            "provider": provider,
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, "worker": worker},
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in empty_lists},
        }


def _command(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]
