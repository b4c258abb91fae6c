"""Tokens drawn on the device are those that the CPU's sampler draws, whatever is asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from workers import sampler
from workers.device import DeviceStep, Newcomer
from workers.gpu import drawing
from workers.gpu.drawing import Drawer
from workers.gpu.layout import Rows, StepMemory
from workers.gpu.parameters import Likeliest, Sampling
from workers.sampler import Place
from workers.sequence import Sequence
from workers.types import GenerateWork, SamplingParams, WorkId

VOCAB = 300
HISTORY = [*range(40, 52), 44, 45, 44]
NUM_PROMPT = 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row, and candidates that are not always enough."""
    monkeypatch.setattr(drawing, "_TILE", 256)
    monkeypatch.setattr(drawing, "NUM_CANDIDATES", 16)


class Drawn:
    """A step of one row for each of `params`, all of which have said HISTORY."""

    def __init__(self, device: torch.device, params: list[SamplingParams], **work: Any) -> None:
        self.params, self.work = params, work
        count = len(params)
        self.memory = StepMemory(num_slots=count, max_tokens=40, block_size=4, num_blocks=9, device=device)
        self.memory.tokens[:count, : len(HISTORY)] = torch.tensor(HISTORY, device=device)
        self.drawer = Drawer(count, self.memory, device)
        self.sampling = Sampling(self.memory, self.drawer)
        slots = torch.arange(count, dtype=torch.int32, device=device)
        self.rows = Rows(slots, torch.full_like(slots, len(HISTORY) - 1))
        self.sequences = [self._sequence(own) for own in params]
        self.sampling.take(self._newcomer(i, own) for i, own in enumerate(params))

    def step(self, **changes: Any) -> DeviceStep:
        count = len(self.params)
        rows = np.arange(count, dtype=np.int32), np.full(count, len(HISTORY) - 1, np.int32), np.ones(count, np.int32)
        return DeviceStep(
            slots=rows[0], starts=rows[1], counts=rows[2], num_chunks=count, is_decode=True, goes_on=False,
            samples=np.ones(count, dtype=np.bool_), **changes,
        )  # fmt: skip

    def tokens(self, logits: torch.Tensor, **changes: Any) -> list[int]:
        step = self.step(**changes)
        assert self.sampling.is_needed(step)
        self.sampling.apply(logits.clone(), step, self.rows)
        drawn = self.drawer.drawn[: len(self.params)]
        assert torch.equal(self.memory.tokens[: len(drawn), len(HISTORY)], drawn.clamp(min=0))
        return drawn.tolist()

    def expected(self, logits: torch.Tensor) -> list[int]:
        places = [Place(sequence, len(HISTORY)) for sequence in self.sequences]
        return sampler.draw(logits.cpu().numpy().copy(), places).tokens

    def _sequence(self, params: SamplingParams) -> Sequence:
        work = GenerateWork(
            work_id=WorkId("test", 0), prompt=HISTORY[:NUM_PROMPT], max_tokens=20, sampling=params, **self.work
        )
        sequence = Sequence(work)
        sequence.tokens[:] = HISTORY
        return sequence

    def _newcomer(self, slot: int, params: SamplingParams) -> Newcomer:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        return Newcomer(
            slot=slot, tokens=HISTORY, num_prompt_tokens=NUM_PROMPT, frequency_penalty=params.frequency_penalty,
            seed=params.seed % 2**64, logit_bias=params.logit_bias,
            banned=self.work.get("stop_token_ids", frozenset()),
            banned_until=NUM_PROMPT + self.work.get("min_tokens", 0), **{name: getattr(params, name) for name in names},
        )  # fmt: skip


KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.5, "top_p": 0.3},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.99},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.5},
    {"temperature": 2.0, "min_p": 0.05, "top_p": 0.9},
    {"temperature": 1e-4, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 0.0, "repetition_penalty": 5.0, "logit_bias": {44: 9.0, 50: -3.0}},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 0.5},
]


