"""From logits to next tokens, each row by its own parameters.

Order and definitions are vLLM's: allowed tokens, stop tokens held back, bias, penalties, temperature, min_p, top_k,
top_p; temperature 0 takes the largest logit of what the penalties left. Log probabilities are the model's own, before
any of these: the log softmax of the raw logits, as vLLM's `raw_logprobs`.

Randomness has no state: the token at `position` of a sequence is chosen by one number u(seed, position) in [0, 1), as
the first token, in the order of ids, at which the cumulative probability exceeds u. So a sequence draws the same tokens
alone and in any batch, after a preemption and on another replica.

Needs numpy alone: a replica whose model the C library computes imports no torch. Rows are drawn one by one, since one
row and what is made of it stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from workers.types import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from workers.sequence import Sequence

Floats = npt.NDArray[np.float32]

NUM_CANDIDATES = 256
"""How many of the largest logits are looked at for top_p before all are sorted."""
MAX_REPETITION = 1e30
"""What a repetition penalty of more, or of less than one part in so many, counts as: logits stay finite."""


@dataclass(frozen=True, slots=True)
class Place:
    """One token to draw: that at `position` of `sequence`, as if `guesses` followed the tokens that it has."""

    sequence: Sequence
    position: int
    guesses: tuple[int, ...] = ()

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.sampling


@dataclass(frozen=True, slots=True)
class Drawn:
    tokens: list[int]
    logprobs: Mapping[int, TokenLogprobs]
    """By row, of those whose sequence has `num_logprobs`."""


def draw(logits: Floats, places: Seq[Place], best: Seq[int] | None = None) -> Drawn:
    """Choose the token at ``places[i]`` from ``logits[i]``; `logits` [n, vocab], contiguous, are overwritten.

    `best`, if the model's kernels looked for it, is the lowest token of each row's largest logit, -1 for a row that is
    not finite. Raises FloatingPointError if a row has NaN or infinity, or no allowed token.
    """
    if best is not None and all(map(_takes_the_largest, places)):
        if min(best) < 0:
            raise FloatingPointError(
                f"rows {[i for i, token in enumerate(best) if token < 0]} of the logits are not finite"
            )
        return Drawn(list(best), {})
    reported = [i for i, place in enumerate(places) if place.sequence.num_logprobs is not None]
    raw = logits[reported]
    _allow(logits, places)
    _ban(logits, places)
    _add_bias(logits, places)
    _penalise(logits, places)
    tokens = logits.argmax(axis=-1).tolist()
    largest = logits[np.arange(len(tokens)), tokens]
    if not np.isfinite(largest).all():
        rows = np.flatnonzero(~np.isfinite(largest)).tolist()
        raise FloatingPointError(f"rows {rows} of the logits are not finite, or allow no token")
    drawn = [i for i, place in enumerate(places) if not place.sampling.is_greedy]
    if drawn:
        numbers = uniforms([places[i].sampling.seed for i in drawn], [places[i].position for i in drawn])
        for i, number in zip(drawn, numbers.tolist(), strict=True):
            tokens[i] = _draw_randomly(logits[i] - largest[i], places[i].sampling, number)
    logprobs = {i: _log_probabilities(row, tokens[i], places[i]) for i, row in zip(reported, raw, strict=True)}
    return Drawn(tokens, logprobs)


def _takes_the_largest(place: Place) -> bool:
    """Whether the token is the largest logit's, whatever else the row holds."""
    sequence, sampling = place.sequence, place.sampling
    return (
        sampling.is_greedy
        and sequence.num_logprobs is None
        and sequence.constraint is None
        and not sampling.has_penalties
        and not sampling.logit_bias
        and not sequence.banned_at(place.position)
    )


