"""When tokens leave the engine's thread."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.emission import FEW, Emission

FIRST = LAST = True
NEXT = False


def due_after(emission: Emission, steps: list[bool], step_s: float, *, num_deltas: int = 1) -> list[int]:
    """Return how many tokens leave after each step, of which each has `num_deltas`, urgent ones or not."""
    left, waiting = [], 0
    for number, is_urgent in enumerate(steps):
        waiting += num_deltas
        emission.add(num_deltas, is_urgent=is_urgent)
        is_due = emission.is_due(step_s=step_s, now=number * step_s, is_last=False)
        left.append(waiting if is_due else 0)
        waiting = 0 if is_due else waiting
    return left


def test_the_first_and_the_last_leave_at_once_and_others_together() -> None:
    steps = [FIRST, *[NEXT] * 7, LAST]
    assert due_after(Emission(0.016), steps, 0.006) == [1, 0, 0, 3, 0, 0, 3, 0, 2]
    assert due_after(Emission(0.016), steps, 0.009) == [1, 0, 2, 0, 2, 0, 2, 0, 2]


def test_many_tokens_need_not_wait_for_more() -> None:
    """64 streams at 2 ms a step waited for 16 ms and gained little."""
    assert due_after(Emission(0.016), [NEXT] * 6, 0.005, num_deltas=FEW) == [0, 256, 0, 256, 0, 256]
    assert due_after(Emission(0.016), [NEXT] * 6, 0.002, num_deltas=64) == [0, 0, 0, 0, 320, 0]
    assert due_after(Emission(0.016), [NEXT] * 6, 0.005, num_deltas=64) == [0, 0, 192, 0, 0, 192]
    assert due_after(Emission(0.016), [NEXT] * 6, 0.005, num_deltas=4 * FEW) == [512] * 6


def test_steps_that_take_longer_leave_one_by_one() -> None:
    assert due_after(Emission(0.016), [FIRST, *[NEXT] * 3, LAST], 0.02) == [1] * 5
    assert due_after(Emission(0.0), [FIRST, *[NEXT] * 3, LAST], 0.0001) == [1] * 5


def test_nothing_waits_when_no_step_follows() -> None:
    emission = Emission(1.0)
    assert not emission.is_due(step_s=0.0, now=0.0, is_last=True)
    emission.add(1, is_urgent=False)
    assert emission.is_due(step_s=0.001, now=0.0, is_last=True)
    assert not emission.release()


def test_what_waits_can_be_called_for() -> None:
    emission = Emission(1.0)
    emission.add(1, is_urgent=False)
    assert not emission.is_due(step_s=0.001, now=0.0, is_last=False)
    assert emission.release()
    assert not emission.release()


@given(st.lists(st.floats(0.0, 0.05), min_size=1, max_size=50), st.floats(0.0, 0.1))
def test_no_token_grows_older_than_allowed_while_steps_do_not_grow_longer(steps: list[float], max_age_s: float) -> None:
    emission, waiting, now = Emission(max_age_s), list[float](), 0.0
    for step_s in sorted(steps, reverse=True):
        now += step_s
        waiting.append(now)
        emission.add(1, is_urgent=False)
        if emission.is_due(step_s=step_s, now=now, is_last=False):
            assert now - waiting[0] <= max_age_s + 1e-9
            waiting.clear()
