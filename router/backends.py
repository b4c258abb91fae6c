"""The backs of a router that serves several models: one for each, with a queue, replicas and caches of its own.

What one model's requests wait for or lose does not touch another's; only processor time and the front are shared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from router.dispatcher import Dispatcher
from router.signal import ModelSignal
from router.types import Backlog, Cancel, ModelStanding, ReplicaView, Request, Sink


class Backends:
    """Implements `Backend` of types.py."""

    def __init__(self) -> None:
        self._dispatchers: dict[str, Dispatcher] = {}

    @property
    def dispatchers(self) -> Mapping[str, Dispatcher]:
        """By the names that requests call their models."""
        return self._dispatchers

    def add(self, model: str, dispatcher: Dispatcher) -> None:
        """Serve `model` with `dispatcher`, which is started, from now on; `stop` ends it."""
        assert model not in self._dispatchers
        self._dispatchers[model] = dispatcher

    async def stop(self) -> None:
        """End what is left with UNAVAILABLE and close all links. Idempotent."""
        await asyncio.gather(*(dispatcher.stop() for dispatcher in self._dispatchers.values()))

    # The Backend.

    def submit(self, request: Request, sink: Sink) -> Cancel:
        return self._dispatchers[request.model].submit(request, sink)

    def replicas(self) -> Sequence[ReplicaView]:
        """What all replicas are and do; their model is called what requests call it."""
        return [
            view if view.model == model else replace(view, model=model)
            for model, dispatcher in self._dispatchers.items()
            for view in dispatcher.replicas()
        ]

    def signal(self, model: str) -> ModelSignal:
        """Return how it stands with a model; nothing is said of one that cannot be served."""
        dispatcher = self._dispatchers.get(model)
        return ModelSignal() if dispatcher is None else dispatcher.signal(model)

    def standing(self, model: str) -> ModelStanding:
        """Return what gauges show of a model; nothing of one that cannot be served."""
        dispatcher = self._dispatchers.get(model)
        return ModelStanding() if dispatcher is None else dispatcher.standing(model)

    def backlog(self) -> Backlog:
        """The sum over all models, each of which has the whole of the configured queue."""
        each = [dispatcher.backlog() for dispatcher in self._dispatchers.values()]
        return Backlog(
            num_queued_requests=sum(backlog.num_queued_requests for backlog in each),
            num_queued_tokens=sum(backlog.num_queued_tokens for backlog in each),
            num_running_requests=sum(backlog.num_running_requests for backlog in each),
            max_queued_tokens=sum(backlog.max_queued_tokens for backlog in each),
            num_queued_sequences=sum(backlog.num_queued_sequences for backlog in each),
        )
