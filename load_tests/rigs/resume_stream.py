"""An answer as its client sees it while replicas die: pieces and their places, gaps, where it was cut. Pure.

`compared` counts what came of many: identical to other answers, lost, repeated, different.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.client import Delta, Finish

from load_tests.rigs.resume_asks import Ask

MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """All of an answer that must not depend on what became of its replica."""

    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Mark:
    """How far an answer was."""

    num_tokens: int
    num_chars: int


class Stream:
    """One answer. Times are seconds on any clock that does not go back."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.token_ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.is_begun = False
        self.is_ended = False
        self.error = ""
        self.attempts = 0
        """How many replicas it was sent to, as its end says."""
        self.num_misplaced = 0
        """Pieces that did not begin where the answer was, or came after its finish."""
        self.largest_gap_s: float | None = None
        """Between two arrivals of tokens."""
        self.mark: Mark | None = None
        self._token_at: float | None = None

    @property
    def is_open(self) -> bool:
        return self.is_begun and not self.is_ended

    @property
    def is_cut(self) -> bool:
        """Whether another replica went on with what was marked."""
        return self.mark is not None and self.attempts > 1

    @property
    def is_cut_in_stop(self) -> bool:
        """Whether all text before the stop string, which it ended with, had come, and the end had not."""
        is_stopped = self.finish is not None and self.finish.stop is not None
        return self.is_cut and is_stopped and self.mark is not None and self.mark.num_chars == len(self.text)

    @property
    def answer(self) -> Answer:
        return Answer(tuple(self.token_ids), self.text, self.finish)

    def took(self, delta: Delta, now: float) -> None:
        """A piece came."""
        if delta.token_offset != len(self.token_ids) or self.finish is not None:
            self.num_misplaced += 1
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.finish = delta.finish
        if not delta.token_ids:
            return
        if self._token_at is not None:
            self.largest_gap_s = max(self.largest_gap_s or 0.0, now - self._token_at)
        self._token_at = now

    def set_mark(self) -> None:
        """Remember how far it is: its replica is about to be lost, perhaps."""
        self.mark = Mark(len(self.token_ids), len(self.text))

    def differs(self, expected: Answer) -> str:
        """Return "lost", "repeated" or "different" of what came instead of `expected`; empty if nothing did."""
        missing = len(expected.token_ids) - len(self.token_ids)
        if self.error or not self.is_ended or (missing > 0 and not self.num_misplaced):
            return "lost"
        if missing < 0 or self.num_misplaced:
            return "repeated"
        return "" if self.answer == expected else "different"

    def told(self, expected: Answer) -> str:
        """Say for people where it differs, and where it was cut."""
        both = zip(self.token_ids, expected.token_ids, strict=False)
        same = next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), None)
        differs = "" if same is None else f" from token {same}"
        cut = f", cut after {self.mark.num_tokens}" if self.is_cut and self.mark is not None else ""
        return f"{self.ask.name}{differs}{cut} {self.error}".rstrip()


def compared(streams: Sequence[Stream], expected: Sequence[Answer]) -> dict[str, Any]:
    """Return figures of a run whose answers should be `expected`, one by one."""
    found = [stream.differs(answer) for stream, answer in zip(streams, expected, strict=True)]
    cut = [stream for stream in streams if stream.is_cut]
    return {
        "sent": len(streams),
        "ended": sum(stream.is_ended for stream in streams),
        "identical": found.count(""),
        "wrong": len(found) - found.count(""),
        "wrongs": dict(Counter(kind for kind in found if kind)),
        "examples": [
            f"{kind}: {stream.told(answer)}"
            for kind, stream, answer in zip(found, streams, expected, strict=True)
            if kind
        ][:MAX_NAMED],
        "cut": len(cut),
        "cut_in_stop": sum(stream.is_cut_in_stop for stream in cut),
        "cut_kinds": dict(Counter(stream.ask.kind for stream in cut)),
        "cut_calls": dict(Counter(stream.ask.call for stream in cut)),
        "gaps_s": [round(stream.largest_gap_s, 3) for stream in cut if stream.largest_gap_s is not None],
    }
