"""What prompt lookup is measured on: three kinds of conversation, made of Python's own library and manual.

    code edit   a function of the library is to be returned with one name changed: most of the answer is in the prompt
    quote       a passage of the manual is to be quoted: so is this answer, if the model does what it is told
    chat        a question without a source: what repeats is the model's own words

No data file is needed. Which text that is depends on Python's version: compare figures within one run.
"""

from __future__ import annotations

import inspect
import shlex
import statistics
import string
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

KINDS = ("code edit", "quote", "chat")

_EDITS: tuple[tuple[Callable[..., Any], str, str], ...] = (
    (string.capwords, "sep", "separator"),
    (textwrap.indent, "prefix", "margin"),
    (shlex.join, "split_command", "words"),
    (statistics.median, "data", "values"),
)
_QUOTES = ("assert", "break", "continue", "del")
_QUESTIONS = (
    "What is the difference between a list and a tuple in Python?",
    "Give me five tips for a good night's sleep.",
    "Explain to a child why the sky is blue.",
    "How do I make tea?",
)


@dataclass(frozen=True, slots=True)
class LookupTask:
    kind: str
    name: str
    messages: tuple[Mapping[str, str], ...]


def lookup_tasks(kind: str) -> Iterator[LookupTask]:
    """Yield the conversations of a kind, always the same."""
    match kind:
        case "code edit":
            for function, old, new in _EDITS:
                source = textwrap.dedent(inspect.getsource(function))
                wish = f"Rename `{old}` to `{new}` in this function. Answer with the whole function and nothing else."
                yield _task(kind, function.__name__, f"{wish}\n\n```python\n{source}```")
        case "quote":
            for topic in _QUOTES:
                wish = "Quote the first two paragraphs of this document, word for word."
                yield _task(kind, topic, f"{wish}\n\n{topics[topic]}")
        case "chat":
            for number, question in enumerate(_QUESTIONS, start=1):
                yield _task(kind, f"question {number}", question)
        case _:
            raise ValueError(f"a kind is one of {', '.join(KINDS)}, is {kind!r}")


def _task(kind: str, name: str, text: str) -> LookupTask:
    return LookupTask(kind, name, ({"role": "user", "content": text},))