def uniforms(seeds: Seq[int], positions: Seq[int]) -> npt.NDArray[np.float64]:
    """Return u(seed, position), multiples of 2^-32 in [0, 1): two rounds of SplitMix64 (Steele et al. 2014)."""
    seed = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    state = _mix(_mix(seed) + np.array(positions, dtype=np.uint64))
    return (state >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_randomly(logits: Floats, params: SamplingParams, number: float) -> int:
    """Choose from `logits` [vocab], which are overwritten and whose largest is 0: so a tiny temperature makes no
    infinity that is positive."""
    with np.errstate(over="ignore"):
        logits /= np.float32(params.temperature)
    least = -math.inf
    if params.min_p > 0:
        least = float(np.log(np.float32(params.min_p)))
    if 0 < params.top_k < len(logits):
        # And what equals the k-th largest.
        least = max(least, float(np.partition(logits, -params.top_k)[-params.top_k]))
    kept = None if least == -math.inf else np.flatnonzero(logits >= least)
    if kept is not None:
        logits = logits[kept]
    weights = _exp(logits)
    if params.top_p < 1.0:
        is_kept = logits >= _least_of_top_p(logits, float(weights.sum()) * float(np.float32(params.top_p)))
        kept = np.flatnonzero(is_kept) if kept is None else kept[is_kept]
        weights = weights[is_kept]
    cumulative = weights.cumsum(out=weights)
    chosen = int(cumulative.searchsorted(number * cumulative[-1], side="right"))
    return chosen if kept is None else int(kept[chosen])


def _least_of_top_p(logits: Floats, mass: float) -> float:
    """Return the least of the largest `logits`, of which every one has less than `mass` before it."""
    for count in (min(NUM_CANDIDATES, len(logits)), len(logits)):
        largest = np.sort(np.partition(logits, -count)[-count:])[::-1]
        weights = _exp(largest)
        num_kept = max(1, int((weights.cumsum() - weights < mass).sum()))
        if num_kept < count:
            break
    return float(largest[num_kept - 1])


def _exp(logits: Floats) -> npt.NDArray[np.float64]:
    weights = logits.astype(np.float64)
    return np.exp(weights, out=weights)


def _log_probabilities(logits: Floats, token: int, place: Place) -> TokenLogprobs:
    """Return the log probability of `token` by `logits` [vocab] and those of the largest, as many as are asked for."""
    largest = logits.max()
    total = largest + np.log(np.exp(logits - largest).sum(dtype=np.float64)).astype(np.float32)
    count = min(place.sequence.num_logprobs or 0, len(logits))
    ids = np.argpartition(logits, -count)[-count:] if count else np.empty(0, dtype=np.intp)
    ids = ids[np.lexsort((ids, -logits[ids]))]
    values = (logits[ids] - total).tolist()
    return TokenLogprobs(float(logits[token] - total), tuple(zip(ids.tolist(), values, strict=True)))


def _allow(logits: Floats, places: Seq[Place]) -> None:
    for i, place in enumerate(places):
        if place.sequence.constraint is not None:
            forbidden = np.ones(logits.shape[-1], dtype=np.bool_)
            forbidden[np.array(place.sequence.constraint.mask(), dtype=np.intp)] = False
            logits[i, forbidden] = -math.inf


def _ban(logits: Floats, places: Seq[Place]) -> None:
    for i, place in enumerate(places):
        banned = list(place.sequence.banned_at(place.position))
        if banned:
            logits[i, banned] = -math.inf


def _add_bias(logits: Floats, places: Seq[Place]) -> None:
    for i, place in enumerate(places):
        if place.sampling.logit_bias:
            tokens, biases = zip(*place.sampling.logit_bias.items(), strict=True)
            logits[i, list(tokens)] += np.array(biases, dtype=np.float32)


def _penalise(logits: Floats, places: Seq[Place]) -> None:
    """Repetition counts prompt and answer; presence and frequency count the answer; guesses belong to the answer.

    Works on the tokens that occur, not on whole rows.
    """
    for i, place in enumerate(places):
        params = place.sampling
        if not params.has_penalties:
            continue
        tokens = np.array([*place.sequence.tokens, *place.guesses], dtype=np.intp)
        in_answer = np.arange(len(tokens)) >= place.sequence.num_prompt_tokens
        distinct, inverse = np.unique(tokens, return_inverse=True)
        counts = np.bincount(inverse, weights=in_answer).astype(np.float32)
        values = logits[i, distinct]
        repetition = np.float32(min(max(params.repetition_penalty, 1 / MAX_REPETITION), MAX_REPETITION))
        values = np.where(values > 0, values / repetition, values * repetition)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        logits[i, distinct] = values
