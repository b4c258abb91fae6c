"""Has Ray start without what serves nobody in a Ray of our own.

Besides what runs actors, ray.init starts
    a log monitor           which sends what processes print to drivers that want it; ours does not
    an autoscaler's monitor although there is no kind of node to add
    a dashboard             without pages, for usage statistics, which are off
    a node's agent          with an HTTP server for that dashboard
`ray start` has options for the first two, ray.init has none for any. So they are taken out of the functions by which it
starts them, which are private to Ray, and the agent is started as with a Ray that was installed without the dashboard's
libraries. Where a later Ray has no such functions, what they start is started.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_DASHBOARD_LIBRARIES = "ray.dashboard.optional_deps"


@contextmanager
def without_extras() -> Iterator[None]:
    """For the scope, have ray.init start nothing that is not needed."""
    from ray._private import parameter, services

    undo = [
        _replace(
            parameter, "RayParams", lambda kind: functools.partial(kind, include_log_monitor=False, no_monitor=True)
        ),
        _replace(services, "start_api_server", lambda _: _no_dashboard),
        _hide(_DASHBOARD_LIBRARIES),
    ]
    try:
        yield
    finally:
        for each in undo:
            each()


def _no_dashboard(*_: Any, **__: Any) -> tuple[str, None]:
    """Return the URL of no dashboard, and its process."""
    return "", None


def _replace(module: Any, name: str, instead: Callable[[Any], Any]) -> Callable[[], None]:
    """Put something in the place of what has a name, if it is there; return how to put it back."""
    if not hasattr(module, name):
        return lambda: None
    original = getattr(module, name)
    setattr(module, name, instead(original))
    return lambda: setattr(module, name, original)


def _hide(module: str) -> Callable[[], None]:
    """Have the import of a module fail; return how to have it succeed again. One that is loaded stays so."""
    if module in sys.modules:
        return lambda: None
    sys.modules[module] = None  # type: ignore[assignment]  # what Python takes for "there is none"

    def undo() -> None:
        del sys.modules[module]

    return undo
