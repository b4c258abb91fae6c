"""What a router shows of how it stands now: the observable instruments of `octavo.metrics`.

Readers collect in threads of their own, while what is shown belongs to the event loop: each collection asks the loop
for a picture, which all gauges share, and shows the last one if the loop does not answer at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from octavo import metrics as table
from octavo.names import Attribute
from opentelemetry.metrics import Observation

from router.self_report import SelfReport
from router.types import Backend, ModelStanding

STATES: Final = ("starting", "connecting", "ready", "draining", "refused")
MAX_AGE_S: Final = 0.1
"""Of a picture: the gauges of one collection share it."""
MAX_WAIT_S: Final = 0.5
"""For the loop."""


class Picture(NamedTuple):
    """How it stands with the whole router at one moment."""

    models: dict[str, ModelStanding]
    replicas: Counter[tuple[str, str]]
    """By model and state."""
    num_sessions: int


class RouterGauges:
    """`models` are the names of all that are served or should be; `num_sessions` says how many are open."""

    def __init__(
        self, backend: Backend, about: SelfReport, models: Sequence[str], *, num_sessions: Callable[[], int]
    ) -> None:
        self._backend = backend
        self._about = about
        self._models = models
        self._num_sessions = num_sessions
        self._loop: asyncio.AbstractEventLoop | None = None
        self._picture = Picture({}, Counter(), 0)
        self._taken_at = 0.0

    def start(self, meter: Any) -> None:
        """Show what the running loop has, until `stop`. Once a meter: its instruments cannot be taken away."""
        self._loop = asyncio.get_running_loop()
        for metric, value in (
            (table.QUEUE_REQUESTS, lambda standing: standing.num_queued_requests),
            (table.QUEUE_TOKENS, lambda standing: standing.num_queued_tokens),
            (table.QUEUE_OLDEST, lambda standing: standing.oldest_wait_s),
            (table.REQUESTS_DISPATCHED, lambda standing: standing.num_dispatched),
            (table.CREDIT_TOKENS, lambda standing: standing.credit_tokens),
            (table.INDEX_BLOCKS, lambda standing: standing.num_index_blocks),
        ):
            metric.create(meter, self._by_model(value))
        table.REPLICAS.create(meter, self._replicas)
        table.SESSIONS.create(meter, lambda _options: [Observation(self._look().num_sessions)])

    def stop(self) -> None:
        """Ask the loop no more."""
        self._loop = None

    def _by_model(self, value: Callable[[ModelStanding], float]) -> Callable[[Any], Sequence[Observation]]:
        def observe(_options: object) -> list[Observation]:
            standings = self._look().models.items()
            return [Observation(value(each), {Attribute.REQUEST_MODEL: name}) for name, each in standings]

        return observe

    def _replicas(self, _options: object) -> Sequence[Observation]:
        counts = self._look().replicas
        return [
            Observation(counts[name, state], {Attribute.REQUEST_MODEL: name, Attribute.REPLICA_STATE: state})
            for name in self._models
            for state in STATES
        ]

    def _look(self) -> Picture:
        """Return how it stands; from any thread."""
        loop = self._loop
        if loop is not None and time.monotonic() - self._taken_at > MAX_AGE_S:
            if _is_running(loop):
                self._take()
            else:
                self._ask(loop)
        return self._picture

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        taken: concurrent.futures.Future[None] = concurrent.futures.Future()

        def answer() -> None:
            self._take()
            if taken.set_running_or_notify_cancel():
                taken.set_result(None)

        try:
            loop.call_soon_threadsafe(answer)
            taken.result(MAX_WAIT_S)
        except (RuntimeError, TimeoutError):  # it is closed, or busy with something long
            taken.cancel()
            self._taken_at = time.monotonic()  # or each gauge of this collection would wait as long

    def _take(self) -> None:
        replicas: Iterable[tuple[str, str]] = ((view.model, view.state) for view in self._about.replicas())
        self._picture = Picture(
            {name: self._backend.standing(name) for name in self._models}, Counter(replicas), self._num_sessions()
        )
        self._taken_at = time.monotonic()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this is the loop's own thread."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
