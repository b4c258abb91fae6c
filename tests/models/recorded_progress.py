"""A `Progress` that remembers what it was told."""

from __future__ import annotations


class RecordedProgress:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[tuple[str, int]] = []
        self.ended = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, label: str, total_bytes: int) -> None:
        self.begun.append((label, total_bytes))

    def reached(self, num_bytes: int) -> None:
        assert num_bytes >= 0

    def end(self) -> None:
        self.ended += 1
