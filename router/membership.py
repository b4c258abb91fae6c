"""Where Serve's routing thread says which replicas exist, and this process's router hears of it.

Serve makes the routing policy of a handle by itself, from a pickled copy of its class, so policy and router can only
meet in a place that both can name: this module, one a process. A group is a Serve deployment. Thread safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from router.types import ReplicaAddress

Members = tuple[ReplicaAddress, ...]

_lock = threading.Lock()
_members: dict[str, Members] = {}
_watchers: dict[str, list[Callable[[Members], object]]] = {}


def publish(group: str, members: Members) -> None:
    """Tell the watchers of `group` who is in it now, unless they know. Sets arrive in the order of these calls."""
    with _lock:
        if _members.get(group) == members:
            return
        _members[group] = members
        for watcher in _watchers.get(group, ()):
            watcher(members)


def members() -> Members:
    """Return the replicas of all groups."""
    with _lock:
        return tuple(member for group in _members.values() for member in group)


def watch(group: str, watcher: Callable[[Members], object]) -> None:
    """Call `watcher` with every new set, on the publisher's thread, and with the present one, if there is one, now.

    It must not block and must not call this module.
    """
    with _lock:
        _watchers.setdefault(group, []).append(watcher)
        if group in _members:
            watcher(_members[group])
