"""Gives a stepped engine a thread of its own and implements the engine seam for everybody else.

Owns the thread, the inbox through which commands go in, and the outputs that wait to be drained. Callers never wait for
a step: `load` is that of the last one. An engine whose `step` raises is broken: all its works end with an error, as do
all that follow, and `failure` tells the health check. (A request that makes its own computation fail does not come to
that: the engine isolates it.)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from octavo.names import Reason

from workers.types import (
    EngineInfo,
    Finish,
    FinishReason,
    GenerateWork,
    KvEvent,
    Load,
    SteppedEngine,
    TokenDelta,
    Work,
    WorkId,
)

BLOCKED_WAIT_S = 0.005
"""How long to wait for a command while works are there but none of them can go on."""

_log = logging.getLogger(__name__)


class EngineThread:
    """Implements `Engine` over `engine`, which nobody else touches from now on.

    `notify` is called on the engine's thread whenever there are new outputs, KV events or, with works to do, another
    load; it must neither block nor raise.
    """

    def __init__(self, engine: SteppedEngine, notify: Callable[[], None], *, name: str = "octavo-engine") -> None:
        self._engine = engine
        self._notify = notify
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        """Guards `_outputs` and `_events`."""
        self._outputs: list[TokenDelta] = []
        self._events: list[KvEvent] = []
        self._load = engine.load()
        self._open: dict[WorkId, set[int]] = {}
        """The choices of each work that have not ended; the engine's thread only."""
        self._is_closing = False
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
        self._inbox.put(lambda: self._submit(work))

    def abort(self, work_id: WorkId) -> None:
        self._inbox.put(lambda: self._engine.abort(work_id))

    def drain_outputs(self) -> list[TokenDelta]:
        with self._lock:
            outputs, self._outputs = self._outputs, []
        return outputs

    def kv_events(self) -> list[KvEvent]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def load(self) -> Load:
        """Return the load as it was after the last step."""
        return self._load

    def close(self) -> None:
        """Stop after the step in progress; returns at once. `join` waits."""
        self._inbox.put(self._close)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end after `close`; return whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_busy = False
        while not self._is_closing:
            self._take_commands(is_busy)
            if self._is_closing:
                break
            is_busy = self._step()
            self._publish()

    def _take_commands(self, is_busy: bool) -> None:
        """Carry out what is in the inbox; wait for something if the engine has nothing to do."""
        try:
            if not is_busy:
                self._inbox.get(timeout=BLOCKED_WAIT_S if self._open else None)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _step(self) -> bool:
        if self.failure is not None:
            return False
        try:
            return self._engine.step()
        except Exception as error:
            self._break(error)
            return False

    def _break(self, error: BaseException) -> None:
        _log.error("the engine is broken", exc_info=error)
        self.failure = error
        message = f"the engine of this replica failed ({type(error).__name__})"
        for work_id in list(self._open):
            self._end(work_id, FinishReason.ERROR, message)

    def _submit(self, work: Work) -> None:
        if work.work_id in self._open:
            return
        self._open[work.work_id] = set(range(work.n if isinstance(work, GenerateWork) else 1))
        if self.failure is not None:
            message = f"the engine of this replica failed ({type(self.failure).__name__})"
            self._end(work.work_id, FinishReason.ERROR, message)
            return
        try:
            self._engine.submit(work)
        except Exception as error:
            _log.error("work %s could not be taken on", work.work_id, exc_info=error)
            message = f"the engine could not take this request on ({type(error).__name__})"
            self._end(work.work_id, FinishReason.ERROR, message)

    def _end(self, work_id: WorkId, reason: FinishReason, message: str = "") -> None:
        """End the open choices of a work without the engine."""
        error_reason = Reason.INTERNAL if reason is FinishReason.ERROR else ""
        finish = Finish(reason=reason, error_reason=error_reason, error_message=message)
        deltas = [TokenDelta(work_id=work_id, index=i, finish=finish) for i in sorted(self._open.pop(work_id))]
        with self._lock:
            self._outputs += deltas

    def _publish(self) -> None:
        """Hand over what the engine produced since the last time, and say so."""
        outputs = [delta for delta in self._engine.drain_outputs() if self._is_open(delta)]
        events = self._engine.kv_events()
        self._load = self._engine.load()
        with self._lock:
            self._outputs += outputs
            self._events += events
            has_news = bool(self._outputs or self._events)
        if has_news:
            self._notify()

    def _is_open(self, delta: TokenDelta) -> bool:
        """Whether this delta belongs to a choice that has not ended; note if it ends with it."""
        choices = self._open.get(delta.work_id, set())
        if delta.index not in choices:
            return False
        if delta.finish is not None:
            choices.remove(delta.index)
            if not choices:
                del self._open[delta.work_id]
        return True

    def _close(self) -> None:
        self._is_closing = True
        try:
            self._engine.close()
            self._publish()
        except Exception as error:
            _log.error("the engine did not close", exc_info=error)
        for work_id in list(self._open):
            self._end(work_id, FinishReason.CANCELLED)
        self._notify()
