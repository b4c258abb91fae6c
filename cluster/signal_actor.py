"""The process of `octavo-signal`: a `SignalBoard` behind a Ray actor, and a span and metrics for each change.

Everything runs on the actor's one event loop. Decisions are made when reports come, and policies hear of them at once:
each of them has one question open, and asks again once a second. A change of a target is a span `octavo.scale` of its
own trace, a count and a gauge, with the reason, and a line of the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import Any, Final

from octavo.metrics import REPLICAS_TARGET, SCALE_DECISIONS, SCALE_DEMAND
from octavo.names import Attribute, Span
from opentelemetry import metrics, trace

from cluster.autoscaling import ScalingConfig
from cluster.signal_board import SignalBoard, StartProgress, TargetChange
from router.signal import Outlook, RouterReport
from workers.types import Boot

HOLD_S: Final = 1.0
"""How long a policy waits for an answer that is no other than the one before."""
DIRECTIONS: Final = ("down", "up")
NODES_PERIOD_S: Final = 1.0
"""How old a count of the nodes may be."""

_log = logging.getLogger(__name__)


class SignalActor:
    """The actor's class."""

    def __init__(self, boot: Boot) -> None:
        self._process = boot.start_process("signal")
        self._node_id = _node_id()
        self._epoch = time.time() - time.monotonic()
        self._board = SignalBoard(self._now())
        meter = metrics.get_meter("octavo.cluster")
        self._target = REPLICAS_TARGET.create(meter)
        self._demand = SCALE_DEMAND.create(meter)
        self._changes = SCALE_DECISIONS.create(meter)
        self._tracer = trace.get_tracer("octavo.cluster")
        self._news = asyncio.Event()
        self._num_nodes: int | None = None
        self._counted_at = float("-inf")

    async def report(self, report: RouterReport) -> Outlook:
        outlook = self._board.report(report, self._now())
        self._has_news()
        return self._signed(outlook)

    async def desired(self, model: str, scaling: dict[str, Any], current: int, target: int) -> int:
        """Return how many replicas of `model` there shall be, where a policy has `current` and has been told `target`:
        as soon as that is another number, or after `HOLD_S`. `scaling`: a `ScalingConfig` as a dict."""
        config = ScalingConfig(**{**scaling, "schedule": tuple(scaling["schedule"])})
        end = time.monotonic() + HOLD_S
        self._measure(model)
        while True:
            desired, change = self._board.desired(model, config, self._now(), current=current, target=target)
            if change is not None:
                self._tell(change)
            left_s = end - time.monotonic()
            if desired != target or left_s <= 0:
                return desired
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(left_s, self._board.look_again_s(model)))

    async def num_nodes(self) -> int | None:
        """Return how many nodes there are; None while that is not known."""
        if time.monotonic() - self._counted_at >= NODES_PERIOD_S:
            self._counted_at = time.monotonic()
            self._num_nodes = await asyncio.to_thread(_count_nodes)
        return self._num_nodes

    async def progress(self, progress: StartProgress) -> None:
        self._board.progress(progress, self._now())

    async def scale(self, model: str, num_replicas: int | None) -> None:
        self._board.scale(model, num_replicas)
        self._has_news()
        _log.info(
            "an operator asks for %s replicas of %s", "any number of" if num_replicas is None else num_replicas, model
        )

    async def view(self) -> Outlook:
        return self._signed(self._board.outlook(self._now()))

    def _signed(self, outlook: Outlook) -> Outlook:
        """Return the same with where this process tells its metrics."""
        return dataclasses.replace(outlook, metrics_address=self._process.metrics_address, node_id=self._node_id)

    def _has_news(self) -> None:
        """Wake those that wait for a decision."""
        self._news.set()
        self._news = asyncio.Event()

    def _now(self) -> float:
        """Return seconds since 1970 by a clock that does not jump when the system's is set."""
        return self._epoch + time.monotonic()

    def _measure(self, model: str) -> None:
        """Have metrics say how it stands with a model; about once a second."""
        labels = {Attribute.REQUEST_MODEL: model}
        outlook = self._board.outlook(self._now()).models.get(model)
        if outlook is None:
            for direction in DIRECTIONS:
                self._changes.add(0, {**labels, Attribute.SCALE_DIRECTION: direction})
            return
        self._target.set(outlook.target, labels)
        self._demand.set(outlook.demand, labels)

    def _tell(self, change: TargetChange) -> None:
        attributes: dict[str, str | int | float] = {
            Attribute.REQUEST_MODEL: change.model,
            Attribute.REPLICAS_BEFORE: change.before,
            Attribute.REPLICAS_TARGET: change.after,
            Attribute.SCALE_REASON: change.reason,
            Attribute.SCALE_DEMAND: change.demand,
        }
        self._tracer.start_span(Span.SCALE, attributes=attributes).end()
        model = {Attribute.REQUEST_MODEL: change.model}
        self._target.set(change.after, model)
        direction = DIRECTIONS[change.after > change.before]
        self._changes.add(1, {**model, Attribute.SCALE_DIRECTION: direction})
        _log.info("%s: %d replicas, were %d: %s", change.model, change.after, change.before, change.reason)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def _count_nodes() -> int:
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])