def test_draws_what_the_sampler_draws(device: torch.device) -> None:
    params = [SamplingParams(seed=seed, **kind) for seed, kind in enumerate(KINDS)]
    drawn, logits = Drawn(device, params), torch.randn(len(params), VOCAB, device=device) * 3
    assert drawn.tokens(logits) == drawn.expected(logits)


def test_equal_logits_are_kept_or_dropped_together(device: torch.device) -> None:
    kinds = [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 40}, {"top_p": 0.99}, {}]
    params = [SamplingParams(seed=seed, temperature=1.0, **kind) for seed, kind in enumerate(kinds)]
    drawn = Drawn(device, params)
    logits = torch.randint(0, 4, (len(params), VOCAB), device=device).float()
    assert drawn.tokens(logits) == drawn.expected(logits)


def test_tokens_that_must_not_end_an_answer_are_held_back(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB, device=device)
    logits[:, 7] = 5.0
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias={9: 1.0})]
    early = Drawn(device, params, stop_token_ids=frozenset({7}), min_tokens=len(HISTORY) - NUM_PROMPT + 1)
    assert early.tokens(logits) == early.expected(logits) == [0, 9]
    late = Drawn(device, params, stop_token_ids=frozenset({7}), min_tokens=len(HISTORY) - NUM_PROMPT)
    assert late.tokens(logits) == late.expected(logits) == [7, 7]


def test_only_allowed_tokens_are_drawn(device: torch.device) -> None:
    drawn = Drawn(device, [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=3)])
    logits = torch.randn(2, VOCAB, device=device)
    allowed = np.array([5, 9, 250], dtype=np.int32)
    logits[0, 9] = logits[0, allowed].max() + 1
    assert drawn.tokens(logits, allowed={0: allowed}) == [9, drawn.expected(logits)[1]]


def test_rows_that_are_not_finite_give_no_token(device: torch.device) -> None:
    drawn = Drawn(device, [SamplingParams(temperature=1.0, seed=1)] * 4)
    logits = torch.randn(4, VOCAB, device=device)
    logits[0, 3], logits[1, 299], logits[2] = math.nan, math.inf, -math.inf
    assert drawn.tokens(logits)[:3] == [-1, -1, -1]
    drawn.drawer.take_largest(logits, drawn.rows)
    assert drawn.drawer.drawn[:4].tolist() == [-1, -1, -1, int(logits[3].argmax())]


def test_the_largest_is_the_lowest_of_equals_and_the_next_input(device: torch.device) -> None:
    drawn = Drawn(device, [SamplingParams(temperature=0.0)] * 2)
    assert not drawn.sampling.is_needed(drawn.step())
    logits = torch.randn(2, VOCAB, device=device)
    logits[0, [70, 71, 290]] = 9.0
    drawn.drawer.take_largest(logits, drawn.rows)
    expected = [70, int(logits[1].argmax())]
    assert drawn.drawer.drawn[:2].tolist() == drawn.memory.tokens[:2, len(HISTORY)].tolist() == expected


def test_a_slot_forgets_how_its_former_holder_was_sampled(device: torch.device) -> None:
    drawn = Drawn(device, [SamplingParams(temperature=1.0, seed=1)])
    assert drawn.sampling.is_needed(drawn.step())
    drawn.sampling.take([drawn._newcomer(0, SamplingParams(temperature=0.0))])
    assert not drawn.sampling.is_needed(drawn.step())


def test_log_probabilities_are_the_models_own(device: torch.device) -> None:
    logits = torch.randn(2, VOCAB, device=device)
    logits[0, [8, 4]] = 7.0
    likeliest = Likeliest(logits, 3)
    expected = logits.log_softmax(-1)
    logits.zero_()  # what is done to them later is nothing to it
    likeliest.note(torch.tensor([8, -1], dtype=torch.int32, device=device))
    assert likeliest.tokens[0, :2].tolist() == [4, 8]
    torch.testing.assert_close(likeliest.values, expected.gather(1, likeliest.tokens.long()))
    torch.testing.assert_close(likeliest.drawn[0, 0], expected[0, 8])
