"""How the sequences in a device's slots are sampled, and what becomes of a step's logits by that.

Most steps take each row's largest logit, as the graph does by itself. `Sampling.apply` is for the others: allowed
tokens, stop tokens held back, bias, penalties, in the order of `workers.sampler`, then `Drawer.draw`. What has been
said so far is on the device, so penalties count tokens that the host has not read yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from workers.device import DeviceStep, Newcomer
from workers.gpu.drawing import Drawer
from workers.gpu.layout import Rows, StepMemory
from workers.sampler import MAX_REPETITION, uniforms


class Sampling:
    """Parameters of all slots, on the host."""

    def __init__(self, memory: StepMemory, drawer: Drawer) -> None:
        self._memory = memory
        self._drawer = drawer
        self._device = memory.cells.device
        count = memory.spare_slot + 1
        self._parameters: list[Newcomer | None] = [None] * count
        self._numbers = np.zeros((count, 5))
        """What `Drawer.draw` takes, but for the column that changes with the position."""
        self._seeds = [0] * count
        self._is_special = np.zeros(count, dtype=np.bool_)
        """Whether a slot's token is ever another than that of the largest logit."""
        self._is_altered = np.zeros(count, dtype=np.bool_)
        """Whether something is done to its logits before."""
        self._num_special = 0

    def take(self, newcomers: Iterable[Newcomer]) -> None:
        for newcomer in newcomers:
            slot = newcomer.slot
            is_altered = bool(_has_penalties(newcomer) or newcomer.logit_bias or newcomer.banned)
            is_special = is_altered or newcomer.temperature > 0
            self._num_special += is_special - int(self._is_special[slot])
            self._is_special[slot], self._is_altered[slot] = is_special, is_altered
            self._parameters[slot] = newcomer
            self._seeds[slot] = newcomer.seed
            least = float(np.log(np.float32(newcomer.min_p))) if newcomer.min_p > 0 else -math.inf
            self._numbers[slot] = (newcomer.temperature, 0.0, np.float32(newcomer.top_p), least, newcomer.top_k)

    def is_needed(self, step: DeviceStep) -> bool:
        """Whether `apply` must follow the logits of `step`."""
        if step.allowed or step.num_logprobs is not None:
            return True
        return self._num_special > 0 and bool(self._is_special[step.slots[: step.num_chunks][step.samples]].any())

    def apply(self, logits: torch.Tensor, step: DeviceStep, rows: Rows) -> Likeliest | None:
        """Draw from `logits` [n, vocab] fp32, which are overwritten: a row for each chunk of `step` that samples."""
        chunks = np.flatnonzero(step.samples)
        slots, positions = step.slots[chunks], (step.starts + step.counts)[chunks]
        likeliest = None if step.num_logprobs is None else Likeliest(logits, int(step.num_logprobs.max()))
        if step.allowed:
            self._restrict(logits, step, chunks.tolist())
        altered = [
            _Altered(row, self._of(slots[row]), int(positions[row]))
            for row in np.flatnonzero(self._is_altered[slots]).tolist()
        ]
        if altered:
            self._hold_back(logits, altered)
            self._add_bias(logits, altered)
            self._penalise(logits, [own for own in altered if _has_penalties(own.parameters)])
        numbers = self._numbers[slots]
        numbers[:, 1] = uniforms([self._seeds[slot] for slot in slots.tolist()], positions.tolist())
        sorts = bool(((numbers[:, 2] < 1) | (numbers[:, 4] > 0)).any())
        self._drawer.draw(logits, rows, self._upload(numbers), sorts=sorts)
        if likeliest is not None:
            likeliest.note(self._drawer.drawn[: len(chunks)])
        return likeliest

    def _of(self, slot: int) -> Newcomer:
        newcomer = self._parameters[slot]
        assert newcomer is not None
        return newcomer

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _restrict(self, logits: torch.Tensor, step: DeviceStep, chunks: Sequence[int]) -> None:
        for row, i in enumerate(chunks):
            if i in step.allowed:
                ids = self._upload(step.allowed[i].astype(np.int64))
                kept = logits[row, ids]
                logits[row] = -math.inf
                logits[row, ids] = kept

    def _hold_back(self, logits: torch.Tensor, altered: Sequence[_Altered]) -> None:
        pairs = [
            (own.row, token)
            for own in altered
            if own.position < own.parameters.banned_until
            for token in own.parameters.banned
        ]
        if pairs:
            row, token = self._upload(np.array(pairs, dtype=np.int64)).T
            logits[row, token] = -math.inf

    def _add_bias(self, logits: torch.Tensor, altered: Sequence[_Altered]) -> None:
        entries = [(own.row, token, bias) for own in altered for token, bias in own.parameters.logit_bias.items()]
        if entries:
            rows, tokens, biases = zip(*entries, strict=True)
            row, token = self._upload(np.array((rows, tokens), dtype=np.int64))
            logits[row, token] += self._upload(np.array(biases, dtype=np.float32))

    def _penalise(self, logits: torch.Tensor, altered: Sequence[_Altered]) -> None:
        """Repetition counts prompt and answer; presence and frequency count the answer."""
        if not altered:
            return
        vocab_size, count = logits.shape[1], len(altered)
        places = np.array(
            [(row, own.slot, position, own.num_prompt_tokens) for row, own, position in altered], dtype=np.int64
        )
        row, slot, length, num_prompt = self._upload(places).T
        longest = int(places[:, 2].max())
        said = self._memory.tokens[slot, :longest].long()
        at = torch.arange(longest, device=self._device)
        said = torch.where(at < length[:, None], said, vocab_size)
        in_answer = (at >= num_prompt[:, None]).float()
        counts = torch.zeros(count, vocab_size + 1, device=self._device).scatter_add_(1, said, in_answer)
        was_said = torch.zeros(count, vocab_size + 1, dtype=torch.bool, device=self._device)
        was_said.scatter_(1, said, torch.ones_like(said, dtype=torch.bool))
        counts, was_said = counts[:, :vocab_size], was_said[:, :vocab_size]
        factors = np.array([_factors(own.parameters) for own in altered], dtype=np.float32)
        repetition, frequency, presence = self._upload(factors).T[:, :, None]
        values = logits[row]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(was_said, repeated, values)
        logits[row] = values - frequency * counts - presence * (counts > 0)


