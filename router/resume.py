"""What is left of a request whose replica is gone: a request for the rest of its answer, for another replica. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from router.types import Request
from workers.types import Finish, FinishReason


def finish_of(token_ids: Sequence[int], request: Request) -> Finish | None:
    """Return how a choice with these tokens has ended, though its replica could not say so any more; None if it goes
    on."""
    if len(token_ids) >= request.max_tokens:
        return Finish(reason=FinishReason.LENGTH)
    if token_ids and token_ids[-1] in request.stop_token_ids and len(token_ids) > request.min_tokens:
        return Finish(reason=FinishReason.STOP, stop_token_id=token_ids[-1])
    return None


def continued(request: Request, known: Callable[[int], Sequence[int]], open_choices: Collection[int]) -> Request:
    """Return a request that goes on where `request` is now. ``known(i)``: all tokens of choice i. Of a choice that is
    not open nothing is given: nobody waits for it, and it is cut off as soon as it is sent."""
    received = tuple(list(known(index)) if index in open_choices else [] for index in range(request.n))
    return replace(request, received=received if any(received) else ())
