"""Requests that a router must refuse, one rule broken each, and the code with which it must do so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from octavo.client import GenerateOptions

from load_tests.generator.request import PlannedRequest

TOO_MANY_TOKENS: Final = 200_000


@dataclass(frozen=True, slots=True)
class Poison:
    """`spoil` returns the request with one thing wrong; `code` is the name of the status that must come back."""

    code: str
    spoil: Callable[[PlannedRequest], PlannedRequest]


def _with(options: GenerateOptions) -> Callable[[PlannedRequest], PlannedRequest]:
    return lambda request: replace(request, options={**request.options, **options})


def _prompt(prompt: list[int]) -> Callable[[PlannedRequest], PlannedRequest]:
    return lambda request: replace(request, prompt=prompt)


POISONS: Final = {
    "empty_prompt": Poison("INVALID_ARGUMENT", _prompt([])),
    "token_out_of_range": Poison("INVALID_ARGUMENT", _prompt([5, 2**31])),
    "prompt_too_long": Poison("INVALID_ARGUMENT", _prompt([300] * TOO_MANY_TOKENS)),
    "max_tokens_zero": Poison("INVALID_ARGUMENT", _with({"max_tokens": 0})),
    "temperature_below_zero": Poison("INVALID_ARGUMENT", _with({"temperature": -1.0})),
    "top_p_above_one": Poison("INVALID_ARGUMENT", _with({"top_p": 1.5})),
    "too_many_stops": Poison("INVALID_ARGUMENT", _with({"stop": [f"stop {number}" for number in range(1_000)]})),
    "unknown_model": Poison("NOT_FOUND", lambda request: replace(request, model="no-such-model")),
}
