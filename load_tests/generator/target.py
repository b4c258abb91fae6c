"""Where the load goes: loopback, unless whoever starts it says that the target is theirs to load."""

from __future__ import annotations

import ipaddress

from load_tests.generator.fields import ScenarioError, require


def check_target(target: str, *, allows_remote: bool) -> None:
    """Raise ScenarioError for what is not HOST:PORT, or not on this machine unless `allows_remote`."""
    host, _, port = target.rpartition(":")
    require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, "target", "must be HOST:PORT", target)
    if allows_remote or host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ScenarioError(f"target must be a loopback address without --allow-remote, is {target!r}")
