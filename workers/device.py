"""The seam between the runner of an accelerator and the accelerator: steps go down as arrays, tokens come back.

A device keeps, for each *slot*, what a sequence needs of it while it runs:

    tokens[slot, position]   written once by the host, and one by one by the sampler of each step
    table[slot, i]           the blocks of its keys and values
    parameters               of sampling

so that a token feeds the next step without the host, which learns of it a step later. Row (slot, position) of a step
has ``tokens[slot, position]`` as its input, and the token drawn behind it goes to ``tokens[slot, position + 1]``.
Knows neither sequences nor the engine. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TableWrite:
    """``table[slot, start : start + len(blocks)] = blocks``."""

    slot: int
    start: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """All of a sequence that a slot is given to, in place of what was known of the slot before. `tokens` is the
    engine's own list, which grows after `launch`."""

    slot: int
    tokens: list[int]
    num_prompt_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    """In [0, 2^64)."""
    logit_bias: Mapping[int, float]
    banned: frozenset[int]
    """Not to be drawn for positions below `banned_until`."""
    banned_until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep:
    """What a step computes. Chunks are the plan's, in its order: (slot, start, count) is `count` rows of one sequence.

    What came since the last step is applied first, in the order of the fields: newcomers, tables, copies. Arrays are
    the runner's own and change after `launch`.
    """

    slots: Ints
    starts: Ints
    counts: Ints
    """Each [num_padded]. In a decode step the chunks behind `num_chunks` are padding for its bucket: one row each at
    position 0 of the spare slot, `Device.num_slots`, whose only block is the spare one."""
    num_chunks: int
    is_decode: bool
    """Whether every chunk is one row, from which a token is drawn."""
    goes_on: bool
    """Whether this step is the last one with all its positions moved on by one, padding apart."""
    samples: npt.NDArray[np.bool_]
    """[num_chunks]: whether a token is drawn behind the chunk's last row."""
    newcomers: list[Newcomer] = field(default_factory=list)
    tables: list[TableWrite] = field(default_factory=list)
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks (from, to), all read before any is written."""
    num_logprobs: Ints | None = None
    """[num_chunks]: how many of the likeliest tokens go with the drawn one; -1: no log probabilities. None: no chunk
    has any."""
    allowed: Mapping[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    """By chunk: the only tokens that may be drawn."""


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """Of the chunks that sample, in their order. Arrays may be overwritten when this many more steps were launched as
    the device has tickets."""

    tokens: Ints
    """[n]; negative: the logits are not finite, or allow no token. (The next step, on its way by then, has some token
    or other in that place.)"""
    logprobs: Floats | None = None
    """[n]: of the drawn tokens. None if the step has no `num_logprobs`."""
    top_tokens: Ints | None = None
    top_logprobs: Floats | None = None
    """[n, k], k the largest of `num_logprobs`, likeliest first, of equal ones the lower token."""


class DeviceTicket(Protocol):
    def wait(self) -> DeviceResult:
        """Wait for the step, without the interpreter's lock, and return what it brought. In order of launch."""


class Device(Protocol):
    """Computes steps one after the other, in the order of their launch."""

    @property
    def num_slots(self) -> int: ...

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Ascending: to how many rows decode steps are padded. Those with more are computed as they are."""

    @property
    def prefill_interval(self) -> int:
        """If the step that was launched last had prompts: the how manieth after it should have some again, see
        `workers.pace`."""

    @property
    def fatal_errors(self) -> tuple[type[Exception], ...]:
        """What `launch` and a ticket raise once nothing can be computed any more."""

    def launch(self, step: DeviceStep) -> DeviceTicket:
        """Begin to compute `step` and return at once, unless there are too many tickets that nobody waited for."""

    def close(self) -> None: ...
