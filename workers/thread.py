"""Gives a stepped engine a thread of its own and implements the engine seam for everybody else.

Owns the thread, the inbox through which commands go in, and the outputs that wait to be drained. Callers never wait for
a step: `load` is that of the last one. An engine whose `step` raises is broken: all its works are lost, those that
follow are turned down, so that routers go on with them elsewhere and send no more, and `failure` tells the health
check. (A request that makes its own computation fail does not come to that: the engine isolates it.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from octavo.names import Reason

from workers.emission import Emission
from workers.step_watch import StepWatch, WatchableEngine
from workers.types import (
    EngineCounts,
    EngineInfo,
    Finish,
    FinishReason,
    KvEvent,
    Load,
    TokenDelta,
    Work,
    WorkId,
)

BLOCKED_WAIT_S = 0.005
"""How long to wait for a command while works are there but none of them can go on."""
HAND_OVER_S = 0.0005
"""How long to wait, while a device computes, for somebody to take what is to leave now. The interpreter runs one thread
at a time, and planning the next step, for which there is time, would hold up whoever sends it."""
HAND_OVER_MOST = 16
"""Of more tokens together none is so urgent, and the next step takes its time."""
_CANCELLED: Final = Finish(reason=FinishReason.CANCELLED)

_log = logging.getLogger(__name__)


class EngineThread:
    """Implements `Engine` over `engine`, which nobody else touches from now on.

    `notify` is called on the engine's thread when there are outputs or KV events to drain or the credit has changed; it
    must neither block nor raise. Tokens may wait for `max_token_age_s` before it is, see `emission.py`.
    """

    def __init__(
        self,
        engine: WatchableEngine,
        notify: Callable[[], None],
        *,
        max_token_age_s: float = 0.0,
        name: str = "octavo-engine",
    ) -> None:
        self._engine = engine
        self._emission = Emission(max_token_age_s)
        self._notify = notify
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        """Guards `_outputs`, `_taken`, `_events` and `_is_closed`."""
        self._outputs: list[TokenDelta] = []
        self._events: list[KvEvent] = []
        self._load = engine.load()
        self._open: dict[WorkId, set[int]] = {}
        """The choices of each work that have not ended; the engine's thread only."""
        self._taken = threading.Event()
        """Whether outputs were drained since some were last added."""
        self._is_closed = False
        """Whether `close` was called; a work that comes later never reaches the engine."""
        self._is_running = True
        self._watch: StepWatch | None = None
        self.failure: BaseException | None = None
        """What `step` raised; None while the engine is sound."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs: until `close`, or for ever."""
        return self._thread.is_alive()

    def submit(self, work: Work) -> None:
        with self._lock:
            if self._is_closed:
                self._outputs += _endings(work.work_id, range(work.num_choices), _CANCELLED)
            else:
                self._inbox.put(lambda: self._submit(work))

    def abort(self, work_id: WorkId, index: int | None = None) -> None:
        self._inbox.put(lambda: self._engine.abort(work_id, index))

    def drain_outputs(self) -> list[TokenDelta]:
        with self._lock:
            outputs, self._outputs = self._outputs, []
            self._taken.set()
        return outputs

    def kv_events(self, *, anew: bool = False) -> list[KvEvent]:
        if anew:
            self._inbox.put(self._tell_cache)
        with self._lock:
            events, self._events = self._events, []
        return events

    def load(self) -> Load:
        """Return the load as it was after the last step."""
        return self._load

    def counts(self) -> EngineCounts:
        """Return what metrics need, as it is now."""
        return self._engine.counts()

    def watch(self) -> StepWatch:
        """Have steps timed from now on. The record of a step is there before what it brought."""
        self._watch = self._engine.watch()
        return self._watch

    def close(self) -> None:
        """Stop after the step in progress; returns at once. `join` waits."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(self._close)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end after `close`; return whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_busy = False
        while self._is_running:
            try:
                self._take_commands(is_busy)
                began = time.monotonic()
                is_busy = self.failure is None and self._is_running and self._engine.step()
                self._publish(began, is_busy=is_busy)
            except Exception as error:
                is_busy = False
                self._break(error)
        try:
            self._engine.close()
        except Exception as error:
            _log.error("the engine did not close", exc_info=error)

    def _take_commands(self, is_busy: bool) -> None:
        """Carry out what is in the inbox; wait for something if the engine has nothing to do."""
        try:
            if not is_busy:
                self._inbox.get(timeout=BLOCKED_WAIT_S if self._open else None)()
            while True:
                self._inbox.get_nowait()()
                if self._emission.release():
                    self._notify()
        except Empty:
            return

    def _break(self, error: Exception) -> None:
        """End all works: the engine cannot be trusted any more."""
        _log.error("the engine is broken", exc_info=error)
        self.failure = error
        if self._watch is not None:
            with suppress(Exception):  # an engine that is broken may tell nothing of its step either
                self._watch.ended()
        for work_id in list(self._open):
            self._end(work_id, _broken(error, Reason.REPLICA_LOST))
        self._notify()

    def _submit(self, work: Work) -> None:
        if work.work_id in self._open:
            return
        self._open[work.work_id] = set(range(work.num_choices))
        if self.failure is not None:
            self._end(work.work_id, _broken(self.failure, Reason.DRAINING))
            return
        try:
            self._engine.submit(work)
        except Exception as error:
            request = {"request_id": work.request_id, "traceparent": work.traceparent}
            _log.error("work %s could not be taken on", work.work_id, exc_info=error, extra=request)
            message = f"the engine could not take this request on ({type(error).__name__})"
            self._end(work.work_id, _error(Reason.INTERNAL, message))

    def _end(self, work_id: WorkId, finish: Finish) -> None:
        """End the open choices of a work without the engine."""
        deltas = _endings(work_id, sorted(self._open.pop(work_id)), finish)
        with self._lock:
            self._outputs += deltas
        self._emission.add(len(deltas), is_urgent=True)

    def _publish(self, began: float, *, is_busy: bool) -> None:
        """Hand over what the engine produced in the step that `began` then, and say so if it is to leave now."""
        outputs: list[TokenDelta] = []
        events: list[KvEvent] = []
        load = self._load
        if self.failure is None:
            deltas, events, load = self._engine.drain_outputs(), self._engine.kv_events(), self._engine.load()
            outputs = self._still_open(deltas)  # once nothing can fail: what it counts as ended leaves
        has_news = _credit(load) != _credit(self._load)
        if self._watch is not None:
            self._watch.ended()
        now = time.monotonic()
        with self._lock:
            # With the events, so that a reader between two equal loads has all events that the load knows of.
            self._load = load
            self._outputs += outputs
            self._taken.clear()
            self._events += events
            has_only_events = bool(self._events) and not self._outputs
        is_due = self._emission.is_due(step_s=now - began, now=now, is_last=not is_busy)
        if is_due or has_only_events or has_news:
            self._emission.release()  # whatever waits leaves with it
            self._notify()
            if is_due and len(outputs) <= HAND_OVER_MOST and self._engine.is_ahead:
                self._taken.wait(HAND_OVER_S)

    def _tell_cache(self) -> None:
        events = self._engine.kv_events(anew=True)
        with self._lock:
            self._events = events

    def _still_open(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        """Return those of choices that have not ended, note those that end with them, and let `_emission` know."""
        works, kept, is_urgent = self._open, list[TokenDelta](), False
        for delta in deltas:
            choices = works.get(delta.work_id)
            if choices is None or delta.index not in choices:
                continue
            kept.append(delta)
            if delta.finish is not None:
                is_urgent = True
                choices.remove(delta.index)
                if not choices:
                    del works[delta.work_id]
            elif delta.num_cached_tokens is not None:
                is_urgent = True
        self._emission.add(len(kept), is_urgent=is_urgent)
        return kept

    def _close(self) -> None:
        self._is_running = False
        for work_id in list(self._open):
            self._end(work_id, _CANCELLED)


def _credit(load: Load) -> tuple[int, int | None]:
    return load.credit_tokens, load.credit_sequences


def _endings(work_id: WorkId, choices: Iterable[int], finish: Finish) -> list[TokenDelta]:
    return [TokenDelta(work_id=work_id, index=index, finish=finish) for index in choices]


def _error(reason: str, message: str) -> Finish:
    return Finish(reason=FinishReason.ERROR, error_reason=reason, error_message=message)


def _broken(error: BaseException, reason: str) -> Finish:
    return _error(reason, f"the engine of this replica failed ({type(error).__name__})")
