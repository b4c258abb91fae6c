"""What a client has of an answer from before an interruption: its rules, and the choices that begin with it.

One list of token ids for each choice. A list may have its choice's end as its last token, found here as it would have
been found while it was generated; behind that end there is nothing. Knows neither calls nor replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache

from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.types_pb2 import FINISH_REASON_LENGTH, Finish

from router.choice import Choice
from router.detokenizer import StopStrings
from router.model import ServedModel
from router.types import Request
from router.violations import Violations, check_token_ids

MAX_INLINE_RECEIVED = 512
"""More received tokens, about a millisecond's work, are looked through in a thread."""

MAX_LISTS = 1_024
"""More than any request may have choices: what is behind them is not looked at, and the request refused."""

MAX_KEPT_STOPS, MAX_KEPT_CHARACTERS = 128, 256
"""So many sets of stop strings, none with more characters, are kept ready: requests tend to bring the same ones, and to
prepare two takes as long as a tenth of all else that a router does for a request."""

FIELD = "received_token_ids"


def num_received(message: GenerateRequest) -> int:
    if not message.received_token_ids:
        return 0
    return sum(len(each.ids) for each in message.received_token_ids[:MAX_LISTS])


def check_received(
    message: GenerateRequest, num_choices: int, num_generated: int, model: ServedModel, violations: Violations
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens that each choice continues after, or nothing if the answer begins. What they make of the
    choices is for `new_choices` to check."""
    lists = message.received_token_ids
    if not num_received(message) and len(lists) in (0, num_choices):
        return ()
    rule = f"must be empty with best_of > n = {num_choices}, of which nothing is sent before its end"
    violations.require(num_generated <= num_choices, FIELD, rule, f"{len(lists)} lists")
    rule = f"must have one list for each choice, of which there are {num_choices}"
    violations.require(len(lists) == num_choices, FIELD, rule, len(lists))
    for i, each in enumerate(lists[:num_choices]):
        check_token_ids(each.ids, f"{FIELD}[{i}].ids", model, violations)
    return tuple(tuple(each.ids) for each in lists)


async def new_choices(
    request: Request, stops: Sequence[str], model: ServedModel, violations: Violations
) -> list[Choice]:
    """Return what the choices that are generated begin as; suspends only for more than `MAX_INLINE_RECEIVED` tokens."""
    strings = stop_strings(tuple(stops)) if stops else None
    choices = [
        Choice(
            model.tokenizer.detokenizer(strings),
            stop_token_ids=request.stop_token_ids,
            min_tokens=request.min_tokens,
        )
        for _ in range(request.n)
    ]
    if sum(map(len, request.received)) <= MAX_INLINE_RECEIVED:
        _receive(choices, request, violations)
    else:
        await asyncio.to_thread(_receive, choices, request, violations)
    return choices


def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """Return what finds `stops` in a text: a value, which several answers may share."""
    return _kept_stops(stops) if sum(map(len, stops)) <= MAX_KEPT_CHARACTERS else StopStrings(stops)


_kept_stops = lru_cache(MAX_KEPT_STOPS)(StopStrings)


def _receive(choices: Sequence[Choice], request: Request, violations: Violations) -> None:
    for i, (choice, token_ids) in enumerate(zip(choices, request.received, strict=False)):
        num_behind = len(token_ids) - choice.receive(token_ids, request.max_tokens)
        if num_behind:
            assert choice.finish is not None
            rule = "must have no tokens after its choice's end"
            violations.require(False, f"{FIELD}[{i}]", rule, f"{num_behind} after {_end(choice.finish)}")


def _end(finish: Finish) -> str:
    if finish.reason == FINISH_REASON_LENGTH:
        return "max_tokens"
    return f"stop token {finish.stop_token_id}" if finish.HasField("stop_token_id") else f"stop string {finish.stop!r}"
