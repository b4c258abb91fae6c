"""What became of fuzzed messages: counted by target and status, with the bytes that reproduce what must not be.

INTERNAL and UNKNOWN are failures of ours whatever was sent, and so is whatever a target says is one. Values that can be
sent from process to process and be added up. Knows no sockets.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import grpc

FAILURES: Final = frozenset({"INTERNAL", "UNKNOWN"})
MAX_FAILURES: Final = 20
MAX_HEX: Final = 6_000
"""Of one failure, so that a report can still be read."""
ENDED_EARLY: Final = "ended while more was written"
_FROM_CORE: Final = "Internal error from Core"
"""What a client's gRPC says, in place of the status, when it writes to a call that the other end has ended. An error in
the other end's handler is in that one's log."""
MAX_ERRORS: Final = 20
NOT_OURS: Final = "grpc._common"
"""Logs each message of a peer that is none, which is what is sent here."""
_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


def name_of(code: int) -> str:
    """Return the name of a google.rpc.Code."""
    return _CODES.get(code, "UNKNOWN")


async def status_of(call: Any) -> tuple[str, str]:
    """Return the name of the status of a call that is over, and its text."""
    code, text = (await call.code()).name, str(await call.details())
    return (ENDED_EARLY, "") if code == "INTERNAL" and text == _FROM_CORE else (code, text)


class FuzzTally:
    def __init__(self) -> None:
        self.num_messages = 0
        self.codes: Counter[str] = Counter()
        """By "target: STATUS"; one message may have several or none."""
        self.num_failures = 0
        self.failures: list[dict[str, str]] = []

    def sent(self, number: int = 1) -> None:
        self.num_messages += number

    def ended(self, target: str, code: str, messages: Iterable[bytes], text: str = "") -> None:
        """Count a status that `messages` led to, the last ones of which are kept if it is a failure."""
        self.codes[f"{target}: {code}"] += 1
        if code in FAILURES:
            self.failed(target, code, messages, text)

    def failed(self, target: str, what: str, messages: Iterable[bytes], text: str = "") -> None:
        self.num_failures += 1
        if len(self.failures) < MAX_FAILURES:
            joined = " ".join(message.hex() for message in messages)
            self.failures.append({"target": target, "what": what, "text": text[:2_000], "hex": joined[-MAX_HEX:]})

    def add(self, other: Mapping[str, Any]) -> None:
        """Add what `to_dict` of another one returned."""
        self.num_messages += other["messages"]
        self.codes.update(other["codes"])
        self.num_failures += other["num_failures"]
        self.failures += other["failures"][: MAX_FAILURES - len(self.failures)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "messages": self.num_messages,
            "codes": dict(sorted(self.codes.items())),
            "num_failures": self.num_failures,
            "failures": self.failures,
        }


class LoggedErrors(logging.Handler):
    """Keeps what is logged as an error: nothing that others send may be one of ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == NOT_OURS:
            return
        if len(self.texts) < MAX_ERRORS:
            self.texts.append(f"{record.name}: {logging.Formatter().format(record)}"[-3_000:])


def what_is_left(left: Mapping[str, int]) -> str:
    """Return in words what should be nothing; empty if it is."""
    return ", ".join(f"{number} {what}" for what, number in left.items() if number)


def worst_growth(memories: Sequence[Sequence[float]]) -> float | None:
    """Return the largest ratio of a process's memory at its end to that after a third of the way."""
    ratios = [each[-1] / each[len(each) // 3] for each in memories if len(each) >= 3 and each[len(each) // 3] > 0]
    return max(ratios, default=None)
