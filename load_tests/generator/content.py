"""What conversations say: a pure function of the scenario, its seed and a number, so that the same seed sends the same.

System prompts and documents depend on the seed and their own number only: requests that share one share its tokens.
Later turns repeat what was said before, answers included, so these are as reproducible as the answers are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.client import GenerateOptions, Prompt

from load_tests.generator.arrivals import TraceLine
from load_tests.generator.poisons import POISONS
from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import Kind, Scenario

# fmt: off
_WORDS = (
    "about", "above", "across", "after", "again", "air", "all", "almost", "along", "always", "among", "animal",
    "another", "answer", "any", "apple", "arm", "around", "ask", "away", "back", "bank", "bear", "because", "before",
    "begin", "behind", "below", "best", "better", "between", "big", "bird", "black", "blue", "boat", "body", "book",
    "both", "bread", "bridge", "bring", "brother", "brown", "build", "busy", "call", "came", "can", "car", "carry",
    "case", "cat", "change", "child", "city", "clean", "clear", "close", "cloud", "cold", "color", "come", "cook",
    "corn", "country", "cover", "cross", "cup", "cut", "dark", "day", "deep", "did", "door", "down", "draw", "dream",
    "dress", "drink", "drive", "dry", "each", "early", "earth", "east", "eat", "end", "enough", "even", "ever",
    "every", "eye", "face", "fall", "family", "far", "farm", "fast", "father", "feel", "few", "field", "fill", "find",
    "fire", "first", "fish", "five", "floor",
)
# fmt: on
_MAX_SHARED = 4_096
"""System prompts and documents that are kept rather than made again."""


@dataclass(slots=True)
class Conversation:
    """What arrives at once: one request, and those that follow from its answer. `next` it until it returns None."""

    name: str
    kind: Kind
    tenant: str
    system: list[Any]
    documents: list[Any]
    rng: random.Random
    num_turns: int
    line: TraceLine | None = None
    num_asked: int = 0
    history: list[Any] = field(default_factory=list)
    """Token ids, words, or messages, as the prompt's form is."""

    @property
    def is_over(self) -> bool:
        return self.num_asked == self.num_turns


class Content:
    """Makes the conversations of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._kind_weights = list(itertools.accumulate(kind.weight for kind in scenario.kinds))
        self._shared: dict[str, list[Any]] = {}
        self._zipf: dict[tuple[int, float], list[float]] = {}

    def conversation(self, number: int) -> Conversation:
        """Return conversation `number` of the run, of which nothing has been asked."""
        scenario = self._scenario
        rng = random.Random(f"{scenario.seed} conversation {number}")
        kind = rng.choices(scenario.kinds, cum_weights=self._kind_weights)[0]
        tenant = self._draw(rng, kind.tenants, kind.zipf)
        shape = kind.prompt
        system = tenant if kind.tenants > 1 else rng.randrange(shape.systems)
        documents: dict[int, None] = {}
        while shape.documents and len(documents) < shape.picked:
            documents[self._draw(rng, shape.documents, kind.zipf)] = None
        return Conversation(
            name=f"{scenario.seed}-{number}",
            kind=kind,
            tenant=kind.name if kind.tenants == 1 else f"{kind.name}-{tenant}",
            system=self._units(kind, "system", system % shape.systems, shape.system),
            documents=[unit for each in documents for unit in self._units(kind, "document", each, shape.document)],
            rng=rng,
            num_turns=kind.turns.draw_int(rng),
            line=scenario.trace[number] if scenario.trace else None,
        )

    def ask(self, conversation: Conversation) -> PlannedRequest:
        """Return the next request of a conversation that is not over. `answer` comes before the one after it."""
        kind, rng, line = conversation.kind, conversation.rng, conversation.line
        assert not conversation.is_over
        name = f"{conversation.name}-{conversation.num_asked}"
        conversation.num_asked += 1
        length = line.prompt if line else kind.prompt.own.draw_int(rng)
        own = _draw_units(kind, rng, length)
        options = GenerateOptions(
            max_tokens=line.output if line else kind.output.draw_int(rng),
            temperature=kind.temperature,
            ignore_eos=kind.ignore_eos,
        )
        if kind.temperature:
            options["seed"] = rng.getrandbits(32)
        if kind.priority:
            options["priority"] = kind.priority
        if kind.stop:
            options["stop"] = kind.stop
        if kind.is_sticky:
            options["affinity_key"] = conversation.name
        is_cancelled = rng.random() < kind.cancel_share
        request = PlannedRequest(
            request_id=name,
            kind=kind.name,
            tenant=conversation.tenant,
            prompt=_prompt(conversation, own),
            model=self._scenario.call.model,
            timeout_s=kind.timeout_s.draw(rng) if kind.timeout_s else None,
            cancel_after_s=kind.cancel_after_s.draw(rng) if is_cancelled else None,
            read_pause_s=kind.read_pause_s,
            options=options,
        )
        if not kind.poisons:
            return request
        poison = POISONS[rng.choice(kind.poisons)]
        return replace(poison.spoil(request), expected=poison.code)

    def _units(self, kind: Kind, what: str, number: int, length: int) -> list[Any]:
        """Return a system prompt or a document. Every kind of one form and vocabulary shares them."""
        if not length:
            return []
        key = f"{self._scenario.seed} {what} {number} {length} {kind.prompt.form} {kind.prompt.vocabulary}"
        units = self._shared.get(key)
        if units is None:
            units = _draw_units(kind, random.Random(key), length)
            if len(self._shared) < _MAX_SHARED:
                self._shared[key] = units
        return units

    def _draw(self, rng: random.Random, count: int, zipf: float) -> int:
        if zipf == 0:
            return rng.randrange(count)
        weights = self._zipf.get((count, zipf))
        if weights is None:
            weights = list(itertools.accumulate((rank + 1) ** -zipf for rank in range(count)))
            self._zipf[count, zipf] = weights
        return rng.choices(range(count), cum_weights=weights)[0]


def answer(conversation: Conversation, token_ids: Sequence[int], text: str) -> None:
    """Take down what was said to the last request of a conversation that goes on."""
    form = conversation.kind.prompt.form
    if form == "messages":
        conversation.history.append({"role": "assistant", "content": text})
    else:
        conversation.history += token_ids if form == "token_ids" else [text]


def _draw_units(kind: Kind, rng: random.Random, length: int) -> list[Any]:
    shape = kind.prompt
    if shape.form == "token_ids":
        return rng.choices(range(int(shape.vocabulary.low), int(shape.vocabulary.high)), k=length)
    return rng.choices(_WORDS, k=length)


def _prompt(conversation: Conversation, own: list[Any]) -> Prompt:
    form, before = conversation.kind.prompt.form, [*conversation.system, *conversation.documents]
    if form == "messages":
        conversation.history.append({"role": "user", "content": " ".join(own)})
        system = [{"role": "system", "content": " ".join(before)}] if before else []
        return [*system, *conversation.history]
    conversation.history += own
    units = [*before, *conversation.history]
    return units if form == "token_ids" else " ".join(units)
