"""What is asked while replicas die: the oracle's prompts, greedy and seeded, with penalties and stop strings. Pure.

An answer has exactly `max_tokens` tokens unless its stop string ends it. Every kind of request is asked over Session
and over Generate. The fake engine's requests are here, too: their answers are known beforehand.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.client import GenerateOptions

from cluster.model_fake import VOCAB_SIZE
from workers.fake import fake_continuation

PENALTIES = GenerateOptions(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3)
KINDS: Mapping[str, GenerateOptions] = {
    "greedy": GenerateOptions(temperature=0.0),
    "seeded": GenerateOptions(temperature=0.8, top_p=0.95),
    "greedy, penalties": GenerateOptions(temperature=0.0, **PENALTIES),
    "seeded, penalties": GenerateOptions(temperature=0.8, top_p=0.95, **PENALTIES),
}
CALLS = ("session", "generate")
STOP_EVERY = 5
"""One of so many requests has a stop string; no divisor of what the kinds and calls repeat with."""
MAX_STOP_CHARS = 64
"""Routers take 256 bytes."""
SEED = 6
UNSTEADY = frozenset(
    (
        3,
        9,
        17,
        23,
        27,
        29,
        37,
        39,
        43,
        59,
        62,
        67,
        75,
        87,
        91,
        101,
        107,
        111,
        119,
        123,
        127,
        133,
        135,
        137,
        138,
        153,
        161,
        185,
        187,
        191,
        195,
        199,
        207,
        209,
        211,
        214,
        221,
        223,
        227,
    )
)
"""Numbers of requests that are passed over: rounding could change their answers, as `resume_margin.py` finds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request. `reference`: the token ids of its answer, where they are known."""

    name: str
    kind: str
    call: str
    prompt: tuple[int, ...]
    options: GenerateOptions
    stop: str = ""
    reference: tuple[int, ...] | None = None

    def stopping_at(self, stop: str) -> Ask:
        return replace(self, stop=stop, options=GenerateOptions(**self.options, stop=stop))


def oracle_asks(
    entries: Sequence[Mapping[str, Any]],
    number: int,
    lengths: tuple[int, int],
    *,
    passed_over: Collection[int] = UNSTEADY,
) -> list[Ask]:
    """Return requests for the oracle's prompts (`entries`: its committed answers), of all kinds in turn.

    A greedy one asks for no more tokens than the reference's answer has: up to there no rounding can change it.
    """
    rng = random.Random(SEED)
    kinds = tuple(KINDS)
    asks: list[Ask] = []
    for i in itertools.count():
        if len(asks) == number:
            return asks
        entry, kind = entries[i % len(entries)], kinds[i % len(kinds)]
        max_tokens = rng.randint(*lengths)
        reference = None
        if kind == "greedy":
            max_tokens = min(max_tokens, len(entry["answer"]))
            reference = tuple(entry["answer"][:max_tokens])
        ask = Ask(
            name=f"{i} ({entry['name']}, {kind})",
            kind=kind,
            call=CALLS[i // len(kinds) % len(CALLS)],
            prompt=tuple(entry["prompt"]),
            options=GenerateOptions(max_tokens=max_tokens, ignore_eos=True, seed=i, **KINDS[kind]),
            reference=reference,
        )
        if i not in passed_over:
            asks.append(ask)
    raise AssertionError("counting has no end")


def fake_asks(number: int, max_tokens: int, rng: random.Random, *, prompt_tokens: int = 20) -> list[Ask]:
    """Return requests that no replica of the fake engine has seen."""
    asks = []
    for i in range(number):
        prompt = tuple(rng.choices(range(3, VOCAB_SIZE), k=prompt_tokens))
        ask = Ask(
            name=f"{i} (fake)",
            kind="fake",
            call=CALLS[i % len(CALLS)],
            prompt=prompt,
            options=GenerateOptions(max_tokens=max_tokens, ignore_eos=True),
            reference=tuple(fake_continuation(prompt, max_tokens, VOCAB_SIZE)),
        )
        asks.append(ask)
    return asks


def with_stops(asks: Sequence[Ask], texts: Sequence[str]) -> list[Ask]:
    """Return `asks`, some with a stop string: the middle third of the text that answers them without one.

    So long a one is often what an answer is in the middle of, its text held back, when its replica dies.
    """
    return [
        ask.stopping_at(stop) if i % STOP_EVERY == STOP_EVERY - 1 and (stop := middle(text)) else ask
        for i, (ask, text) in enumerate(zip(asks, texts, strict=True))
    ]


def middle(text: str) -> str:
    third = len(text) // 3
    return text[third : 2 * third][:MAX_STOP_CHARS]


def until_stop(text: str, stop: str) -> str:
    """Return the text of an answer that `stop` ends, from that of the answer without; all of it without `stop`."""
    return text.partition(stop)[0] if stop else text
