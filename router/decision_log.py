"""Placement decisions as lines of JSON in a file, for looking into and for replaying. Optional.

    {"at": 1700000000.25, "router": ..., "request": ..., "attempt": 1, "affinity_key": "", "replica": ..., "rule": ...,
     "matched": 512, "candidates": [{"replica", "matched", "owed", "uncached", "decode", "displaced", "cost"}, ...]}
    {"at": ..., "router": ..., "dropped": 17}            so many decisions before this line were not written

The event loop hands a decision over and goes on; a thread turns it into text and writes. When the disk is slower than
the router, decisions are dropped, counted and told. The file is renamed to PATH.1, over an older one, when it has
`max_bytes`, so both together are bounded. Several routers may write to one path.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any, Final

from router.types import Candidate, Decision, Request

MAX_BYTES: Final = 64 * 1024 * 1024
MAX_QUEUED: Final = 4_096
"""Decisions that wait for the disk."""
CLOSE_S: Final = 2.0
_TERMS: Final = (
    ("replica", "replica"),
    ("matched", "matched_tokens"),
    ("owed", "owed_tokens"),
    ("uncached", "uncached_tokens"),
    ("decode", "decode_tokens"),
    ("displaced", "displaced_tokens"),
)
"""(name in the log, field of Candidate)"""

_log = logging.getLogger(__name__)
_Entry = tuple[float, str, str, Decision]


class DecisionLog:
    """Writes to `path` from the first decision on, until `close`."""

    def __init__(self, path: Path, router_id: str, *, max_bytes: int = MAX_BYTES, max_queued: int = MAX_QUEUED) -> None:
        self._path = path
        self._router_id = router_id
        self._max_bytes = max_bytes
        self._queue: Queue[_Entry | None] = Queue(max_queued)
        self._num_dropped_before = 0
        """Told in the file."""
        self.num_dropped = 0
        self._thread = Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    def add(self, request: Request, decision: Decision) -> None:
        """Hand a decision over. Never blocks."""
        try:
            self._queue.put_nowait((time.time(), request.request_id, request.affinity_key, decision))
        except Full:
            if not self.num_dropped:
                _log.warning("decisions come faster than %s takes them; some are dropped", self._path)
            self.num_dropped += 1

    def close(self) -> None:
        """Write what waits, within `CLOSE_S`. Blocks for so long at most."""
        end = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._queue.put(None, timeout=0.05)
                break
            except Full:
                continue
        self._thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        file: TextIOWrapper | None = None
        is_open = True
        while is_open:
            entries = [self._queue.get()]
            while len(entries) < MAX_QUEUED:
                try:
                    entries.append(self._queue.get_nowait())
                except Empty:
                    break
            is_open = None not in entries
            try:
                file = self._with_room(file)
                file.writelines(self._line(entry) for entry in entries if entry is not None)
                self._tell_dropped(file)
                file.flush()
            except OSError as error:  # what was not flushed is lost, with the file
                if self.num_dropped == self._num_dropped_before:
                    _log.error("decisions cannot be written to %s: %s", self._path, error)
                self.num_dropped += sum(entry is not None for entry in entries)
                if file is not None:
                    with suppress(OSError):
                        file.close()
                    file = None
        if file is not None:
            file.close()

    def _with_room(self, file: TextIOWrapper | None) -> TextIOWrapper:
        """Return the file at `path` with room in it: `file`, unless it is full or another router has renamed it."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        is_full = there is not None and there.st_size >= self._max_bytes
        if file is not None:
            if there is not None and not is_full and os.path.samestat(os.fstat(file.fileno()), there):
                return file
            file.close()
        if is_full:
            with suppress(FileNotFoundError):  # another router was faster
                self._path.replace(f"{self._path}.1")
        return self._path.open("a", encoding="utf-8")

    def _line(self, entry: _Entry) -> str:
        at, request_id, affinity_key, decision = entry
        return _json(
            {
                "at": at,
                "router": self._router_id,
                "request": request_id,
                "attempt": decision.attempt,
                "affinity_key": affinity_key,
                "replica": decision.replica,
                "rule": decision.rule,
                "matched": decision.matched_tokens,
                "candidates": [
                    {name: getattr(candidate, field) for name, field in _TERMS} | {"cost": candidate.cost}
                    for candidate in decision.candidates
                ],
            }
        )

    def _tell_dropped(self, file: TextIOWrapper) -> None:
        dropped = self.num_dropped - self._num_dropped_before
        if dropped:
            file.write(_json({"at": time.time(), "router": self._router_id, "dropped": dropped}))
            self._num_dropped_before += dropped


def read_decision(line: str) -> tuple[Decision, str] | None:
    """Return the decision in a line and its request's affinity key, for `placement.replay`; None for a line that tells
    of dropped ones. Raises KeyError or ValueError for what is no line of this log."""
    fields: Mapping[str, Any] = json.loads(line)
    if "dropped" in fields:
        return None
    candidates = [Candidate(**{field: candidate[name] for name, field in _TERMS}) for candidate in fields["candidates"]]
    decision = Decision(
        replica=fields["replica"],
        rule=fields["rule"],
        matched_tokens=fields["matched"],
        candidates=tuple(candidates),
        attempt=fields["attempt"],
    )
    return decision, fields["affinity_key"]


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":")) + "\n"
