"""What Ray Serve's controller asks for a number of replicas: policies that answer what `octavo-signal` has decided.

Serve makes a policy in its controller, from this module pickled by value, and calls it on the controller's event loop
in every turn, each 0.1 s: it never blocks and never raises. It asks the actor beside that loop, which answers if there
is something new or after a second, and says what it heard last; without a fresh answer it holds the number that there
is. Serve's own delays and bounds are set so that they change nothing. Knows nothing of demand.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from cluster.autoscaling import MAX_REPLICAS, ScalingConfig

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

ACTOR: Final = "octavo-signal"
"""Of the application called octavo; others' have the application's name behind it."""
NAMESPACE: Final = "octavo"
POLL_S: Final = 0.1
"""Between two questions at least."""
NODES_POLL_S: Final = 1.0
"""The same for the number of nodes, which is answered at once."""
ANSWER_S: Final = 3.0
"""How long an answer may take, and holds."""


def actor_name(app: str) -> str:
    """Return the name of the actor that decides for a Serve application."""
    return ACTOR if app == "octavo" else f"{ACTOR}-{app}"


def model_scaling(
    model: str,
    scaling: ScalingConfig,
    *,
    num_replicas: int,
    max_num_sequences: int,
    target: int | None = None,
    actor: str = ACTOR,
) -> AutoscalingConfig:
    """Return what the deployment of `model`, by the name that requests call it, is to be given as
    ``autoscaling_config``, whether its number of replicas is fixed or not: an operator may change it either way.

    `target`: how many it has been told to have already. A changed deployment begins with that number until the policy
    is heard, not with the one that is configured."""
    kwargs = {
        "actor": actor,
        "model": model,
        "scaling": dataclasses.asdict(scaling.of_replicas(num_replicas, max_num_sequences)),
    }
    return _config("cluster.policy:SignalPolicy", kwargs, initial=num_replicas if target is None else target)


def router_scaling(target: int | None = None, *, actor: str = ACTOR) -> AutoscalingConfig:
    """Return the same for routers of which each node shall have one."""
    return _config("cluster.policy:NodesPolicy", {"actor": actor}, initial=1 if target is None else target)


def _config(policy: str, kwargs: dict[str, Any], *, initial: int) -> AutoscalingConfig:
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    return AutoscalingConfig(
        min_replicas=0,
        max_replicas=MAX_REPLICAS,
        initial_replicas=initial,
        upscale_delay_s=0,
        downscale_delay_s=0,
        downscale_to_zero_delay_s=0,
        policy=AutoscalingPolicy(policy_function=policy, policy_kwargs=kwargs),
    )


class _AskingPolicy:
    """Asks the actor every `poll_s` at most, once at a time. Subclasses say what."""

    def __init__(self, poll_s: float, actor: str) -> None:
        self._poll_s = poll_s
        self._name = actor
        self._actor: Any = None
        self._task: asyncio.Task[None] | None = None
        self._asked_at = self._heard_at = float("-inf")
        self._answer: int | None = None
        self._is_silent = False

    def _ask(self, context: AutoscalingContext) -> Any:
        """Return the actor's answer to come: a number of replicas, or None for no opinion."""
        raise NotImplementedError

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there shall be, for Serve, and no state."""
        now = time.monotonic()
        try:
            if (self._task is None or self._task.done()) and now - self._asked_at >= self._poll_s:
                self._asked_at = now
                self._task = asyncio.get_running_loop().create_task(self._poll(context))
        except Exception as error:
            self._note(error)
        is_fresh = self._answer is not None and now - self._heard_at <= ANSWER_S
        return (self._answer if is_fresh and self._answer is not None else context.target_num_replicas), {}

    async def _poll(self, context: AutoscalingContext) -> None:
        import ray

        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(ray.get_actor, self._name, namespace=NAMESPACE)
            self._answer = await asyncio.wait_for(self._ask(context), ANSWER_S)
            self._heard_at = time.monotonic()
            self._is_silent = False
        except Exception as error:
            self._actor = None
            self._note(error)

    def _note(self, error: Exception) -> None:
        if not self._is_silent:
            self._is_silent = True
            logging.getLogger("ray.serve").warning(
                "the number of replicas is held: %s does not answer (%r)", self._name, error
            )


class SignalPolicy(_AskingPolicy):
    """For the replicas of one model. `scaling` is a `ScalingConfig` as a dict."""

    def __init__(self, *, model: str, scaling: dict[str, Any], actor: str = ACTOR) -> None:
        super().__init__(POLL_S, actor)
        self._model = model
        self._scaling = scaling

    def _ask(self, context: AutoscalingContext) -> Any:
        return self._actor.desired.remote(
            self._model, self._scaling, context.current_num_replicas, context.target_num_replicas
        )


class NodesPolicy(_AskingPolicy):
    """For routers: as many as there are nodes."""

    def __init__(self, *, actor: str = ACTOR) -> None:
        super().__init__(NODES_POLL_S, actor)

    def _ask(self, context: AutoscalingContext) -> Any:
        return self._actor.num_nodes.remote()
