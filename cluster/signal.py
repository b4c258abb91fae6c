"""The way to `octavo-signal`, the detached actor (namespace ``octavo``) that decides how many replicas there are.

    routers ---reports--> octavo-signal <--asks-- policies in Serve's controller (cluster/policy.py)
    replicas --stages---> (cluster/signal_actor.py) <--overrides-- octavo scale

Requests do not wait for it: while it is gone, or restarts, they go on as before and the number of replicas stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.policy import ACTOR, NAMESPACE, actor_name
from cluster.secret import ON_HEAD
from cluster.signal_board import StartProgress
from router.signal import Outlook, RouterReport
from workers.types import Boot

ANSWER_S = 2.0
"""How long a call waits for its answer."""

_log = logging.getLogger(__name__)
_handles: dict[SignalSource, Any] = {}
"""Of this process, so that a report costs one call and not two."""


@dataclass(frozen=True, slots=True)
class SignalSource:
    """What routers and commands are given to reach the actor by. Picklable; Ray must be connected where it is used.
    Implements `SignalLine`."""

    actor: str = ACTOR
    namespace: str = NAMESPACE

    async def report(self, report: RouterReport) -> Outlook:
        """Hand a report in. Raises ConnectionError if nobody is there, TimeoutError if nobody answers."""
        import ray

        try:
            if self not in _handles:
                _handles[self] = await asyncio.to_thread(self.find)
            outlook: Outlook = await asyncio.wait_for(_handles[self].report.remote(report), ANSWER_S)
        except (ValueError, ray.exceptions.RayError) as error:
            _handles.pop(self, None)
            raise ConnectionError(f"{self.actor} does not answer: {error}") from error
        return outlook

    def find(self) -> Any:
        """Return the actor's handle. Blocks. Raises ValueError if there is none."""
        import ray

        return ray.get_actor(self.actor, namespace=self.namespace)

    def scale(self, model: str, num_replicas: int | None) -> None:
        """Have `num_replicas` of `model`, whatever the load is; None: let the load decide again. Blocks. Raises
        ConnectionError or TimeoutError."""
        self._call("scale", model, num_replicas)

    def view(self) -> Outlook:
        """Return what has been decided, and all routers' last reports. Blocks. Raises ConnectionError or
        TimeoutError."""
        outlook: Outlook = self._call("view")
        return outlook

    def end(self) -> None:
        """End the actor, if there is one: its application is gone. Blocks."""
        import ray

        with contextlib.suppress(ValueError):
            ray.kill(self.find())

    def _call(self, method: str, *arguments: object) -> Any:
        import ray

        try:
            return ray.get(getattr(self.find(), method).remote(*arguments), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{self.actor} has not answered within {ANSWER_S:g} s") from error
        except (ValueError, ray.exceptions.RayError) as error:
            raise ConnectionError(f"{self.actor} does not answer: {error}") from error


@dataclass(frozen=True, slots=True)
class StartTeller:
    """Tells the actor how far a replica of `model` has come. Implements `workers.start.Progress`."""

    model: str
    source: SignalSource = SignalSource()

    def __call__(self, replica_id: str, stage: str, *, age_s: float, detail: str) -> None:
        import ray

        try:
            progress = StartProgress(
                model=self.model,
                replica_id=replica_id,
                stage=stage,
                age_s=age_s,
                node_id=ray.get_runtime_context().get_node_id(),
                pid=os.getpid(),
                detail=detail,
            )
            self.source.find().progress.remote(progress)
        except (ValueError, ray.exceptions.RayError) as error:
            _log.info("nobody hears that %s is %s: %s", replica_id, stage, error)


def ensure_signal(boot: Boot, app: str, environ: Mapping[str, str] | None = None) -> SignalSource:
    """Return the way to the actor that decides for a Serve application; makes it unless an earlier build did. Ray must
    be connected; nobody waits for it.

    `environ` as in `cluster.app.build`.
    """
    import ray

    from cluster.boot import forwarded
    from cluster.signal_actor import SignalActor

    environment = {} if environ is None else {"runtime_env": {"env_vars": forwarded(environ)}}
    source = SignalSource(actor_name(app))
    ray.remote(SignalActor).options(
        name=source.actor,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources=ON_HEAD,
        max_restarts=-1,
        max_concurrency=1_000,
        **environment,
    ).remote(boot)
    return source