class _Altered(NamedTuple):
    """A row whose logits are not taken as they are, and the position of its next token."""

    row: int
    parameters: Newcomer
    position: int


class Likeliest:
    """Log probabilities of the model's own, before anything is done to its logits."""

    def __init__(self, logits: torch.Tensor, count: int) -> None:
        self._total = logits.logsumexp(-1, keepdim=True)
        self._logits = logits.clone()
        values, ids = logits.topk(min(max(count, 0), logits.shape[1]), dim=-1)
        ids, order = ids.sort(-1)
        values, again = values.gather(1, order).sort(stable=True, dim=-1, descending=True)
        self.tokens = ids.gather(1, again).int()
        """[rows, count]: likeliest first, of equal ones the lower token."""
        self.values = values - self._total
        self.drawn = self._total
        """[rows, 1]: of the drawn tokens, when they were noted."""

    def note(self, drawn: torch.Tensor) -> None:
        self.drawn = self._logits.gather(1, drawn.long().clamp(min=0)[:, None]) - self._total


def _has_penalties(newcomer: Newcomer) -> bool:
    return (newcomer.repetition_penalty, newcomer.presence_penalty, newcomer.frequency_penalty) != (1.0, 0.0, 0.0)


def _factors(newcomer: Newcomer) -> tuple[float, float, float]:
    """Return the penalties for repetition, frequency and presence."""
    repetition = min(max(newcomer.repetition_penalty, 1 / MAX_REPETITION), MAX_REPETITION)
    return repetition, newcomer.frequency_penalty, newcomer.presence_penalty
