"""The block tables that a device was told of are those of its sequences, whatever is scheduled."""

from __future__ import annotations

import random

import pytest

from tests.workers.fake_device import FakeDevice
from tests.workers.test_device_runner import FailingDevice
from tests.workers.toy_engine import BLOCK_SIZE, ToyEngine, assert_idle, work
from workers.device_runner import DeviceRunner, RunnerTicket
from workers.plan import StepPlan
from workers.types import GenerateWork, SamplingParams

VOCAB_SIZE = 4


class Anything:
    """A constraint that allows every token."""

    def mask(self) -> range:
        return range(VOCAB_SIZE)

    def advance(self, token_id: int) -> None:
        """The next may be any, too."""


class CheckedRunner(DeviceRunner):
    """Compares, after every launch, what the device was told with the tables themselves."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__(device, BLOCK_SIZE)
        self.device = device
        self.told: dict[int, dict[int, int]] = {}
        """By slot and place."""
        self.num_going_on = 0
        self.wrong: list[tuple[int, list[int]]] = []
        """Steps, and tables of which the device knew something else: an exception would only fail the sequences."""

    def launch(self, plan: StepPlan) -> RunnerTicket:
        ticket = super().launch(plan)
        step = self.device.steps[-1]
        for newcomer in step.newcomers:
            self.told[newcomer.slot] = {}
        for write in step.tables:
            self.told[write.slot].update(enumerate(write.blocks, write.start))
        for slot, chunk in zip(step.slots[: step.num_chunks].tolist(), plan.chunks, strict=True):
            num_blocks = -(-(chunk.start + chunk.num_tokens) // BLOCK_SIZE)
            told = [self.told[slot].get(place) for place in range(num_blocks)]
            if told != (table := chunk.sequence.block_table[:num_blocks]):
                self.wrong.append((plan.number, table))
        self.num_going_on += step.goes_on
        return ticket


def some_work(rng: random.Random, number: int) -> GenerateWork:
    """Of two tokens, so that prefixes collide and a sequence finds all of its blocks again; it fits the pool alone."""
    prompt = [rng.choice((0, 0, 1)) for _ in range(rng.randint(1, 9))]
    return work(
        number,
        prompt,
        rng.randint(4, 24),
        sampling=SamplingParams(temperature=0.0),
        n=rng.choice((1, 1, 1, 2)),
        priority=rng.randint(-1, 1),
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_step_that_goes_on_has_the_tables_of_the_last_one(seed: int) -> None:
    """It tells only of blocks that begin in it: no other table can have changed, see `_Decode.goes_on`. The pool is so
    small that sequences lose their blocks; some wait for their last token, so that nothing can be planned behind it;
    every other seed's device fails now and then."""
    rng = random.Random(seed)
    device = FailingDevice(9, num_slots=10, vocab_size=VOCAB_SIZE)
    runner = CheckedRunner(device)
    engine = ToyEngine(
        device.num_blocks,
        runner=runner,  # type: ignore[arg-type]
        lag=DeviceRunner.lag,
        chunk_tokens=rng.choice((3, 7, 30)),
        max_num_sequences=rng.choice((2, 3, 4)),
        constraint_for=lambda work: Anything() if work.work_id.number % 4 == 3 else None,
    )
    num_works = 0
    is_busy = True
    while is_busy or engine.load().num_steps < 600:
        is_open, dice = engine.load().num_steps < 600, rng.random()
        if is_open and dice < 0.1 and engine.load().num_waiting < 4:
            engine.submit(some_work(rng, num_works))
            num_works += 1
        elif is_open and dice > 0.995 and seed % 2:
            device.num_failures = 1
        is_busy = engine.step_checked()
        engine.drain_outputs()
    assert runner.wrong == []
    assert_idle(engine)
    assert engine.load().num_preemptions > 5
    assert runner.num_going_on > 50
