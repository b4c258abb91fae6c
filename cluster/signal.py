"""The way to `octavo-signal`, the one detached actor (namespace ``octavo``) that decides how many replicas there are.

    routers ---reports--> octavo-signal <--asks-- policies in Serve's controller (cluster/policy.py)
    replicas --stages---> (cluster/signal_actor.py) <--overrides-- octavo scale

Requests do not wait for it: while it is gone, or restarts, they go on as before and the number of replicas stays.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from cluster.policy import ACTOR, NAMESPACE
from router.signal import Outlook, RouterReport
from workers.types import Boot

ANSWER_S = 2.0
"""How long a report waits for its answer."""


@dataclass(frozen=True, slots=True)
class SignalSource:
    """What routers, replicas and commands are given to reach the actor by. Picklable; Ray must be connected where it is
    used. `report` makes it a `SignalLine`."""

    actor: str = ACTOR
    namespace: str = NAMESPACE

    async def report(self, report: RouterReport) -> Outlook:
        """Hand a report in. Raises ConnectionError if nobody is there, TimeoutError if nobody answers."""
        import ray

        try:
            actor = await asyncio.to_thread(self.find)
            outlook: Outlook = await asyncio.wait_for(actor.report.remote(report), ANSWER_S)
        except (ValueError, ray.exceptions.RayError) as error:
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

    def _call(self, method: str, *arguments: object) -> Any:
        import ray

        try:
            return ray.get(getattr(self.find(), method).remote(*arguments), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{self.actor} has not answered within {ANSWER_S:g} s") from error
        except (ValueError, ray.exceptions.RayError) as error:
            raise ConnectionError(f"{self.actor} does not answer: {error}") from error


def ensure_signal(boot: Boot) -> SignalSource:
    """Return the way to the actor; makes it unless an earlier build did. Ray must be connected; nobody waits for it."""
    import ray

    from cluster.signal_actor import SignalActor

    ray.remote(SignalActor).options(
        name=ACTOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1_000,
    ).remote(boot)
    return SignalSource()
