"""Connects this process to a Ray: one that runs already, or one of our own that ends with us.

Ray runs what its ports are sent. So a Ray of our own listens on loopback, but for one port that Serve opens in every
replica and binds to all addresses; and each start makes a token that all its processes know and callers must bring.
RAY_AUTH_MODE in the environment overrules the latter ("disabled" in tests: any local process may then use that Ray).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.config import RayConfig, is_loopback
from cluster.processes import await_end, descendants
from cluster.secret import NAMESPACE
from workers.errors import ConfigError, ModelFileError, StartupError

END_TIMEOUT_S = 10.0
MAX_TEMP_DIR = 40
CONNECT_TIMEOUT_S = 5.0
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name: with 0, Ray takes 127.0.0.1 for this node's address, and its servers bind that one only."""
_PROC = Path("/proc")
_GCS = "--gcs-address="
AUTO_CONNECT = "RAY_ENABLE_AUTO_CONNECT"
"""With 0, a call that comes after the end, as from a thread that a hurried stop left behind, starts no new Ray."""
_OWN_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    ON_LOOPBACK: "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
}
"""Ray would run replicas at niceness 15, behind everything else on a laptop, and look ten times a second at a cluster
of one node on which nothing changes."""

NO_VARIABLES: Mapping[str, str] = {}


@contextmanager
def connected(
    config: RayConfig, note: Callable[[str], None], variables: Mapping[str, str] = NO_VARIABLES
) -> Iterator[str]:
    """Be connected to the Ray that `config` says; yields its address. Raises StartupError.

    All processes of a Ray of our own have `variables` in their environment, where ours does not say otherwise.
    """
    os.environ.setdefault(AUTO_CONNECT, "0")
    if config.address:
        with _attached(config.address) as address:
            yield address
        return
    with _temp_dir(config, note) as temp_dir, _own(config, temp_dir, variables) as address:
        yield address


@contextmanager
def _attached(address: str) -> Iterator[str]:
    if address == "auto":
        address = _only_one(running_rays(_PROC)) or address
    if address != "auto":
        _look_for(address)
    import ray

    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(f"no Ray answers at {address}: {error}") from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        _disconnect()


def running_rays(proc: Path) -> set[str]:
    """Return the addresses of the Rays that have a node on this machine, for all that `proc` tells; Linux only."""
    found = set()
    for directory in proc.glob("[0-9]*"):
        with suppress(OSError):
            program, *arguments = (directory / "cmdline").read_text(errors="replace").split("\0")
            if Path(program).name == "raylet":
                found |= {each.removeprefix(_GCS) for each in arguments if each.startswith(_GCS)}
    return found


def _only_one(addresses: set[str]) -> str:
    """Return the Ray that "auto" means; "" leaves the search to Ray, as RAY_ADDRESS does. Raises StartupError.

    Ray's own search takes a loopback address for this node's outer one, and tries that for minutes.
    """
    if os.environ.get("RAY_ADDRESS"):
        return ""
    if len(addresses) > 1:
        raise StartupError(f"several Rays run here ({', '.join(sorted(addresses))}): name one, not auto")
    return "".join(addresses)


def _look_for(address: str) -> None:
    """Raise StartupError unless something listens there: Ray itself would try for minutes.

    Ray takes a loopback address for this node's outer one, which is right unless that Ray is on loopback alone.
    """
    host, _, port = address.rpartition(":")
    try:
        _connect(host, int(port))
    except OSError as error:
        raise StartupError(f"no Ray answers at {address}: {error}") from error
    if is_loopback(host):
        try:
            _connect(_outer_address(), int(port))
        except OSError:
            os.environ.setdefault(ON_LOOPBACK, "0")


def _connect(host: str, port: int) -> None:
    socket.create_connection((host.strip("[]"), port), timeout=CONNECT_TIMEOUT_S).close()


def _outer_address() -> str:
    """Return this machine's address on the way to the rest of the world. Raises OSError if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # sends nothing; an address that nobody has
        address: str = sock.getsockname()[0]
    return address


@contextmanager
def _own(config: RayConfig, temp_dir: Path, variables: Mapping[str, str]) -> Iterator[str]:
    for name, value in _OWN_RAY.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        # In the environment of our own processes only: without it Ray would keep one in the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    try:
        with _environment(variables):
            ray.init(
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=config.object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temp_dir),
            )
        yield ray.get_runtime_context().gcs_address
    finally:
        processes = descendants(os.getpid())
        _disconnect()
        await_end(processes, END_TIMEOUT_S)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have `variables` in the environment for the scope, but for those that it has already: processes that are started
    keep them, this one does not."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _disconnect() -> None:
    """Leave Ray, which puts SIGTERM back to its default underneath Python.

    One that comes in this very moment ends the process with -15; our application is gone by then.
    """
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _temp_dir(config: RayConfig, note: Callable[[str], None]) -> Iterator[Path]:
    """Yield a directory for a Ray of our own; a new one is removed unless it may tell what went wrong."""
    if config.temp_dir:
        yield Path(config.temp_dir).absolute()
        return
    parent = tempfile.gettempdir()
    directory = Path(tempfile.mkdtemp(prefix="octavo-", dir=parent if len(parent) < MAX_TEMP_DIR // 2 else "/tmp"))
    keep = False
    try:
        yield directory
    except (ConfigError, ModelFileError):
        raise
    except Exception:
        keep = True
        note(f"Ray's logs are in {directory}")
        raise
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
