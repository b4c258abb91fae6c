"""The oracle's rule for an answer that came from somewhere else: token ids in, verdict out.

    exact   wherever the reference prefers a token by 2e-3 or more, that token was answered
    int8    where another one was answered, the reference preferred its own by tau at most: twice the largest error that
            rounding the inputs of its linear layers to int8, per row and group of 32, makes in the reference itself on
            this prompt and answer
    bf16    the same with inputs rounded to bf16, which is less than transformers' own bf16 rounds

The reference is asked after the same tokens each time, so one different token does not make all later ones different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from load_tests.rigs.reference import GAP, gaps, reference_logits

GROUP = 32
Rounding = Callable[[torch.Tensor], torch.Tensor]
TAU = 2.0
"""Multiple of the reference's own largest error with rounded activations, as it is for bf16."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of tokens. `num_different` are not the reference's choice, `num_wrong` of them are not excused."""

    num_tokens: int
    num_different: int
    num_wrong: int
    largest_gap: float
    """By which the reference preferred its own token, of those that are different."""
    limit: float
    """The gap up to which, or below which, a different token is excused."""


def judge(model: Any, prompt: Sequence[int], answer: Sequence[int], arithmetic: str) -> Verdict:
    """Judge an answer to `prompt` by `model`, the fp32 reference."""
    tokens = [*prompt, *answer]
    expected = reference_logits(model, tokens)[len(prompt) - 1 : -1]
    different = expected.argmax(-1) != torch.tensor(answer)
    limit = GAP
    if arithmetic in ROUNDINGS and different.any():
        with rounded_activations(model, ROUNDINGS[arithmetic]):
            rounded = reference_logits(model, tokens)[len(prompt) - 1 : -1]
        limit = TAU * (rounded - expected).abs().max().item()
    preferred = gaps(expected)[different]
    return Verdict(
        num_tokens=len(answer),
        num_different=int(different.sum()),
        num_wrong=int((preferred >= limit).sum()),
        largest_gap=preferred.max().item() if len(preferred) else 0.0,
        limit=limit,
    )


@contextmanager
def rounded_activations(model: Any, rounding: Rounding) -> Iterator[None]:
    """For the scope, round the inputs of every linear layer of `model`."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., inputs] rounded to int8 by groups of 32 inputs, the largest of each being 127."""
    groups = x.reshape(-1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).reshape(x.shape)


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


ROUNDINGS: dict[str, Rounding] = {"int8": to_int8, "bf16": to_bf16}
