"""How often steps of sequences that decode have prompts in them."""

from __future__ import annotations

from tests.workers.fake_device import FakeDevice, device_engine
from tests.workers.toy_engine import toy_answer, work
from workers.pace import PrefillPace
from workers.sequence import Sequence
from workers.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
INTERVAL = FakeDevice.prefill_interval


def waiting(*lengths: int) -> list[Sequence]:
    return [Sequence(work(number, range(length))) for number, length in enumerate(lengths)]


def test_who_comes_after_a_pause_does_not_wait() -> None:
    pace = PrefillPace(lambda: 4, 100)
    assert pace.admits(waiting(5))
    pace.count(has_prefill=True)
    for _ in range(3):
        assert not pace.admits(waiting(5))
        pace.count(has_prefill=False)
    for _ in range(3):
        assert pace.admits(waiting(5))
        pace.count(has_prefill=False)


def test_enough_to_fill_a_step_does_not_wait_nor_one_that_is_due() -> None:
    pace = PrefillPace(lambda: 4, 100)
    pace.count(has_prefill=True)
    assert not pace.admits(waiting(60, 39))
    assert pace.admits(waiting(60, 40))
    overdue = waiting(5)
    overdue[0].is_due = True
    assert pace.admits(overdue)
    spared = waiting(200)
    spared[0].num_spared = 150
    assert not pace.admits(spared), "what others compute is not its own"


def test_how_many_steps_wait_is_what_is_said_of_the_last_one_with_prompts() -> None:
    interval = 1
    pace = PrefillPace(lambda: interval, 100)
    pace.count(has_prefill=True)
    interval = 3  # of that step, once it was launched
    assert not pace.admits(waiting(5))
    pace.count(has_prefill=False)
    interval = 1  # of another
    assert not pace.admits(waiting(5))
    pace.count(has_prefill=False)
    assert pace.admits(waiting(5))


def test_nobody_who_is_asked_late_waits_longer() -> None:
    """In the steps after the first nobody came."""
    pace = PrefillPace(lambda: 3, 100)
    pace.count(has_prefill=True)
    pace.count(has_prefill=False)
    assert not pace.admits(waiting(5))
    pace.count(has_prefill=False)
    assert pace.admits(waiting(5))


def test_an_interval_of_one_lets_everybody_in() -> None:
    pace = PrefillPace(lambda: 1, 100)
    for _ in range(3):
        assert pace.admits(waiting(1))
        pace.count(has_prefill=True)


def test_newcomers_to_sequences_that_decode_share_a_step() -> None:
    """One came in each step, and no step was a graph."""
    device = FakeDevice(64)
    engine = device_engine(device, chunk_tokens=64, max_num_sequences=16)
    works = [work(number, [number + 1, 2, 3], 30, sampling=GREEDY) for number in range(9)]
    for one in works:
        engine.submit(one)
        engine.step_checked()
    answers = engine.run()
    assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in works}
    with_prompts = [number for number, step in enumerate(device.steps) if not step.is_decode]
    assert with_prompts == [0, INTERVAL, 2 * INTERVAL]
    assert [len(device.steps[number].newcomers) for number in with_prompts] == [1, 4, 4]


def test_without_sequences_that_decode_nobody_waits() -> None:
    engine = device_engine(FakeDevice(64))
    for number in range(3):
        engine.submit(work(number, [number + 1, 2], 1, sampling=GREEDY))
        engine.step_checked()
        assert engine.load().num_waiting == 0
    engine.run()
