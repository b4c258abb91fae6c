"""Connects this process to a Ray: one that runs already, or one of our own that ends with us.

Ray runs what its ports are sent. So a Ray of our own listens on loopback, but for one port that Serve opens in every
replica and binds to all addresses; and each start makes a token that all its processes know and callers must bring.
RAY_AUTH_MODE in the environment overrules the latter ("disabled" in tests: any local process may then use that Ray).
Commands that come later find that token where it is: in the environment of that Ray's processes, which the system shows
to their own user alone.
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
from dataclasses import dataclass
from pathlib import Path

from cluster.config_sections import RayConfig, is_loopback
from cluster.lean_ray import without_extras
from cluster.processes import await_end, descendants
from cluster.secret import NAMESPACE, SECRET_FILE, write_secret
from workers.errors import ConfigError, ModelFileError, StartupError

END_TIMEOUT_S = 10.0
MAX_TEMP_DIR = 40
CONNECT_TIMEOUT_S = 5.0
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name: with 0, Ray takes 127.0.0.1 for this node's address, and its servers bind that one only."""
_PROC = Path("/proc")
_GCS = "--gcs-address="
ADDRESS, AUTH_MODE, AUTH_TOKEN = "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
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


@dataclass(frozen=True, slots=True)
class Connection:
    """The Ray that this process is connected to."""

    address: str
    variables: Mapping[str, str]
    """What all its processes are known to have in their environment."""


@contextmanager
def connected(
    config: RayConfig, note: Callable[[str], None], variables: Mapping[str, str] = NO_VARIABLES
) -> Iterator[Connection]:
    """Be connected to the Ray that `config` says. Raises StartupError.

    All processes of a Ray of our own have `variables` in their environment, where ours does not say otherwise.
    """
    os.environ.setdefault(AUTO_CONNECT, "0")
    if config.address:
        with _attached(config.address) as connection:
            yield connection
        return
    with _temp_dir(config, note) as temp_dir, _own(config, temp_dir, variables) as connection:
        yield connection


@contextmanager
def _attached(address: str) -> Iterator[Connection]:
    rays = running_rays(_PROC)
    if address == "auto":
        address = _only_one(rays) or address
    if address != "auto":
        _look_for(address)
    found = os.environ.get(ADDRESS, "") if address == "auto" else address
    variables = rays.get(found.replace("localhost", "127.0.0.1")) or NO_VARIABLES
    os.environ.update(credentials(variables, os.environ))
    import ray

    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(f"no Ray answers at {address}: {error}") from error
    try:
        # A Ray on loopback has no other node, whose processes could have another environment.
        known = variables if is_loopback(found.rpartition(":")[0]) else NO_VARIABLES
        if SECRET_FILE in known:
            os.environ.setdefault(SECRET_FILE, known[SECRET_FILE])
        yield Connection(ray.get_runtime_context().gcs_address, known)
    finally:
        _disconnect()


def running_rays(proc: Path) -> dict[str, Mapping[str, str] | None]:
    """Return the addresses of the Rays that have a node on this machine, for all that `proc` tells, each with the
    environment of that node's processes, or None if it is another user's. Linux only."""
    found: dict[str, Mapping[str, str] | None] = {}
    for directory in proc.glob("[0-9]*"):
        with suppress(OSError):
            program, *arguments = (directory / "cmdline").read_text(errors="replace").split("\0")
            if Path(program).name == "raylet":
                for each in arguments:
                    if each.startswith(_GCS):
                        address = each.removeprefix(_GCS)
                        found[address] = found.get(address) or _environment_of(directory)
    return found


def _environment_of(process: Path) -> dict[str, str] | None:
    try:
        text = (process / "environ").read_text(errors="replace")
    except OSError:
        return None
    pairs = (each.partition("=") for each in text.split("\0") if "=" in each)
    return {name: value for name, _, value in pairs}


def _only_one(rays: Mapping[str, Mapping[str, str] | None]) -> str:
    """Return the Ray that "auto" means: this user's, or else the one that there is; "" leaves the search to Ray, as
    RAY_ADDRESS does. Raises StartupError.

    Ray's own search takes a loopback address for this node's outer one, and tries that for minutes.
    """
    if os.environ.get(ADDRESS):
        return ""
    addresses = sorted(address for address, environ in rays.items() if environ is not None) or sorted(rays)
    if len(addresses) > 1:
        raise StartupError(f"several Rays run here ({', '.join(addresses)}): name one, not auto")
    return "".join(addresses)


def credentials(theirs: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to `ours` so that a Ray whose processes have `theirs` answers this one; a token that somebody
    has given us already is left."""
    mode, token = theirs.get(AUTH_MODE, ""), theirs.get(AUTH_TOKEN, "")
    if mode == "token" and token and not ours.get(AUTH_TOKEN):
        return {AUTH_MODE: mode, AUTH_TOKEN: token}
    return {AUTH_MODE: mode} if mode and AUTH_MODE not in ours else {}


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
def _own(config: RayConfig, temp_dir: Path, variables: Mapping[str, str]) -> Iterator[Connection]:
    for name, value in _OWN_RAY.items():
        os.environ.setdefault(name, value)
    if AUTH_MODE not in os.environ:
        os.environ[AUTH_MODE] = "token"
        # In the environment of our own processes only: without it Ray would keep one in the user's home.
        os.environ[AUTH_TOKEN] = secrets.token_hex(32)
    import ray

    with _secret_file(temp_dir), _started(config, temp_dir, variables) as lent:
        yield Connection(ray.get_runtime_context().gcs_address, lent)


@contextmanager
def _secret_file(directory: Path) -> Iterator[None]:
    """Have the cluster's secret in a file of its own that all processes are told of, unless there is one already: an
    actor that keeps it would be a process more."""
    if os.environ.get(SECRET_FILE):
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "octavo-secret"
    write_secret(file)
    os.environ[SECRET_FILE] = str(file)
    try:
        yield
    finally:
        del os.environ[SECRET_FILE]
        file.unlink(missing_ok=True)


@contextmanager
def _started(config: RayConfig, temp_dir: Path, variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run a Ray for the scope; yields what its processes have in their environment."""
    import ray

    try:
        with _environment(variables), without_extras():
            lent = dict(os.environ)
            ray.init(
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=config.object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temp_dir),
            )
        yield lent
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
