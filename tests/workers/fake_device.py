"""A `Device` whose keys and values are token ids, and which computes a step only when somebody waits for it.

So a host that reads too early, that changes what it handed over, or that tells the device too little, shows at once as
a wrong token. It says what `ToyRunner` says.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy

import numpy as np

from tests.workers.toy_engine import BLOCK_SIZE, VOCAB_SIZE, ToyEngine, toy_logprob, toy_token
from workers.device import DeviceResult, DeviceStep, Newcomer
from workers.device_runner import DeviceRunner

MAX_POSITIONS = 200
GRAPH_SIZES = (1, 2, 4)


class DeadDeviceError(RuntimeError):
    pass


class FakeTicket:
    def __init__(self, device: FakeDevice, step: DeviceStep) -> None:
        self._device = device
        self.step = step
        self.result: DeviceResult | None = None

    def wait(self) -> DeviceResult:
        self._device.compute_until(self)
        assert self.result is not None
        return self.result


class FakeDevice:
    """`poison`: after this token logits are not finite. `delay`: so many steps may wait to be computed."""

    graph_sizes = GRAPH_SIZES
    fatal_errors = (DeadDeviceError,)
    prefill_interval = 4

    def __init__(
        self, num_blocks: int, num_slots: int = 16, *, vocab_size: int = VOCAB_SIZE, poison: int | None = None
    ) -> None:
        self.num_slots = num_slots
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.poison = poison
        self.steps: list[DeviceStep] = []
        """All that were launched."""
        self.num_computed = 0
        self.is_closed = False
        self.is_dead = False
        self._pending: deque[FakeTicket] = deque()
        self._cache: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks + 1)]
        self._tokens = np.full((num_slots + 1, MAX_POSITIONS), -7)
        self._tables = np.full((num_slots + 1, MAX_POSITIONS // BLOCK_SIZE), num_blocks)
        self._known: dict[int, Newcomer] = {}
        self._last: DeviceStep | None = None

    def launch(self, step: DeviceStep) -> FakeTicket:
        if self.is_dead:
            raise DeadDeviceError("illegal memory access")
        ticket = FakeTicket(self, deepcopy(step))
        self._check(ticket.step)
        self.steps.append(ticket.step)
        self._pending.append(ticket)
        return ticket

    def close(self) -> None:
        self.is_closed = True

    def compute_until(self, ticket: FakeTicket) -> None:
        while ticket.result is None:
            first = self._pending.popleft()
            first.result = self._compute(first.step)
            self.num_computed += 1

    def _check(self, step: DeviceStep) -> None:
        """Assert what a device may rely on."""
        num_chunks, last = step.num_chunks, self.steps[-1] if self.steps else None
        padding = slice(num_chunks, None)
        assert len(step.slots) == len(step.starts) == len(step.counts)
        assert len(step.samples) == num_chunks
        assert len(set(step.slots[:num_chunks].tolist())) == num_chunks
        if step.is_decode:
            assert step.samples.all()
            assert len(step.slots) in GRAPH_SIZES or num_chunks == len(step.slots) > GRAPH_SIZES[-1]
            assert (step.counts == 1).all()
            assert (step.slots[padding] == self.num_slots).all()
            assert (step.starts[padding] == 0).all()
        else:
            assert len(step.slots) == num_chunks
        if step.goes_on:
            assert last is not None
            assert (last.slots == step.slots).all()
            assert (last.starts[:num_chunks] + 1 == step.starts[:num_chunks]).all()

    def _compute(self, step: DeviceStep) -> DeviceResult:
        for newcomer in step.newcomers:
            self._known[newcomer.slot] = newcomer
            self._tokens[newcomer.slot] = -7
            self._tokens[newcomer.slot, : len(newcomer.tokens)] = newcomer.tokens
            self._tables[newcomer.slot] = self.num_blocks
        for write in step.tables:
            self._tables[write.slot, write.start : write.start + len(write.blocks)] = write.blocks
        copied = [list(self._cache[source]) for source, _ in step.copies]
        for content, (_, target) in zip(copied, step.copies, strict=True):
            self._cache[target] = content
        drawn = []
        for i in range(step.num_chunks):
            slot, start, end = int(step.slots[i]), int(step.starts[i]), int(step.starts[i] + step.counts[i])
            for position in range(start, end):
                block = self._tables[slot, position // BLOCK_SIZE]
                self._cache[block][position % BLOCK_SIZE] = int(self._tokens[slot, position])
            known = self._tokens[slot, :end].tolist()
            read = [self._cache[self._tables[slot, p // BLOCK_SIZE]][p % BLOCK_SIZE] for p in range(end)]
            assert read == known, "a block does not hold what its sequence computed"
            assert -7 not in known
            if step.samples[i]:
                token = self._draw(slot, known, step.allowed.get(i))
                self._tokens[slot, end] = max(token, 0)
                drawn.append(token)
        tokens = np.array(drawn, dtype=np.int32)
        if step.num_logprobs is None:
            return DeviceResult(tokens)
        return _with_logprobs(tokens, max(int(step.num_logprobs.max()), 0))

    def _draw(self, slot: int, known: list[int], allowed: np.ndarray | None) -> int:
        if self.poison in known:
            return -1
        newcomer = self._known[slot]
        banned = newcomer.banned if len(known) < newcomer.banned_until else frozenset()
        if newcomer.temperature:
            known = [*known, newcomer.seed]
        token = toy_token(known, "", banned, self.vocab_size)
        return token if allowed is None else int(allowed[token % len(allowed)])


def _with_logprobs(tokens: np.ndarray, count: int) -> DeviceResult:
    logprobs = np.array([toy_logprob(token) for token in tokens.tolist()], dtype=np.float32)
    return DeviceResult(
        tokens, logprobs, tokens[:, None] + np.arange(count), np.full((len(tokens), count), -1.0, dtype=np.float32)
    )


def device_engine(device: FakeDevice, **options: object) -> ToyEngine:
    """Return an engine that is one step ahead of `device`."""
    return ToyEngine(
        device.num_blocks,
        runner=DeviceRunner(device, BLOCK_SIZE),  # type: ignore[arg-type]
        lag=DeviceRunner.lag,
        **options,  # type: ignore[arg-type]
    )
