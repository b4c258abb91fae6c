"""When a deployment counts as ready or failed, by what Serve's controller says of it: no cluster."""

from __future__ import annotations

import time
import warnings

import pytest

from cluster.config import ClusterConfig
from cluster.serve_view import DEPLOYING, FAILED, RUNNING, ApplicationView, DeploymentView
from workers.errors import StartupError

with warnings.catch_warnings(action="ignore"):  # Ray's own, when it is imported
    from cluster.app import ROUTER
    from cluster.deployment import STALE_S, Deployment

OLD, NEW = "workers.errors.StartupError: no such file", "workers.errors.StartupError: no memory"


def view(status: str, message: str, *, target: int = 1) -> ApplicationView:
    """One whose only worker says `message`."""
    router = DeploymentView("HEALTHY", "", 1, ())
    worker = DeploymentView("UNHEALTHY" if message else "HEALTHY", message, target, ())
    return ApplicationView(status, "", {ROUTER: router, "Worker": worker})


def deployed(before: ApplicationView | None, *, ago_s: float) -> Deployment:
    deployment = Deployment(ClusterConfig(), {})
    deployment._before = before
    deployment._deployed_at = time.monotonic() - ago_s
    return deployment


def test_a_former_failure_is_none_of_a_change_that_has_just_begun() -> None:
    """The controller had begun the change and had yet to take back what it said of the former one: a change that mended
    a model that did not start was reported as failed."""
    changed = deployed(view(FAILED, OLD), ago_s=0.0)
    assert not changed._is_settled(view(FAILED, OLD))
    assert not changed._is_settled(view(DEPLOYING, OLD, target=2))
    assert changed._is_settled(view(RUNNING, ""))


def test_a_new_failure_is_reported_at_once() -> None:
    for before in (view(FAILED, OLD), view(RUNNING, ""), None):
        with pytest.raises(StartupError, match="no memory"):
            deployed(before, ago_s=0.0)._is_settled(view(DEPLOYING, NEW, target=2))


def test_a_failure_that_stays_is_one_of_the_change_too() -> None:
    with pytest.raises(StartupError, match="no such file"):
        deployed(view(FAILED, OLD), ago_s=STALE_S)._is_settled(view(FAILED, OLD))
