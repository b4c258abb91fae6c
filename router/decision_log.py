"""Placement decisions as lines of JSON in a file, for looking into and for replaying. Optional.

    {"at": 1700000000.25, "router": ..., "request": ..., "attempt": 1, "affinity_key": "", "replica": ..., "rule": ...,
     "matched": 512, "candidates": [{"replica", "matched", "owed", "uncached", "decode", "displaced", "recent", "cost"},
     ...]}
    {"at": ..., "router": ..., "dropped": 17}            so many decisions before this line were not written

The event loop hands a decision over and goes on; a thread turns it into text and writes. When the disk is slower than
the router, or full, decisions are dropped, counted and told; of a line that it took a part of, that part stays. The
file is renamed to PATH.1, over an older one, when it has `max_bytes`, so both together are bounded. Several routers may
write to one path.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
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
    ("recent", "recent_tokens"),
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
        self._num_crowded_out = 0
        """Decisions that found the queue full; counted by who adds."""
        self._num_lost = 0
        """Those that could not be written; counted by the thread, as are those of which the file tells."""
        self._num_told = 0
        self._is_failing = False
        self._thread = Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Decisions that the file does not have."""
        return self._num_crowded_out + self._num_lost

    def add(self, request: Request, decision: Decision) -> None:
        """Hand a decision over. Never blocks."""
        try:
            self._queue.put_nowait((time.time(), request.request_id, request.affinity_key, decision))
        except Full:
            if not self._num_crowded_out:
                _log.warning("decisions come faster than %s takes them; some are dropped", self._path)
            self._num_crowded_out += 1

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
            written = [entry for entry in entries if entry is not None]
            try:
                if written or self.num_dropped != self._num_told:  # else a full file would make way for an empty one
                    file = self._with_room(file)
                    self._write(file, written)
                self._is_failing = False
            except OSError as error:  # what was not flushed is lost, with the file
                if not self._is_failing:
                    _log.error("decisions cannot be written to %s: %s", self._path, error)
                self._is_failing = True
                self._num_lost += len(written)
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
        is_cut_off = there is not None and there.st_size > 0 and not is_full and self._ends_within_a_line()
        file = self._path.open("a", encoding="utf-8")
        if is_cut_off:
            file.write("\n")
        return file

    def _ends_within_a_line(self) -> bool:
        """Whether a full disk, or the end of a router, has cut the last line off. False if that cannot be seen."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
        return False

    def _write(self, file: TextIOWrapper, entries: Iterable[_Entry]) -> None:
        """Write `entries`, and how many were dropped that the file does not tell of."""
        file.writelines(map(self._line, entries))
        num_dropped = self.num_dropped
        if num_dropped != self._num_told:
            told = {"at": time.time(), "router": self._router_id, "dropped": num_dropped - self._num_told}
            file.write(_json(told))
        file.flush()
        self._num_told = num_dropped

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
