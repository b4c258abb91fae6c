"""The requests that came in over Sessions, which outlive the stream that carries them.

When a stream breaks, its requests live on for a grace, in which the same tenant may attach again with the same id, also
from a newer stream while the older one does not know yet that it is dead: the newer one wins. Owns the graces, and the
admissions that take their time. Knows no gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from router.answer import Answer


class Stream(Protocol):
    """What carries entries: a Session."""

    def release(self, entry: Entry) -> None:
        """A newer stream takes `entry` over."""


class Entry:
    """A request of a Session and the stream that it belongs to now, if any. `key`: tenant and request id."""

    __slots__ = ("answer", "is_delivered", "key", "num_detached", "stream")

    def __init__(self, key: tuple[str, str], answer: Answer, stream: Stream) -> None:
        self.key = key
        self.answer = answer
        self.stream: Stream | None = stream
        self.is_delivered = False
        """Its Terminal was given to a stream, and nobody has attached since."""
        self.num_detached = 0
        """How often it has lost its stream; tells a grace that is over from one that began later."""

    @property
    def request_id(self) -> str:
        return self.answer.request_id

    def move(self, stream: Stream) -> None:
        """Let `stream` carry it from now on."""
        if self.stream is not None:
            self.stream.release(self)
        self.stream = stream
        self.is_delivered = False


class Entries:
    """All that a client could attach to."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._admissions: set[asyncio.Task[None]] = set()
        self._graces: set[asyncio.TimerHandle] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: tuple[str, str]) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        self._entries[entry.key] = entry

    def forget(self, entry: Entry) -> None:
        """Nobody can attach to it any more."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.answer.close()

    def drop(self, entry: Entry) -> None:
        """End `entry` wherever it is carried: its client goes on without it."""
        if entry.stream is not None:
            entry.stream.release(entry)
        entry.stream = None
        entry.answer.detach()
        self.forget(entry)

    def admit_later(self, admission: Coroutine[Any, Any, None]) -> None:
        """Run an admission that takes its time; it does not end with the stream."""
        task = asyncio.create_task(admission)
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)

    def detach(self, entries: list[Entry], grace_s: float) -> None:
        """These have lost their stream; unless they find another one, they end when the grace is over."""
        if not entries:
            return
        counts = []
        for entry in entries:
            entry.stream = None
            entry.num_detached += 1
            entry.answer.detach()
            counts.append((entry, entry.num_detached))

        def grace_is_over() -> None:
            self._graces.discard(handle)
            for entry, count in counts:
                if entry.stream is None and entry.num_detached == count:
                    self.forget(entry)

        handle = asyncio.get_running_loop().call_later(grace_s, grace_is_over)
        self._graces.add(handle)

    async def stop(self) -> None:
        """Forget everything; no stream may be there any more."""
        for handle in self._graces:
            handle.cancel()
        self._graces.clear()
        for task in self._admissions:
            task.cancel()
        await asyncio.gather(*self._admissions, return_exceptions=True)
        for entry in self._entries.values():
            entry.answer.close()
        self._entries.clear()
