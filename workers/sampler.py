"""From logits to next tokens, each row by its own parameters.

Order and definitions are vLLM's: allowed tokens, stop tokens held back, bias, penalties, temperature, min_p, top_k,
top_p; temperature 0 takes the largest logit of what the penalties left. Log probabilities are the model's own, before
any of these: the log softmax of the raw logits, as vLLM's `raw_logprobs`.

Randomness has no state: the token at `position` of a sequence is chosen by one number u(seed, position) in [0, 1), as
the first token, in the order of ids, at which the cumulative probability exceeds u. So a sequence draws the same tokens
alone and in any batch, after a preemption and on another replica.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workers.types import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from workers.sequence import Sequence

NUM_CANDIDATES = 256
"""How many of the largest logits are looked at for top_p before all are sorted."""


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


def draw(logits: torch.Tensor, places: Seq[Place], best: Seq[int] | None = None) -> Drawn:
    """Choose the token at ``places[i]`` from ``logits[i]``; `logits` [n, vocab] are overwritten.

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
    raw = logits[reported] if reported else logits[:0]
    _allow(logits, places)
    _ban(logits, places)
    _add_bias(logits, places)
    _penalise(logits, places)
    largest, tokens = logits.max(dim=-1)
    if not largest.isfinite().all():
        rows = (~largest.isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"rows {rows} of the logits are not finite, or allow no token")
    drawn = [i for i, place in enumerate(places) if not place.sampling.is_greedy]
    if drawn:
        params = [places[i].sampling for i in drawn]
        positions = [places[i].position for i in drawn]
        tokens[drawn] = _draw_randomly(logits[drawn] - largest[drawn, None], params, positions)
    if not reported:
        return Drawn(tokens.tolist(), {})
    counts = [places[i].sequence.num_logprobs or 0 for i in reported]
    return Drawn(tokens.tolist(), dict(zip(reported, _log_probabilities(raw, tokens[reported], counts), strict=True)))


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


def uniforms(seeds: Seq[int], positions: Seq[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return u(seed, position), multiples of 2^-32 in [0, 1): two rounds of SplitMix64 (Steele et al. 2014)."""
    seed = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    state = _mix(_mix(seed) + np.array(positions, dtype=np.uint64))
    return (state >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _mix(state: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_randomly(logits: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> torch.Tensor:
    """Choose from `logits` [n, vocab], whose largest is 0 in each row: so a tiny temperature makes no infinity."""
    logits = logits / _column(params, lambda p: p.temperature)
    min_p = _column(params, lambda p: p.min_p)
    if min_p.any():
        logits.masked_fill_(logits < min_p.log(), -math.inf)
    _keep_top_k(logits, params)
    _keep_top_p(logits, params)
    cumulative = logits.double().exp_().cumsum(-1)
    chosen = torch.from_numpy(uniforms([p.seed for p in params], positions))[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chosen, right=True).flatten()


def _keep_top_k(logits: torch.Tensor, params: Seq[SamplingParams]) -> None:
    """Keep the k largest of each row, and what equals the k-th."""
    vocab = logits.shape[-1]
    counts = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    limited = [i for i, count in enumerate(counts) if count < vocab]
    if not limited:
        return
    counts = [counts[i] for i in limited]
    largest = logits[limited].topk(max(counts)).values
    smallest = torch.full((len(logits), 1), -math.inf)
    smallest[limited] = largest.gather(1, torch.tensor(counts)[:, None] - 1)
    logits.masked_fill_(logits < smallest, -math.inf)


def _keep_top_p(logits: torch.Tensor, params: Seq[SamplingParams]) -> None:
    """Keep the largest of each row until their probabilities reach p: every token before which the sum is below p."""
    limited = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if not limited:
        return
    rows = logits[limited]
    mass = rows.double().exp().sum(-1, keepdim=True) * _column([params[i] for i in limited], lambda p: p.top_p)
    for count in (min(NUM_CANDIDATES, rows.shape[-1]), rows.shape[-1]):
        largest = rows.topk(count).values
        weights = largest.double().exp_()
        is_kept = weights.cumsum(-1) - weights < mass
        is_kept[:, 0] = True
        if not is_kept[:, -1].any():
            break
    smallest = torch.full((len(logits), 1), -math.inf)
    smallest[limited] = largest.masked_fill_(~is_kept, math.inf).amin(-1, keepdim=True)
    logits.masked_fill_(logits < smallest, -math.inf)


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, counts: Seq[int]) -> list[TokenLogprobs]:
    """Return the log probability of ``tokens[i]`` in row i of `logits` [n, vocab] and of its ``counts[i]`` largest."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(1, tokens[:, None]) - total).flatten().tolist()
    values, ids = logits.topk(min(max(counts), logits.shape[-1]))
    rows = zip(chosen, ids.tolist(), (values - total).tolist(), counts, strict=True)
    return [
        TokenLogprobs(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, row_ids, row_values, count in rows
    ]


def _allow(logits: torch.Tensor, places: Seq[Place]) -> None:
    for i, place in enumerate(places):
        if place.sequence.constraint is not None:
            forbidden = torch.ones(logits.shape[-1], dtype=torch.bool)
            forbidden[torch.tensor(place.sequence.constraint.mask(), dtype=torch.int64)] = False
            logits[i].masked_fill_(forbidden, -math.inf)


def _ban(logits: torch.Tensor, places: Seq[Place]) -> None:
    pairs = [(i, token) for i, place in enumerate(places) for token in place.sequence.banned_at(place.position)]
    if pairs:
        rows, tokens = torch.tensor(pairs).unbind(1)
        logits[rows, tokens] = -math.inf


def _add_bias(logits: torch.Tensor, places: Seq[Place]) -> None:
    entries = [(i, *entry) for i, place in enumerate(places) for entry in place.sampling.logit_bias.items()]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        logits[torch.tensor(rows), torch.tensor(tokens)] += torch.tensor(biases, dtype=torch.float32)


def _penalise(logits: torch.Tensor, places: Seq[Place]) -> None:
    """Repetition counts prompt and answer; presence and frequency count the answer; guesses belong to the answer.

    Works on the (row, token) pairs that occur, as numbers row * vocab + token, not on whole rows.
    """
    rows = [i for i, place in enumerate(places) if place.sampling.has_penalties]
    if not rows:
        return
    known = [[*places[i].sequence.tokens, *places[i].guesses] for i in rows]
    vocab = logits.shape[-1]
    pairs = np.concatenate(
        [np.array(tokens, dtype=np.int64) + i * vocab for i, tokens in zip(rows, known, strict=True)]
    )
    in_answer = np.concatenate(
        [np.arange(len(tokens)) >= places[i].sequence.num_prompt_tokens for i, tokens in zip(rows, known, strict=True)]
    )
    distinct, inverse = np.unique(pairs, return_inverse=True)
    counts = torch.from_numpy(np.bincount(inverse, weights=in_answer)).float()
    params = [place.sampling for place in places]
    row = torch.from_numpy(distinct // vocab)
    repetition = _column(params, lambda p: p.repetition_penalty).flatten()[row]
    frequency = _column(params, lambda p: p.frequency_penalty).flatten()[row]
    presence = _column(params, lambda p: p.presence_penalty).flatten()[row]

    index = torch.from_numpy(distinct)
    values = logits.view(-1)[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits.view(-1)[index] = values - frequency * counts - presence * (counts > 0)


def _column(params: Seq[SamplingParams], get: Callable[[SamplingParams], float]) -> torch.Tensor:
    """Return [n, 1] of one parameter."""
    return torch.tensor([get(p) for p in params], dtype=torch.float32)[:, None]
